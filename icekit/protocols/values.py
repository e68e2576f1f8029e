"""The values that pass between components."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from icekit.protocols.backbone import FineTuning

if TYPE_CHECKING:  # torch takes seconds to import; a plugin module that only declares things does not need it
    from torch import Tensor


MAX_LABEL_BYTES, MAX_ATTRIBUTE_BYTES = 60, 40
"""Of a concept's label and of an attribute's name. File systems take names of 255 bytes, some of 143."""


def bounded(name: str, most: int) -> str:
    """A name of at most so many bytes of UTF-8.

    A longer one is cut, and eight digits of its digest keep it apart from others that begin alike.
    """
    data = name.encode("utf-8", "surrogatepass")
    if len(data) <= most:
        return name
    digest = hashlib.sha256(data).hexdigest()[:8]
    return f"{data[: most - len(digest) - 1].decode('utf-8', 'ignore').rstrip('-')}-{digest}"


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
        """The word as it appears in tokens and file names: lower-case words joined by ``-``.

        At most ``MAX_LABEL_BYTES``: a file's name is the label, an index, an attribute and what is put around them.
        """
        return bounded("-".join(re.findall(r"[^\W_]+", self.word.lower())) or "concept", MAX_LABEL_BYTES)


@dataclass(frozen=True)
class Segmentation:
    """A word's mask and what is to be erased with it, both bool ``[H, W]``.

    erased: erased whether or not the mask becomes a region: the mask and, say, the picture's background.
    """

    mask: Tensor
    erased: Tensor


@dataclass(frozen=True)
class Proposal:
    """A mask, bool ``[H, W]``, and the word for it; None where the retriever is to name it."""

    mask: Tensor
    word: str | None = None


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


def is_instance(part: str) -> bool:
    """Whether a part is what makes a concept this one: ``instance``, or a further row of it, ``instance2`` and so on.

    An embedding that another program has learned often has several rows; each is a token here.
    """
    return re.fullmatch(r"instance\d*", part) is not None


def object_tokens(tokens: Mapping[str, str]) -> str:
    """What stands for a whole concept in a prompt: its instance and its category, as far as it has both.

    tokens: part -> token.
    """
    instance = [token for part, token in tokens.items() if is_instance(part)]
    return " ".join([*instance, *(tokens[part] for part in ("category",) if part in tokens)])


@dataclass(frozen=True)
class Step:
    """One learning step: its number (from 1), the total, the phase's name and the losses by name (floats)."""

    step: int
    total: int
    phase: str
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Learned:
    """What a learner returns.

    tokens: by name, a finite float32 row on the CPU for every text encoder, without a gradient, no two in the same
        memory: for every region those of ``token_names`` that are among the learner's ``parts``.
    tuning: what it made of the noise predictor; nothing where it trained tokens alone.
    """

    tokens: dict[str, dict[str, Tensor]]
    tuning: FineTuning = field(default_factory=FineTuning)
