"""What a data set and a metric must offer, and the values that pass between them and the bench."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from icekit.protocols.values import Region

if TYPE_CHECKING:  # torch takes seconds to import; a plugin module that only declares things does not need it
    from pathlib import Path

    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class TrueConcept:
    """What is known of one object of a bench image.

    mask: bool ``[H, W]``, its visible pixels.
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
    picture: a file or an image of any size; its middle is used, in the proportions of the backbone's images.
    concepts: what is in it; empty where the data set does not know.
    """

    name: str
    picture: Image.Image | Path
    concepts: tuple[TrueConcept, ...] = ()


@dataclass(frozen=True)
class BenchImage:
    """A picture of a data set as runs and metrics see it: pixels float32 ``[3, H, W]`` in [0, 1]."""

    name: str
    pixels: Tensor
    concepts: tuple[TrueConcept, ...] = ()


class Dataset(Protocol):
    """Images to measure on. Built as ``Dataset(settings)``.

    A data set's class may have a ``preset``, the name of a registered preset with settings that suit it: it lies above
    the backbone's own, and below one that the user chooses.

    A data set may have ``published``, the ``Path`` of a TOML file of figures that others published on it, or None. They
    stand below the measured rows, in those columns that are measured, and are marked as published::

        images = 96                        # of how many pictures they are
        notes = ["What a reader must know to compare them."]

        [[rows]]
        name = "ICE"
        source = "Cendra and Han, CVPR 2025"
        values.sim_i = 0.738
    """

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics that are measured on it when none are asked for, as far as its truth allows."""
        ...

    def pictures(self, count: int | None, seed: int, size: tuple[int, int]) -> Sequence[BenchPicture]:
        """The pictures: the same for the same seed, and no mask empty.

        Args:
            count: how many; None for the data set's own number.
            seed: which ones, where there is a choice. The first pictures are the same for every count.
            size: (height, width) in pixels of the backbone's images, and so of the masks, which are fitted to it as the
                pictures are: see ``icekit.pixels.fit``.

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

    mask: bool ``[H, W]``, the true one where known.
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

    @property
    def vocabularies(self) -> Mapping[str, Sequence[str]]:
        """Name of each of the ``attributes`` -> the words that its token can be named with."""
        ...

    def generate(self, prompt: str) -> list[Image.Image]:
        """Images for a prompt of plain words and the concepts' tokens: as many as ``bench.images`` says.

        Image i starts from the same noise for every prompt and combination. A prompt is generated once, whichever
        metric asks first.
        """
        ...


ATTRIBUTE_PLACE = "{attribute}"
"""In the name of a column: one for every attribute."""


@dataclass(frozen=True)
class Column:
    """A number that a metric gives: what it says, in one line, and whether more is better."""

    meaning: str
    higher_is_better: bool = True


def columns_of(columns: Mapping[str, Column], attributes: Iterable[str]) -> dict[str, Column]:
    """A metric's columns, those with ``{attribute}`` in their name and meaning once for every attribute."""
    made: dict[str, Column] = {}
    for name, column in columns.items():
        for attribute in attributes if ATTRIBUTE_PLACE in name else ("",):
            meaning = column.meaning.replace(ATTRIBUTE_PLACE, attribute)
            made[name.replace(ATTRIBUTE_PLACE, attribute)] = replace(column, meaning=meaning)
    return made


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
    """The numbers it gives, by name; a name is used by one metric alone.

    One with ``{attribute}`` in its name stands for a column of every attribute that is learned: ``"words_{attribute}"``
    for ``words_colour``, ``words_material`` and so on.
    """
    needs: Collection[str]
    """What of the truth it cannot do without: ``"masks"``, ``"words"``, names of attributes."""

    def prepare(self, images: Sequence[BenchImage]) -> None:
        """See all images of the data set before the first is measured."""
        ...

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """One image's scores by column, finite; a column that is left out does not apply.

        Nothing may have been found, or more than there is; a found concept has tokens for the learner's parts alone.
        The same outcome has the same scores.
        """
        ...
