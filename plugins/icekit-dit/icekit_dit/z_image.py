"""Any Z-Image model as a backbone: one stream of the picture's places and a language model's states, flow matching.

Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from icekit.backbones.estimate import Measured
from icekit.backbones.loading import Family
from icekit.backbones.text_encoder import TextEncoder
from icekit.protocols import Attention, Conditioning, Look, Prediction
from icekit_dit.language import LanguageBackbone
from icekit_dit.llm_encoder import LanguageModel, chat_around
from icekit_dit.llm_settings import ZImageSettings
from icekit_dit.transformer import KLTransformerBackbone, Seen
from icekit_dit.watching import Watch, heads_of, watching

if TYPE_CHECKING:
    from diffusers import ZImagePipeline

Z_IMAGE = Family(
    "Z-Image",
    "ZImagePipeline",
    {
        "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        "tokenizer": ("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        "text_encoder": ("transformers", ("Qwen3Model",)),
        "transformer": ("diffusers", ("ZImageTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL",)),
    },
    {},
)
ENCODER = "qwen3_4b"
LENGTH = 512
"""Positions of a prompt with the marks of a chat around it, at most: the pipeline's own."""
PATCH = 2
"""Latents along one side of a place, where the pipeline says nothing else."""
TRAINED_SIDE = 1024
"""Of the pictures that the pipeline makes where nothing is said; its models do not say what they were trained at."""
ROUND = 32
"""The transformer fills the places, and the positions of the prompt, up to multiples of so many."""


class ZImage(KLTransformerBackbone, LanguageBackbone):
    """Any Z-Image model, from the hub or a folder in diffusers' format.

    A token has one row, ``qwen3_4b``. A prompt is what a user says in a chat, and the transformer reads the second last
    states of all of it, the marks of the chat among them.
    """

    Settings = ZImageSettings
    encoder = ENCODER
    family = Z_IMAGE
    # A step by its shapes: without checkpointing it did not fit into 79 GiB.
    measured = Measured(34.05, 3.57, 0.9, 4.54, "benchmarks/memory.json, H100, and memory-by-shape.json")

    def _text_encoders(self, pipeline: ZImagePipeline) -> dict[str, TextEncoder]:
        before, after = chat_around(pipeline.tokenizer, add_generation_prompt=True, enable_thinking=True)
        text = LanguageModel(
            pipeline.tokenizer, pipeline.text_encoder, LENGTH, before=before, after=after, layer=-2
        )  # fmt: skip
        return {ENCODER: text}

    @property
    def _patch(self) -> int:
        return PATCH

    def _largest_side(self) -> int:
        """As many places along a side as there are embeddings of positions."""
        return int(min(self.transformer.axes_lens[1:])) * self._multiple()

    def _trained_size(self) -> tuple[int, int]:
        side = min(TRAINED_SIDE, self._largest_side())
        return side, side

    # --- The transformer ------------------------------------------------------------------------------------------

    def _captions(self, prompts: Conditioning) -> list[Tensor]:
        """Each prompt's own states, ``[L_i, C]``, as the transformer takes them."""
        sequence = prompts.parts["sequence"].to(self.transformer.dtype)
        return [one[own] for one, own in zip(sequence, prompts.parts["mask"], strict=True)]

    def _transform(self, noisy: Tensor, sigmas: Tensor, prompts: Conditioning) -> Tensor:
        """The transformer counts time from noise to picture, and its flow goes that way."""
        frames = list(noisy.unsqueeze(2).unbind(dim=0))
        output = self.transformer(frames, 1 - sigmas, self._captions(prompts), return_dict=False)[0]
        return -torch.stack(list(output)).squeeze(2)

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        """See ``protocols.Backbone``. What a place gives the prompt, what fills it up and the other places sums to one.

        Raises:
            InputError: attention is asked for that this family does not have.
        """
        prediction = super().predict(noisy, shares, prompts, look)
        if not prediction.attention.words:
            return prediction
        own = prompts.parts["mask"][:, :, None, None]  # what fills a shorter prompt up is no position of it
        words = tuple(maps * own for maps in prediction.attention.words)
        return replace(prediction, attention=Attention(words, prediction.attention.pixels))

    @contextmanager
    def _seeing(self, words: bool, pixels: bool, length: int) -> Iterator[Callable[[], Seen]]:
        places = self._grid[0] * self._grid[1]
        start = places + -places % ROUND
        attentions = [layer.attention for layer in self.transformer.layers]

        with watching(attentions, lambda watch, own: StreamProcessor(watch, own, places)) as watch:

            def seen() -> Seen:
                weights = watch.mean()
                to_prompt = weights[..., start : start + length]
                to_prompt = pad(to_prompt, (0, length - to_prompt.shape[-1]))
                return (to_prompt if words else None), (weights[..., :places] if pixels else None)

            yield seen

    def _sampling_pipeline(self) -> Any:
        from diffusers import ZImagePipeline

        return ZImagePipeline(
            scheduler=self._sampler(), vae=None, text_encoder=None, tokenizer=None, transformer=self.transformer
        )

    def passes(self, steps: int, guidance_scale: float) -> int:
        """See ``protocols.Backbone``: two a step with any guidance above 0."""
        return steps * (2 if guidance_scale > 0 else 1)

    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": self._captions(prompts), "negative_prompt_embeds": self._captions(empty)}


class StreamProcessor:
    """The processor that a layer has, with the weights of the picture's places computed beside it."""

    def __init__(self, watch: Watch, own: Any, places: int) -> None:
        self._watch, self._own, self._places = watch, own, places

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """Attend from all of ``[B, S, C]``, the places first, to all of it.

        attention_mask: bool ``[B, S]``, what there is. freqs_cis: complex ``[B, S, d / 2]``, rotations by position.
        """

        def heads(projected: Tensor, norm: Any) -> Tensor:
            split = heads_of(projected, attn.heads)
            split = split if norm is None else norm(split)
            return split if freqs_cis is None else rotated(split, freqs_cis.unsqueeze(1))

        query = heads(attn.to_q(hidden_states), attn.norm_q)[:, :, : self._places]
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        bias = None
        if attention_mask is not None:
            bias = torch.zeros_like(attention_mask, dtype=torch.float32).masked_fill(~attention_mask, -math.inf)
            bias = bias[:, None, None]
        self._watch.tell(query, key, 1 / math.sqrt(key.shape[-1]), bias)
        output: Tensor = self._own(
            attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask, freqs_cis=freqs_cis
        )
        return output


def rotated(states: Tensor, rotations: Tensor) -> Tensor:
    """Rotary position embedding: neighbouring pairs of numbers, as complex numbers, are turned (Su et al., 2021).

    Args:
        states: ``[B, heads, S, d]``.
        rotations: complex, of length one, ``[B, 1, S, d / 2]``.

    Returns:
        Of the shape and dtype of ``states``.
    """
    turned = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)).contiguous()) * rotations
    return torch.view_as_real(turned).flatten(-2).to(states.dtype)
