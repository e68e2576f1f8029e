"""What a backbone must offer: a pre-trained text-to-image model, taken apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # torch takes seconds to import; a plugin module that only declares things does not need it
    import torch
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    sequence: ``[B, L, D]``, what the noise predictor attends to; L may be another for other prompts.
    pooled: ``[B, P]``, L2-normalised: the paper's text encoder E. A backbone with several text encoders concatenates.
    extra: whatever else the backbone's own predictor needs (SDXL's size embeddings, say).
    """

    sequence: Tensor
    pooled: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class AttentionMaps(Protocol):
    """The attention captured inside ``with backbone.capture_attention(...) as maps``. Gradients flow through."""

    def cross(self, resolution: int) -> Tensor:
        """Cross-attention, mean over heads and over the captured layers of that resolution.

        Returns ``[B, L, r, r]``: for every pixel, weights over the L prompt positions that sum to one.
        """
        ...

    def self_(self, resolution: int) -> Tensor:
        """Self-attention, mean over heads and layers: ``[B, r*r, r*r]``, each row (one query) sums to one."""
        ...


class Backbone(Protocol):
    """A pre-trained text-to-image model, taken apart once and shared by all components. Its weights are frozen.

    Extra tokens: ``set_tokens`` gives the text encoder new words. Their rows may require gradients, and stay the
    caller's: an optimiser that changes them in place changes what the next ``encode_prompts`` sees.
    """

    image_size: int
    """Side of the images it takes and makes, pixels."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one image's latents."""
    embedding_dim: int
    """Length of one token's embedding row. Two text encoders: the sum of both, the backbone splits it."""
    num_timesteps: int
    device: torch.device
    attention_resolutions: tuple[int, ...]
    """Sides of the square attention grids of the noise predictor, largest first."""
    unet: torch.nn.Module
    """The noise predictor itself, for learners that fine-tune it."""

    @property
    def suggestions(self) -> Mapping[str, Any]:
        """Settings this model works best with, by key as in ``--set`` (``"retriever.model"``); the user's own win.

        A key with the component's name in it (``"segmentor.xattn.prompt"``) is for that component alone.
        """
        ...

    def knows(self, word: str) -> bool:
        """Whether the text encoder was trained with this word. A model of open vocabulary knows all."""
        ...

    def set_tokens(self, rows: Mapping[str, Tensor]) -> None:
        """Make these the extra tokens (replacing earlier ones): name ``<...>`` -> float32 ``[embedding_dim]``."""
        ...

    def word_embedding(self, word: str, pieces: Literal["mean", "first"] = "mean") -> Tensor:
        """The row of a plain word, float32 ``[embedding_dim]``; of one in several pieces their mean or the first's."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, extra tokens among them; gradients flow to rows that require them."""
        ...

    def embed_texts(self, texts: Sequence[str], pool: Literal["end", "highest"] = "end") -> Tensor:
        """``encode_prompts(texts).pooled`` alone, ``[B, P]``: much cheaper for short texts.

        pool: where E is read: at the text's end, or at its highest token id, which is an extra token if it has one.
        """
        ...

    def token_positions(self, prompt: str, words: Sequence[str]) -> list[list[int]]:
        """For each word (or extra token) its positions in the encoded prompt. Raises InputError when not in it."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> latents (the mean of the posterior: no randomness)."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents -> ``[B, 3, H, W]`` in [0, 1]."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process q(x_t | x_0)."""
        ...

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What ``predict`` should return: the noise, or v, as the model was trained."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The noise predictor's raw output, shape of ``noisy``."""
        ...

    def capture_attention(
        self, cross: Collection[int] = (), self_: Collection[int] = (), places: Collection[str] = ("down", "mid", "up")
    ) -> AbstractContextManager[AttentionMaps]:
        """Capture cross- and self-attention of the layers at these resolutions and places, until the block ends.

        Only these layers compute their weights explicitly, all others stay on the fused kernel. A second ``predict``
        in the block replaces the first one's maps. Raises InputError for a resolution that the model does not have.
        """
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = 25,
        guidance_scale: float = 7.5,
        lora: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """One RGB image per prompt; image i depends on ``seeds[i]`` and its prompt, not on its place in the batch.

        ``lora`` and ``weights`` are what a learner made of the noise predictor (``Learned``), used for this call.
        """
        ...


@runtime_checkable
class PosteriorBackbone(Protocol):
    """A backbone that can also say how sure its autoencoder is: learners may draw latents from what it says."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussian that the autoencoder makes of images ``[B, 3, H, W]`` in [0, 1]: its mean, which is
        ``encode_images(images)``, and its standard deviation, of the same shape.
        """
        ...
