"""The conformance checks of ``icekit.protocols.Retriever``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from unittest import SkipTest

import torch

from icekit.protocols import Candidate, Describer, Embedder, View
from icekit.testing import components
from icekit.testing.asserting import (
    assert_backbone_unchanged,
    assert_number,
    assert_text,
    kind_of,
    other_random_numbers,
    trace_of,
)
from icekit.testing.scenes import WORDS, one_colour, one_pixel_object, ten_objects, two_objects
from icekit.testing.subjects import RetrieverUnderTest

ROUNDS = 12
"""Most words that a retriever is asked for one after the other."""


def check_words(subject: RetrieverUnderTest) -> None:
    """For what is visible a list of ``Candidate``: a word and a finite score each, the best first, no word twice."""
    scene = two_objects(subject.on().image_size)
    retriever = subject.build(scene)
    for what, view in (("the whole picture", scene.view()), ("one half of it", scene.view(~scene.concepts[0].mask))):
        _words(retriever, view, what=what)


def check_used_words(subject: RetrieverUnderTest) -> None:
    """A word that was used does not come again, however it is written; in the end there may be none."""
    scene = ten_objects(subject.on().image_size)
    retriever, used = subject.build(scene), list[str]()
    while len(used) < ROUNDS and (found := _words(retriever, scene.view(), used)):
        used.append(found[0].word)
    if not used:
        raise SkipTest("it has no word for the picture")
    for spelled in (used[0].upper(), used[0].capitalize()):
        _words(retriever, scene.view(), [spelled], what=f"the picture, with {spelled!r} used")


def check_same_view_same_words(subject: RetrieverUnderTest) -> None:
    """The same view has the same words, whatever came before it and whatever is random elsewhere."""
    scene = two_objects(subject.on().image_size)
    retriever = subject.build(scene)
    first = retriever.retrieve(scene.view(), [])
    retriever.retrieve(scene.view(scene.concepts[0].mask), ["cup"])
    with other_random_numbers(1):
        again = retriever.retrieve(scene.view(), [])
        anew = subject.build(scene).retrieve(scene.view(), [])
    assert again == first, f"the same view has the words {again} a second time, and had {first}"
    assert anew == first, f"another instance has the words {anew} for the same view, and the first had {first}"


def check_what_it_is_given(subject: RetrieverUnderTest) -> None:
    """The view, the words used and the backbone are afterwards as they were."""
    backbone = subject.on()
    scene, before = two_objects(backbone.image_size), trace_of(backbone)
    retriever = subject.build(scene, backbone)
    view, copy, used = scene.view(~scene.concepts[1].mask), scene.view(~scene.concepts[1].mask), ["cup"]
    retriever.retrieve(view, used)
    for name in ("original", "pixels", "visible"):
        assert torch.equal(getattr(view, name), getattr(copy, name)), f"retrieve has changed the view's {name}"
    assert used == ["cup"], f"retrieve has changed the words used to {used}"
    assert_backbone_unchanged(backbone, before, "retrieve")


def check_two_sided_pictures(subject: RetrieverUnderTest) -> None:
    """Pictures need not be square."""
    for size in subject.sizes():
        scene = two_objects(size)
        retriever = subject.build(scene)
        _words(retriever, scene.view(), what=f"a picture of {size[0]} x {size[1]} pixels")
        _words(retriever, scene.view(scene.concepts[1].mask), what=f"an object of a picture of {size[0]} x {size[1]}")


def check_one_pixel(subject: RetrieverUnderTest) -> None:
    """All but one pixel may be erased."""
    scene = one_pixel_object(subject.on().image_size)
    _words(subject.build(scene), scene.view(scene.concepts[1].mask), what="a view of one pixel")


def check_nothing_visible(subject: RetrieverUnderTest) -> None:
    """Where nothing is visible there is an answer too, with or without words."""
    scene = two_objects(subject.on().image_size)
    nothing = torch.zeros(scene.size, dtype=torch.bool)
    _words(subject.build(scene), scene.view(nothing), what="a view in which everything is erased")


def check_one_colour(subject: RetrieverUnderTest) -> None:
    """A picture may have one colour everywhere."""
    scene = one_colour(subject.on().image_size)
    _words(subject.build(scene), scene.view(), what="a picture of one colour")


def check_description(subject: RetrieverUnderTest) -> None:
    """A ``Describer`` says how likely each word is: words of those asked for, from 0 to 1, one in all; the same each
    time. Of words that it cannot judge it says nothing.
    """
    scene = two_objects(subject.on().image_size)
    retriever = subject.build(scene)
    if not isinstance(retriever, Describer):
        raise SkipTest("it does not describe")
    view = scene.view(scene.concepts[0].mask)
    for words in WORDS.values():
        said = retriever.describe(view, "ball", tuple(words))
        _is_description(said, words)
        with other_random_numbers(1):
            again = retriever.describe(view, "ball", tuple(words))
        assert dict(again) == dict(said), f"the same view is described as {dict(again)} a second time, not {dict(said)}"
    nothing = retriever.describe(view, "ball", ())
    assert not nothing, f"asked for no words, describe says {dict(nothing)}"
    _is_description(retriever.describe(scene.view(), "ball", ("red",)), ("red",))


def check_vectors(subject: RetrieverUnderTest) -> None:
    """An ``Embedder`` has a vector of length one for any view, the same each time, and texts of the same space, which
    ``text_encoder`` gives without a backbone.
    """
    scene = two_objects(subject.on().image_size)
    retriever = subject.build(scene)
    if not isinstance(retriever, Embedder):
        raise SkipTest("it does not embed")
    assert_text("the retriever's space", retriever.space)
    assert len(retriever.space) <= 200, f"its space has a name of {len(retriever.space)} characters; 200 are kept"
    view = scene.view(scene.concepts[0].mask)
    first = retriever.embed(view)
    _is_vector("embed", first)
    length = len(first)
    first += 1  # the caller's own
    with other_random_numbers(1):
        again, other = retriever.embed(view), subject.build(scene)
    _is_vector("embed", again, length)
    assert isinstance(other, Embedder)
    assert other.space == retriever.space, f"another instance has the space {other.space}, this one {retriever.space}"
    assert torch.equal(other.embed(view), again), "another instance embeds the same view elsewhere"
    _is_vector("embed", retriever.embed(one_colour(subject.on().image_size).view()), length)
    nothing = scene.view(torch.zeros(scene.size, dtype=torch.bool))
    _is_vector("where nothing is visible embed", retriever.embed(nothing), length)
    texts = retriever.text_encoder(subject.settings_for(scene), torch.device("cpu"))
    assert texts.space == retriever.space, f"text_encoder is of the space {texts.space}, embed of {retriever.space}"
    words = ("a red ball", "cup")
    rows = texts.embed(words)
    assert isinstance(rows, torch.Tensor) and tuple(rows.shape) == (2, length), (
        f"for two texts text_encoder's embed gives {kind_of(rows)}; it should be float32 [2, {length}]"
    )
    for row in rows:
        _is_vector("text_encoder's embed", row, length)
    assert torch.equal(texts.embed(words), rows), "the same texts are embedded elsewhere a second time"


def _is_vector(what: str, vector: Any, length: int | None = None) -> None:
    right = f"float32 [{length or 'D'}] on the CPU"
    plain = isinstance(vector, torch.Tensor) and vector.dtype == torch.float32 and vector.device.type == "cpu"
    assert plain and vector.ndim == 1 and len(vector) == (length or len(vector)) > 0, (
        f"{what} gives {kind_of(vector)}; it should be {right}"
    )
    norm = float(vector.norm())
    assert abs(norm - 1) < 1e-3, f"{what} gives a vector of length {norm:.4g}; it should be 1"


def _words(retriever: Any, view: View, used: Sequence[str] = (), what: str = "the picture") -> list[Candidate]:
    """The words for a view, which are as they must be."""
    found = retriever.retrieve(view, list(used))
    assert isinstance(found, list | tuple), f"for {what} retrieve gives {kind_of(found)}; it should be a list"
    for one in found:
        assert isinstance(one, Candidate), f"for {what} there is {kind_of(one)} among the words, no icekit.Candidate"
        assert_text(f"for {what} a candidate's word", one.word)
        assert_number(f"for {what} the score of {one.word!r}", one.score)
    words = [one.word.casefold() for one in found]
    assert len(set(words)) == len(words), f"for {what} there are words twice: {', '.join(words)}"
    for better, worse in itertools.pairwise(found):
        assert better.score >= worse.score, (
            f"for {what} {worse.word!r} ({worse.score:.3g}) comes after {better.word!r} ({better.score:.3g}): "
            "the best should be first"
        )
    again = set(words) & {word.casefold() for word in used}
    assert not again, f"for {what} there are words that were used: {', '.join(sorted(again))}"
    return list(found)


def _is_description(said: Any, words: Sequence[str]) -> None:
    strange = sorted(set(said) - set(words))
    assert not strange, f"describe was not asked for {', '.join(strange)}"
    for word, likely in said.items():
        assert_number(f"how likely {word!r} is", likely)
        assert 0 <= likely <= 1, f"{word!r} is {likely:.3g} likely; it should be from 0 to 1"
    total = sum(said.values())
    assert not said or abs(total - 1) < 1e-3, f"what describe says sums to {total:.4g}; it should sum to 1"


CHECKS = (
    *components.CHECKS,
    check_words,
    check_one_pixel,
    check_nothing_visible,
    check_one_colour,
    check_two_sided_pictures,
    check_same_view_same_words,
    check_what_it_is_given,
    check_used_words,
    check_description,
    check_vectors,
)
"""All checks of a retriever, cheap ones first."""
