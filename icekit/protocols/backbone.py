"""What a backbone must offer: a pre-trained text-to-image model, taken apart once and shared by all components.

UNets and diffusion transformers, one text encoder or several, epsilon, v and flow: whatever is special to a family of
models is inside its backbone. Three words are all that the others need:

- A **token** is one row for each text encoder, by the encoder's name as other tools write it (``clip_l``, ``clip_g``,
  ``t5xxl``, ...). Tokens are handed to every call that reads a prompt; nothing is set before, and two callers cannot
  disturb one another.
- A **share** of the noise schedule says how noisy something is: 0 is the picture, 1 is noise alone. The backbone alone
  knows discrete steps, sigmas or flow times.
- **Attention** is asked for with a prediction (``Look``) and comes back with it (``Attention``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # torch takes seconds to import; a plugin module that only declares things does not need it
    import torch
    from PIL import Image
    from torch import Tensor

Token = Mapping[str, "Tensor"]
"""One extra token: name of a text encoder -> its row, float32 ``[rows[encoder]]``."""
Tokens = Mapping[str, Token]
"""Extra tokens by name, ``<...>``."""
NO_TOKENS: Tokens = MappingProxyType({})

Grid = tuple[int, int]
"""Rows and columns of cells that cover a picture: (height, width)."""

Capability = Literal["attention", "similarity", "fine_tuning", "posterior", "concepts"]
"""What a family of models may lack.

attention: maps of the prompt's positions over the picture (``Look.words``).
similarity: maps of places over places (``Look.pixels``); linear self-attention has none.
fine_tuning: weights that can be trained (``Backbone.fine_tuned``).
posterior: the autoencoder's spread (``PosteriorBackbone``).
concepts: maps of concepts by what the attention gives out (``ConceptBackbone``). A class without the method lacks it,
    and need not say so.
"""


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, as the noise predictor of this backbone takes them; nobody else looks inside.

    parts: tensors by the backbone's own names, one prompt after the other along the first axis.
    """

    parts: Mapping[str, Tensor]

    def __getitem__(self, places: Tensor | Sequence[int] | slice) -> Conditioning:
        """Some of the prompts, in this order; a place may come several times."""
        chosen = places if isinstance(places, slice) or hasattr(places, "dtype") else list(places)
        return Conditioning({name: part[chosen] for name, part in self.parts.items()})


@dataclass(frozen=True)
class Look:
    """What of its attention a prediction is to tell: how fine the grids should be, as cells along the shorter side.

    The backbone takes its own nearest grid to each (``nearest_grids``), each grid once, the finest first.

    words: grids for the maps of the prompt's positions.
    pixels: grids for the maps of places over places.
    """

    words: tuple[int, ...] = ()
    pixels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Attention:
    """Where the model looked, one tensor a grid, the finest first. Gradients flow through.

    words: ``[B, L, h, w]``, at least 0: how much each place of the picture looks at each of the L positions of the
        prompt. What they sum to is the family's own: compare a position's map with itself or, normalised, with others.
    pixels: ``[B, h, w, h, w]``, at least 0: how much a place (the first pair) looks at every other; sums to one.
    """

    words: tuple[Tensor, ...] = ()
    pixels: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """output: the noise predictor's raw output, of its input's shape. attention: what was asked for."""

    output: Tensor
    attention: Attention = field(default_factory=Attention)


@dataclass(frozen=True)
class Tuned:
    """A noise predictor that is being trained.

    parameters: what is trained, by diffusers' key, float32. A LoRA adapter's keys begin as its pipeline loads them.
    kept: what it has become so far, to be asked for before the predictor is put back: see ``FineTuning``.
    """

    parameters: dict[str, torch.nn.Parameter]
    kept: Callable[[], FineTuning]


@dataclass(frozen=True)
class FineTuning:
    """What training made of a noise predictor.

    lora: weights of a LoRA adapter by diffusers' key (``unet.``..., ``transformer.``...), which the pipeline's
        ``load_lora_weights`` reads; empty when none was trained.
    weights: all weights of the noise predictor by diffusers' key, float16 on the CPU; empty when they were not trained.
        Half precision, because a run keeps them so, and draws the same whether or not it was interrupted.
    weights_config: its configuration, JSON-able, as in diffusers' ``config.json``.
    folder: what a pipeline calls this part of it, ``unet`` or ``transformer``; a run's folder of weights is named so.
    """

    lora: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    weights_config: Mapping[str, Any] = field(default_factory=dict)
    folder: str = "unet"

    def __bool__(self) -> bool:
        return bool(self.lora or self.weights)


@dataclass(frozen=True)
class MemoryNeed:
    """What a device must have free for a model, bytes: an estimate.

    weights: for the weights that are there at once. learning: to learn with it. drawing: to draw pictures alone.
    """

    weights: int
    learning: int
    drawing: int


@dataclass(frozen=True)
class World:
    """What a model knows that was trained on few kinds of pictures.

    what: in words, ``"ten shapes on a table"``, say.
    share, error: pictures of it, noised by this share of the schedule, are denoised without a prompt with at most this
        mean squared error; measured by whoever made the model. A run warns of a picture with a larger one.
    """

    what: str
    share: float
    error: float


@dataclass(frozen=True)
class Demo:
    """What `icekit demo` shows of a model that is small enough for it.

    picture: a place inside a package, ``"package:my_package/scene.png"``.
    seconds: how long each stage of a run took, by its name, measured on ``machine``, in words.
    """

    picture: str
    seconds: Mapping[str, float]
    machine: str


Trained = Literal["lora", "all"]
"""What is trained of a noise predictor: a LoRA adapter on its attention, or every weight."""


class Backbone(Protocol):
    """A pre-trained text-to-image model, see above. Its weights are frozen, and calls leave nothing behind in it.

    A backbone class may say ``lacks``, a collection of ``Capability``: what its family cannot do. It may have a
    ``preset``, the name of a registered preset with the settings that it works best with; the user's own win.
    A backbone may say ``pipeline_class`` and ``pipeline_source``: the name of the diffusers pipeline that loads its
    model without icekit, and what ``from_pretrained`` of it takes; a run's report shows how its tokens are used there.
    With several text encoders it says ``pipeline_encoders``, too: name -> the pipeline's names of tokenizer and model.
    Where that pipeline has no ``load_textual_inversion``, it says so by ``pipeline_loads_tokens = False``, and needs
    ``pipeline_encoders`` for one text encoder as well; ``pipeline_takes_space = True`` where the space before a token
    is part of it there, too; and ``pipeline_without``, the parts for which ``from_pretrained`` of that pipeline must be
    handed None. Where learned rows are known to be weak, it may say ``advice_on_rows``: one line for whoever learns
    them all the same.
    One that was trained on few kinds of pictures may say by ``world``, a ``World``, which: a run warns of others.
    Its settings may have a class variable ``demo``, a ``Demo``: `icekit demo` then runs on its picture.
    A backbone class may have a method ``memory_needed(settings, device, pictures)``, called before a model is loaded,
    that gives a ``MemoryNeed`` for so many pictures in one pass of a learning step, or None where it cannot be known.
    Where a picture does not take one pass of the noise predictor a step, and two with a ``guidance_scale`` above 1, it
    has a method ``passes(steps, guidance_scale)`` that says how many: what a run cost is counted by it. Its settings'
    ``steps`` may be None, and so may those that it is handed then: the model's own.
    """

    device: torch.device
    image_size: tuple[int, int]
    """(height, width) of the pictures that it takes and makes, pixels."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one picture's latents."""
    rows: Mapping[str, int]
    """Its text encoders by name, and how long a token's row is in each."""
    identity: str
    """What tokens depend on: equal where a token of one backbone means the same to another. Not a folder's name."""
    word_grids: tuple[Grid, ...]
    """The grids on which it can tell where the prompt's positions are looked for, finest first."""
    pixel_grids: tuple[Grid, ...]
    """The grids on which it can tell what places look at, finest first."""

    def knows(self, word: str) -> bool:
        """Whether the text encoder was trained with this word. A model of open vocabulary knows all."""
        ...

    def word_rows(self, word: str, pieces: Literal["mean", "first"] = "mean") -> dict[str, Tensor]:
        """A plain word as a token, detached float32 rows; of a word in several pieces their mean or the first's.

        Raises:
            InputError: an empty word.
        """
        ...

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """Encode prompts, extra tokens among them; gradients flow to rows that require them.

        Raises:
            InputError: a prompt that is too long, or with a ``<token>`` that was not handed in.
        """
        ...

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """Texts as points ``[B, P]`` of length one: the paper's E, in which tokens are held against words.

        How they are read from the text encoder, or encoders, is the backbone's to say.

        pool: another way to read them, by name, where the family knows one.

        Raises:
            InputError: a ``pool`` that it does not know; see ``encode_prompts``.
        """
        ...

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """For each word (or extra token) its positions among those that ``Attention.words`` has a map for.

        Raises:
            InputError: a word that is not in the prompt; see ``encode_prompts``.
        """
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> float32 latents ``[B, C, h, w]`` (no randomness)."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents -> float32 ``[B, 3, H, W]`` in [0, 1]."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The forward process: latents as noisy as ``shares``, float ``[B]`` in [0, 1], say."""
        ...

    def training_target(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """What ``predict`` should return for these latents with this noise: the noise, v, the flow, ..."""
        ...

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        """One pass of the noise predictor over latents ``[B, C, h, w]`` under as many prompts.

        Asking for attention changes the output by no more than rounding.

        Raises:
            InputError: attention is asked for that this family does not have.
        """
        ...

    def fine_tuned(self, trained: Trained, rank: int, generator: torch.Generator) -> AbstractContextManager[Tuned]:
        """Make the noise predictor trainable; when the block ends it is as it was before, bit for bit.

        rank: of a LoRA adapter, which changes nothing until it is trained. generator: draws its first weights.

        Raises:
            InputError: the family's weights cannot be trained.
        """
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        tokens: Tokens = NO_TOKENS,
        steps: int | None = None,
        guidance_scale: float | None = None,
        tuning: FineTuning | None = None,
        skip: Collection[int] = (),
        on_image: Callable[[int, Image.Image], None] | None = None,
    ) -> list[Image.Image]:
        """One RGB image per prompt; image i depends on ``seeds[i]`` and its prompt.

        Args:
            prompts: plain words and extra tokens.
            seeds: one per image.
            tokens: the extra tokens.
            steps: denoising steps; None for the backbone's own setting.
            guidance_scale: how strongly the prompt is followed; None for the backbone's own setting.
            tuning: what a learner made of the noise predictor, used in this call.
            skip: places of images that are there already. They are left out of the result, and a batch of nothing else
                is not made; the others are made in the same batches as without them, and so are the same bits.
            on_image: called with its place and the image after each was made.

        Raises:
            InputError: see ``encode_prompts``; or weights that are another model's.
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


@runtime_checkable
class ShapedBackbone(Protocol):
    """A backbone that works with pictures of more than one shape."""

    def for_picture(self, height: int, width: int) -> Backbone:
        """The same model, with the same weights, for a picture of this size in pixels: its ``image_size`` has about
        these proportions (``icekit.pixels.shape_for``). Itself where its settings say the size.
        """
        ...


@runtime_checkable
class ConceptBackbone(Protocol):
    """A backbone that can also say where concepts are, whatever the prompt, by what its attention gives out."""

    def concept_maps(
        self,
        noisy: Tensor,
        shares: Tensor,
        prompts: Conditioning,
        concepts: Sequence[str],
        tokens: Tokens = NO_TOKENS,
    ) -> Tensor:
        """How much of each place is each concept's, read in one pass, which they do not change.

        Args:
            noisy: latents ``[B, C, h, w]``.
            shares: how noisy they are, float ``[B]``.
            prompts: under which the pass is made, as many.
            concepts: words, names or extra tokens, at least one.
            tokens: the extra tokens among the concepts.

        Returns:
            float32 ``[B, K, h, w]`` on the finest of ``word_grids``, one map a concept: in [0, 1]; of each place they
            sum to one.

        Raises:
            InputError: no concept, or one that is too long, empty or an unknown ``<token>``.
        """
        ...


def nearest_grids(grids: Sequence[Grid], wanted: Sequence[int]) -> tuple[Grid, ...]:
    """For each wanted number of cells along the shorter side the nearest grid by ratio; of two as near, the finer.

    Each grid comes once, the finest first. Empty where there are no grids.
    """
    chosen = {min(grids, key=lambda grid: (abs(math.log(min(grid) / cells)), -min(grid))) for cells in wanted if grids}
    return tuple(sorted(chosen, key=min, reverse=True))
