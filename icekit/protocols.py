"""What a backbone, retriever, segmentor, learner and attribute must offer, and the values that pass between them.

Conventions, everywhere in icekit:

- an image is float32 ``[3, H, W]`` with values in [0, 1], square, its side ``backbone.image_size`` pixels;
- a mask is bool ``[H, W]``, the size of its image;
- latents are ``[B, C, h, w]``, already multiplied by the autoencoder's scaling factor;
- timesteps are int64 ``[B]`` in [0, ``backbone.num_timesteps``);
- every random choice comes from a ``torch.Generator`` on the CPU or a seed that the caller hands in.

A component is a class with a nested pydantic model ``Settings``. A backbone is built as ``Backbone(settings, device)``,
every other component as ``Component(settings, backbone)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # torch takes seconds to import; a plugin module that only declares things does not need it
    from pathlib import Path

    import torch
    from PIL import Image
    from torch import Tensor


class ComponentSettings(BaseModel):
    """Base of every component's ``Settings``: unknown keys are refused, a ``Field(description=...)`` is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InputError(ValueError):
    """The user's input or settings are wrong. The message names what was given and what would be right."""


class RunError(RuntimeError):
    """The run itself failed (a loss became NaN, nothing was found, ...). The message is one plain line."""


# --- Stage one -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What is still visible of the image after some concepts were erased.

    original: the whole image, ``[3, H, W]`` in [0, 1].
    pixels: the image with the erased parts filled in, ``[3, H, W]`` in [0, 1].
    visible: bool ``[H, W]``, False where erased.
    """

    original: Tensor
    pixels: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Candidate:
    """A word a retriever proposes, with its score (cosine similarity or weight; higher is better)."""

    word: str
    score: float


@dataclass(frozen=True)
class Region:
    """One concept's place in the image: its running number, its word, the retriever's score, its mask ``[H, W]``.

    hints: what a ``Describer`` saw in it: attribute -> word -> how likely it is. Empty where none was asked.
    """

    index: int
    word: str
    score: float
    mask: Tensor
    hints: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The word as it appears in tokens and file names: lower-case words joined by ``-``."""
        return "-".join(re.findall(r"[^\W_]+", self.word.lower())) or "concept"


class Retriever(Protocol):
    """Image -> words (ICE's T)."""

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        """Words for what is still visible, best first, none of them equal or too similar to a word in ``used``.

        An empty list says that nothing nameable is left: the erase loop stops.
        """
        ...


@runtime_checkable
class Describer(Protocol):
    """A retriever that can also say which words of an attribute fit: learners may start from them."""

    def describe(self, view: View, noun: str, words: Sequence[str]) -> Mapping[str, float]:
        """How likely each word is to be true of what is visible, a ``noun``. They sum to one.

        Words that the backbone does not know are left out; empty when it knows none.
        """
        ...


@dataclass(frozen=True)
class Segmentation:
    """A word's mask and what is to be erased with it, both bool ``[H, W]``.

    erased: erased whether or not the mask becomes a region: the mask and, say, the picture's background.
    """

    mask: Tensor
    erased: Tensor


class Segmentor(Protocol):
    """Image, word -> mask (ICE's S). A segmentor offers ``segment``, or else it is a ``Proposer``."""

    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor | Segmentation:
        """The word's mask, bool ``[H, W]``, within ``view.visible``. All False says that the word is not there.

        A mask alone is erased when it becomes a region; a ``Segmentation`` says for itself what is to be erased.
        """
        ...


@dataclass(frozen=True)
class Proposal:
    """A mask, bool ``[H, W]``, and the word for it; None where the retriever is to name it."""

    mask: Tensor
    word: str | None = None


@runtime_checkable
class Proposer(Protocol):
    """A segmentor that knows its masks without a word: the user's own files, or a clustering of the whole image.

    Its masks are all the regions there are: there is no erase loop. Where a mask has no word, the retriever names it,
    looking at that mask alone.
    """

    def propose(self, image: Tensor) -> list[Proposal]:
        """The regions of the image ``[3, H, W]``, in the order in which they are to be numbered."""
        ...


# --- Stage two -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribute:
    """An intrinsic attribute: one more token for every object.

    name: as typed in ``--attribute`` and used in tokens (``<cup-0-colour>``).
    anchor: the text that stands for the attribute itself; its text embedding is the anchor of the intrinsic triplet.
    vocabulary: the words that a learned token of this attribute is named with.
    aliases: other spellings of the name that are accepted.
    """

    name: str
    anchor: str
    vocabulary: tuple[str, ...]
    aliases: tuple[str, ...] = ()


def token_names(region: Region, attributes: Sequence[Attribute]) -> dict[str, str]:
    """The tokens of one concept: ``{"category": "<cup-0>", "instance": "<cup-0-instance>", "colour": ...}``."""
    stem = f"{region.label}-{region.index}"
    names = {"category": f"<{stem}>", "instance": f"<{stem}-instance>"}
    return names | {attribute.name: f"<{stem}-{attribute.name}>" for attribute in attributes}


ATTRIBUTES = "attributes"
"""In ``Learner.parts``: a token for every attribute that is asked for."""
ALL_PARTS = ("category", "instance", ATTRIBUTES)
"""What a learner's tokens stand for when it does not say otherwise."""


def parts_of(learner: type, attributes: Sequence[str]) -> tuple[str, ...]:
    """The parts that a learner gives tokens for: of ``"category"``, ``"instance"`` and the attributes' names."""
    parts: Collection[str] = getattr(learner, "parts", ALL_PARTS)
    own = tuple(part for part in ("category", "instance") if part in parts)
    return own + (tuple(attributes) if ATTRIBUTES in parts else ())


def object_tokens(tokens: Mapping[str, str]) -> str:
    """What stands for a whole concept in a prompt: its instance and its category, as far as it has both.

    tokens: part -> token.
    """
    return " ".join(tokens[part] for part in ("instance", "category") if part in tokens)


@dataclass(frozen=True)
class Step:
    """One learning step: its number (from 1), the total, the phase's name and the losses by name (floats)."""

    step: int
    total: int
    phase: str
    losses: Mapping[str, float]


class Checkpoint(Protocol):
    """Where a learner keeps its state, so that a killed run can go on. Saving is atomic."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the JSON-able state of the last save, or None."""
        ...

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the last save by this one."""
        ...


@dataclass(frozen=True)
class Learned:
    """What a learner returns.

    tokens: float32 ``[embedding_dim]`` on the CPU per token name: for every region those of ``token_names`` that are
        among the learner's ``parts``.
    lora: weights of a LoRA adapter by diffusers' key (``unet.``...), empty when none was trained;
        ``StableDiffusionPipeline.load_lora_weights`` reads them.
    weights: all weights of a fine-tuned noise predictor by diffusers' key, float16 on the CPU, empty when they were not
        trained. Half precision, because a run keeps them so, and draws the same whether or not it was interrupted.
    weights_config: its configuration, JSON-able, as in diffusers' ``config.json``; with it the run has a folder that
        ``UNet2DConditionModel.from_pretrained`` reads.
    """

    tokens: dict[str, Tensor]
    lora: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    weights_config: dict[str, Any] = field(default_factory=dict)


class Learner(Protocol):
    """Image, regions, attributes -> tokens.

    A learner has a token for a concept's category, its instance and every attribute. One that learns less says so in a
    class attribute ``parts``, a selection of ``ALL_PARTS`` with ``"instance"``, ``"category"`` or both in it: a method
    of one token a concept has ``parts = ("instance",)``. What is not there has no name, no samples and no measured
    value; no row is made up for it.
    """

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Learn the tokens of all regions.

        Resumes from ``checkpoint`` when it holds a state, and then ends with the same tokens, bit for bit on the same
        machine, as a run that was never interrupted. Calls ``on_step`` after every step.

        Raises:
            RunError: a loss became NaN or infinite.
        """
        ...


# --- The model -------------------------------------------------------------------------------------------------------


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


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrueConcept:
    """What is known of one object of a bench image.

    mask: bool ``[S, S]``, its visible pixels.
    word: what it is; None where nobody said.
    attributes: attribute's name -> its true word (``{"colour": "red"}``), as far as known.
    """

    mask: Tensor
    word: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchPicture:
    """A picture of a data set.

    name: unique in the data set, fit for a file name.
    picture: a file or an image of any size; its centre square is used, ``S`` x ``S`` pixels of it.
    concepts: what is in it; empty where the data set does not know.
    """

    name: str
    picture: Image.Image | Path
    concepts: tuple[TrueConcept, ...] = ()


@dataclass(frozen=True)
class BenchImage:
    """A picture of a data set as runs and metrics see it: pixels float32 ``[3, S, S]`` in [0, 1]."""

    name: str
    pixels: Tensor
    concepts: tuple[TrueConcept, ...] = ()


class Dataset(Protocol):
    """Images to measure on. Built as ``Dataset(settings)``: it is asked for suggestions before any model is loaded."""

    @property
    def suggestions(self) -> Mapping[str, Any]:
        """Settings that suit it, by key as in ``--set`` (``"components.backbone"``, ``"metric.clip"``); the user's win.

        They lie above the backbone's own suggestions.
        """
        ...

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics that are measured on it when none are asked for, as far as its truth allows."""
        ...

    def pictures(self, count: int | None, seed: int, size: int) -> Sequence[BenchPicture]:
        """The pictures.

        Args:
            count: how many; None for the data set's own number.
            seed: which ones, where there is a choice. The first pictures are the same for every count.
            size: side in pixels of the masks (S), and of pictures that are drawn to order.

        Raises:
            InputError: there are not so many, or a mask cannot be read.
        """
        ...


@dataclass(frozen=True)
class FoundConcept:
    """A concept that a run found.

    region: its place and word. tokens: part -> token, as ``token_names`` gives them, of the learner's parts.
    words: attribute's name -> words its token was named with, best first; none for an attribute without a token.
    """

    region: Region
    tokens: Mapping[str, str]
    words: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Match:
    """One concept of a bench image that is judged.

    Where the truth is known there is one for every true concept, with the found concept that belongs to it (``found``
    is None if it was missed, ``iou`` then 0). Where it is not, every found concept stands for itself (``true`` is
    None).

    mask: bool ``[S, S]``, the true one where known.
    """

    mask: Tensor
    true: TrueConcept | None
    found: FoundConcept | None
    iou: float


class Outcome(Protocol):
    """What one combination of components made of one image, as a metric sees it."""

    image: BenchImage
    found: Sequence[FoundConcept]

    @property
    def matches(self) -> Sequence[Match]:
        """The concepts that are judged: the true ones in their order, or else the found ones."""
        ...

    @property
    def parts(self) -> Sequence[str]:
        """What the learner gives tokens for, whether or not it found anything here: see ``parts_of``.

        A concept that was missed counts against a learner only where it would have had a token for it.
        """
        ...

    @property
    def attributes(self) -> Sequence[str]:
        """Names of the attributes among ``parts``."""
        ...

    def generate(self, prompt: str) -> list[Image.Image]:
        """Images for a prompt of plain words and the concepts' tokens: as many as ``bench.images`` says.

        Image i starts from the same noise for every prompt and combination. A prompt is generated once, whichever
        metric asks first.
        """
        ...


@dataclass(frozen=True)
class Column:
    """A number that a metric gives: what it says, in one line, and whether more is better."""

    meaning: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Score:
    """A column's value for one image (None: it does not apply), and the prompts whose images it was read from."""

    value: float | None
    prompts: Sequence[str] = ()


class Metric(Protocol):
    """Judges what was found and learned, image by image. Built as ``Metric(settings, backbone)``.

    The same metric measures a floor (random masks, random tokens) and a ceiling (the true masks, the true words in
    place of learned tokens): a column whose ceiling is not above its floor says nothing, and is marked so.
    """

    columns: Mapping[str, Column]
    """The numbers it gives, by name; a name is used by one metric alone."""
    needs: Collection[str]
    """What of the truth it cannot do without: ``"masks"``, ``"words"``, names of attributes."""

    def prepare(self, images: Sequence[BenchImage]) -> None:
        """See all images of the data set before the first is measured."""
        ...

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """One image's scores by column; a column that is left out does not apply."""
        ...
