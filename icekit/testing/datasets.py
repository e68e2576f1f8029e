"""The conformance checks of ``icekit.protocols.Dataset``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from icekit.protocols import BenchPicture, InputError, TrueConcept
from icekit.testing import components
from icekit.testing.asserting import assert_mask, assert_text, kind_of, other_random_numbers
from icekit.testing.scenes import two_objects
from icekit.testing.subjects import DatasetUnderTest

SIZE = (64, 64)


def check_metrics(subject: DatasetUnderTest) -> None:
    """``metrics``: names of metrics, each once."""
    names = _dataset(subject).metrics
    assert isinstance(names, Sequence) and not isinstance(names, str), (
        f"metrics is {kind_of(names)}; it should be a tuple of names"
    )
    for name in names:
        assert_text("the name of a metric", name)
    assert len(set(names)) == len(names), f"metrics has a name twice: {', '.join(names)}"


def check_preset(subject: DatasetUnderTest) -> None:
    """``preset``, if it has one, is the name of a preset."""
    preset = getattr(subject.component, "preset", None)
    assert preset is None or (isinstance(preset, str) and preset), f"preset is {preset!r}; it should be a preset's name"


def check_pictures(subject: DatasetUnderTest) -> None:
    """As many pictures as are asked for: a file or an image each, a name of its own that a file can have, and what is
    in it: masks of the size that is asked for, none empty, their words, their attributes' words.
    """
    _pictures(subject, _dataset(subject), subject.count, SIZE)


def check_two_sided_pictures(subject: DatasetUnderTest) -> None:
    """The masks are of the size that is asked for, which need not be square."""
    for size in ((64, 96), (96, 64)):
        _pictures(subject, _dataset(subject), subject.count, size)


def check_first_pictures(subject: DatasetUnderTest) -> None:
    """The first pictures are the same for every count."""
    dataset = _dataset(subject)
    many, few = (_pictures(subject, dataset, count, SIZE) for count in (subject.count, 1))
    _are_equal(few, many[:1], "asked for one picture")


def check_same_seed_same_pictures(subject: DatasetUnderTest) -> None:
    """The same seed has the same pictures, whatever is random elsewhere; another seed is taken, too."""
    first = _pictures(subject, _dataset(subject), subject.count, SIZE)
    with other_random_numbers(1):
        again = _pictures(subject, _dataset(subject), subject.count, SIZE)
    _are_equal(again, first, "asked a second time with the same seed")
    _pictures(subject, _dataset(subject), subject.count, SIZE, seed=1)


def check_own_number(subject: DatasetUnderTest) -> None:
    """Without a count there are as many as the data set has; one more is refused by name, or is there."""
    dataset = _dataset(subject)
    own = dataset.pictures(None, 0, SIZE)
    assert len(own) > 0, "without a count there is no picture"
    try:
        more = dataset.pictures(len(own) + 1, 0, SIZE)
    except InputError as error:
        assert "\n" not in str(error), f"the message is longer than a line: {str(error)!r}"
        return
    assert len(more) == len(own) + 1, (
        f"asked for {len(own) + 1} pictures it has {len(more)}; it should have them, or raise an icekit.InputError"
    )


def _dataset(subject: DatasetUnderTest) -> Any:
    return subject.component(subject.settings_for(two_objects(SIZE)))


def _pictures(
    subject: DatasetUnderTest, dataset: Any, count: int, size: tuple[int, int], seed: int = 0
) -> Sequence[BenchPicture]:
    """The pictures, which are as they must be."""
    pictures: Sequence[BenchPicture] = dataset.pictures(count, seed, size)
    assert isinstance(pictures, Sequence), f"pictures gives {kind_of(pictures)}; it should be a list"
    assert len(pictures) == count, f"asked for {count} pictures it has {len(pictures)}"
    for place, one in enumerate(pictures):
        assert isinstance(one, BenchPicture), f"picture {place} is {kind_of(one)}, no icekit.protocols.BenchPicture"
        assert isinstance(one.name, str) and re.fullmatch(r"[\w.-]+", one.name), (
            f"picture {place} is called {one.name!r}; it should be letters, digits, - _ and . alone: files are named so"
        )
        right = isinstance(one.picture, Image.Image) or (isinstance(one.picture, Path) and one.picture.is_file())
        assert right, f"picture {one.name!r} is {kind_of(one.picture)}; it should be an image, or the Path of a file"
        for number, concept in enumerate(one.concepts):
            what = f"concept {number} of {one.name!r}"
            assert isinstance(concept, TrueConcept), f"{what} is {kind_of(concept)}, no icekit.protocols.TrueConcept"
            assert_mask(f"the mask of {what}", concept.mask, size)
            assert bool(concept.mask.any()), f"the mask of {what} is empty: leave out what is not to be seen"
            if concept.word is not None:
                assert_text(f"the word of {what}", concept.word)
            for attribute, word in concept.attributes.items():
                assert_text(f"the {attribute} of {what}", word)
    names = [one.name for one in pictures]
    assert len(set(names)) == len(names), f"there are pictures of one name: {', '.join(names)}"
    return pictures


def _are_equal(pictures: Sequence[BenchPicture], expected: Sequence[BenchPicture], when: str) -> None:
    assert [one.name for one in pictures] == [one.name for one in expected], (
        f"{when}, the pictures are {[one.name for one in pictures]}, and were {[one.name for one in expected]}"
    )
    for one, other in zip(pictures, expected, strict=True):
        same = _bits(one.picture) == _bits(other.picture) and len(one.concepts) == len(other.concepts)
        same = same and all(
            torch.equal(a.mask, b.mask) and a.word == b.word and dict(a.attributes) == dict(b.attributes)
            for a, b in zip(one.concepts, other.concepts, strict=True)
        )
        assert same, f"{when}, {one.name!r} is another picture, or something else is true of it"


def _bits(picture: Image.Image | Path) -> bytes:
    return picture.tobytes() if isinstance(picture, Image.Image) else picture.read_bytes()


CHECKS = (
    *components.CHECKS,
    check_metrics,
    check_preset,
    check_pictures,
    check_two_sided_pictures,
    check_first_pictures,
    check_same_seed_same_pictures,
    check_own_number,
)
"""All checks of a data set, cheap ones first."""
