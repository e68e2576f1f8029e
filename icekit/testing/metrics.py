"""The conformance checks of ``icekit.protocols.Metric``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

import torch
from PIL import Image

from icekit.bench.matching import matches_of
from icekit.protocols import (
    Attribute,
    BenchImage,
    Column,
    FoundConcept,
    InputError,
    Match,
    Region,
    Score,
    token_names,
)
from icekit.protocols.measuring import ATTRIBUTE_PLACE, columns_of
from icekit.randomness import seeded_generator
from icekit.testing import components
from icekit.testing.asserting import (
    assert_backbone_unchanged,
    assert_number,
    assert_text,
    kind_of,
    other_random_numbers,
    trace_of,
)
from icekit.testing.scenes import WORDS, Scene, one_colour, one_pixel_object, ten_objects, to_picture, two_objects
from icekit.testing.subjects import MetricUnderTest

Scores = Mapping[str, Score]

PICTURES = 2
"""Pictures of each prompt."""


@dataclass
class DrawnOutcome:
    """``protocols.Outcome`` whose pictures are drawn from their prompt's letters, and not by a model.

    asked: the prompts that pictures were made for.
    """

    image: BenchImage
    found: Sequence[FoundConcept]
    parts: Sequence[str]
    asked: list[str] = field(default_factory=list)

    @property
    def attributes(self) -> Sequence[str]:
        """See ``protocols.Outcome``."""
        return [part for part in self.parts if part not in ("category", "instance")]

    @property
    def vocabularies(self) -> Mapping[str, Sequence[str]]:
        """See ``protocols.Outcome``: the words that the found concepts have, and one more."""
        words = {name: [word for one in self.found for word in one.words.get(name, ())] for name in self.attributes}
        return {name: tuple(dict.fromkeys([*of_it, "other"])) for name, of_it in words.items()}

    @property
    def matches(self) -> Sequence[Match]:
        """See ``protocols.Outcome``."""
        return matches_of(self.image, self.found)

    def generate(self, prompt: str) -> list[Image.Image]:
        """See ``protocols.Outcome``. Raises InputError for a token that no found concept has."""
        known = {token for one in self.found for token in one.tokens.values()}
        for token in re.findall(r"<[^<>\s]+>", prompt):
            if token not in known:
                raise InputError(f"prompt {prompt!r}: there is no token {token}")
        self.asked.append(prompt)
        height, width = self.image.pixels.shape[1:]
        pictures = []
        for place in range(PICTURES):
            small = torch.rand(1, 3, 4, 4, generator=seeded_generator(place, prompt))
            pictures.append(to_picture(torch.nn.functional.interpolate(small, (height, width))[0]))
        return pictures


def check_columns(subject: MetricUnderTest) -> None:
    """``columns``: name -> ``Column`` with a meaning, at least one; ``needs``: what it cannot do without, as text."""
    columns, needs = subject.component.columns, subject.component.needs  # type: ignore[attr-defined]
    assert isinstance(columns, Mapping) and columns, f"columns is {kind_of(columns)}; it should be a mapping, not empty"
    for name, column in columns.items():
        assert isinstance(name, str) and re.fullmatch(r"\w+", name.replace(ATTRIBUTE_PLACE, "colour")), (
            f"a column is called {name!r}; it should be letters, digits and _, and {ATTRIBUTE_PLACE} where it is one "
            "of every attribute"
        )
        assert isinstance(column, Column), f"the column {name!r} is {kind_of(column)}, no icekit.protocols.Column"
        assert_text(f"the meaning of the column {name!r}", column.meaning)
        assert "\n" not in column.meaning, f"the meaning of the column {name!r} is longer than a line"
    assert isinstance(needs, Collection) and not isinstance(needs, str), (
        f"needs is {kind_of(needs)}; it should be a tuple of texts"
    )
    for one in needs:
        assert_text("what it needs", one)


def check_scores(subject: MetricUnderTest) -> None:
    """For a picture whose objects were found and learned a ``Score`` for columns of its own: finite, or None."""
    _measured(subject, two_objects)


def check_nothing_found(subject: MetricUnderTest) -> None:
    """Where nothing was found there is a score, or none; no error."""
    _measured(subject, two_objects, found=0)


def check_one_found(subject: MetricUnderTest) -> None:
    """Where one of two objects was found there is a score."""
    _measured(subject, two_objects, found=1)


def check_one_too_many(subject: MetricUnderTest) -> None:
    """Where more was found than there is there is a score."""
    _measured(subject, two_objects, more=True)


def check_parts(subject: MetricUnderTest) -> None:
    """A learner may have no token for attributes, for the category or for the instance: none is asked for then."""
    for parts in (("instance",), ("category",), ("category", "instance"), ("category", "instance", "colour")):
        _measured(subject, two_objects, parts=parts)


def check_no_truth(subject: MetricUnderTest) -> None:
    """A metric that needs no truth takes pictures of which nothing is known: what was found is judged."""
    if subject.component.needs:  # type: ignore[attr-defined]
        raise SkipTest("it needs the truth")
    _measured(subject, two_objects, truth=False)


def check_one_pixel(subject: MetricUnderTest) -> None:
    """An object may be one pixel."""
    _measured(subject, one_pixel_object)


def check_one_colour(subject: MetricUnderTest) -> None:
    """A picture may have one colour everywhere."""
    _measured(subject, one_colour)


def check_ten_concepts(subject: MetricUnderTest) -> None:
    """There may be ten objects."""
    _measured(subject, ten_objects)


def check_two_sided_pictures(subject: MetricUnderTest) -> None:
    """Pictures need not be square."""
    for size in subject.sizes():
        _measured(subject, two_objects, size=size)


def check_prompts(subject: MetricUnderTest) -> None:
    """The prompts that a score names are those whose pictures it was read from."""
    scores, outcome = _measured(subject, two_objects)
    named = {prompt for score in scores.values() for prompt in score.prompts}
    assert named == set(outcome.asked), (
        f"the scores name the prompts {sorted(named)}, and pictures were made for {sorted(set(outcome.asked))}"
    )


def check_same_outcome_same_scores(subject: MetricUnderTest) -> None:
    """The same outcome has the same scores, and it and the backbone are afterwards as they were."""
    before = trace_of(subject.on())
    first, outcome = _measured(subject, two_objects)
    with other_random_numbers(1):
        again, _ = _measured(subject, two_objects)
    assert {name: one.value for name, one in again.items()} == {name: one.value for name, one in first.items()}, (
        f"the scores are {again} a second time, and were {first}"
    )
    fresh = _scene(subject, two_objects, None)
    assert torch.equal(outcome.image.pixels, fresh.image), "measure has changed the picture"
    for one, as_it_was in zip(outcome.image.concepts, fresh.concepts, strict=True):
        assert torch.equal(one.mask, as_it_was.mask), f"measure has changed the mask of {one.word!r}"
    assert_backbone_unchanged(subject.on(), before, "measure")


def _scene(subject: MetricUnderTest, drawn: Any, size: tuple[int, int] | None) -> Scene:
    scene: Scene = drawn(size or subject.on().image_size, subject.words, subject.attributes)
    return scene


def _measured(
    subject: MetricUnderTest,
    drawn: Any,
    *,
    size: tuple[int, int] | None = None,
    parts: Sequence[str] | None = None,
    found: int | None = None,
    more: bool = False,
    truth: bool = True,
) -> tuple[Scores, DrawnOutcome]:
    """The scores of a picture, which are as they must be.

    Args:
        subject: it.
        drawn: what draws the picture.
        size: of it.
        parts: what the learner has tokens for; by default category, instance and all that is known.
        found: how many of its objects were found; None for all.
        more: whether something was found that is not there.
        truth: whether anything is known of it.
    """
    scene = _scene(subject, drawn, size)
    every = ("category", "instance", *{**WORDS, **subject.attributes})
    parts = every if parts is None else parts
    image = BenchImage("scene", scene.image.clone(), scene.concepts if truth else ())
    other = BenchImage("other", scene.image.flip(-1), tuple(scene.concepts) if truth else ())
    concepts = [_found(scene, region, parts) for region in scene.regions()][:found]
    if more:
        corner = torch.zeros(scene.size, dtype=torch.bool)
        corner[:3, :3] = True
        concepts.append(_found(scene, Region(len(concepts), "griffin", 0.1, corner), parts))
    outcome = DrawnOutcome(image, concepts, parts)
    metric = subject.build(scene)
    metric.prepare([image, other])
    scores = metric.measure(outcome)
    assert isinstance(scores, Mapping), f"measure gives {kind_of(scores)}; it should be a mapping of columns"
    columns = columns_of(metric.columns, outcome.attributes)
    for name, score in scores.items():
        assert name in columns, f"measure gives {name!r}, which is none of its columns: {', '.join(columns)}"
        assert isinstance(score, Score), f"{name!r} is {kind_of(score)}, no icekit.protocols.Score"
        if score.value is not None:
            assert_number(f"the score {name!r}", score.value)
        assert not isinstance(score.prompts, str), (
            f"the prompts of {name!r} are a text; they should be a tuple of texts"
        )
    return scores, outcome


def _found(scene: Scene, region: Region, parts: Sequence[str]) -> FoundConcept:
    """A concept that was found, with tokens for these parts, its attributes' tokens named with the true words."""
    names = [part for part in parts if part not in ("category", "instance")]
    tokens = token_names(region, [Attribute(name, name, (name,)) for name in names])
    true = scene.concepts[region.index].attributes if region.index < len(scene.concepts) else {}
    words = {name: (true.get(name, "plain"), "other") for name in names}
    return FoundConcept(region, {part: token for part, token in tokens.items() if part in parts}, words)


CHECKS = (
    *components.CHECKS,
    check_columns,
    check_scores,
    check_nothing_found,
    check_one_found,
    check_one_too_many,
    check_parts,
    check_no_truth,
    check_prompts,
    check_one_pixel,
    check_one_colour,
    check_two_sided_pictures,
    check_ten_concepts,
    check_same_outcome_same_scores,
)
"""All checks of a metric, cheap ones first."""
