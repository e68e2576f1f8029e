"""The conformance checks of ``icekit.protocols.Segmentor``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from icekit.protocols import InputError, Proposal, Segmentation, View
from icekit.testing import components
from icekit.testing.asserting import (
    assert_backbone_unchanged,
    assert_mask,
    assert_text,
    generator_of,
    kind_of,
    other_random_numbers,
    trace_of,
)
from icekit.testing.scenes import Scene, one_colour, one_pixel_object, ten_objects, two_objects
from icekit.testing.subjects import SegmentorUnderTest

Masks = list[Tensor]

WORDS = ("metal ball", "Ball", "griffin", "a red ball on a table")
"""Words that a retriever may say: two at once, with a capital, never heard of, a phrase."""


def check_masks(subject: SegmentorUnderTest) -> None:
    """A mask is a bool tensor ``[H, W]`` on the CPU, alone or in a ``Segmentation``, within what is visible. A
    ``Proposer`` gives a list of ``Proposal``, none of them empty.
    """
    scene = two_objects(subject.on().image_size)
    segmentor = subject.build(scene)
    _masks(segmentor, scene, scene.view(), "the whole picture")
    _masks(segmentor, scene, scene.view(~scene.concepts[0].mask), "a view with an object erased")


def check_any_word(subject: SegmentorUnderTest) -> None:
    """Whatever a retriever says has an answer; a mask of nothing says that the word is not there."""
    scene = two_objects(subject.on().image_size)
    segmentor = _needs_words(subject, scene)
    for word in WORDS:
        _segmented(segmentor, scene.view(), word)


def check_nothing_visible(subject: SegmentorUnderTest) -> None:
    """Where everything is erased the mask is empty."""
    scene = two_objects(subject.on().image_size)
    segmentor = _needs_words(subject, scene)
    [mask, *_] = _segmented(segmentor, scene.view(torch.zeros(scene.size, dtype=torch.bool)), "ball")
    assert not bool(mask.any()), f"everything is erased, and the mask has {int(mask.sum())} pixels; it should have none"


def check_one_pixel(subject: SegmentorUnderTest) -> None:
    """An object may be one pixel, and all but one pixel may be erased."""
    scene = one_pixel_object(subject.on().image_size)
    segmentor = subject.build(scene)
    _masks(segmentor, scene, scene.view(), "a picture with an object of one pixel")
    _masks(segmentor, scene, scene.view(scene.concepts[1].mask), "a view of one pixel")


def check_one_colour(subject: SegmentorUnderTest) -> None:
    """A picture may have one colour everywhere."""
    scene = one_colour(subject.on().image_size)
    _masks(subject.build(scene), scene, scene.view(), "a picture of one colour")


def check_two_sided_pictures(subject: SegmentorUnderTest) -> None:
    """Pictures need not be square: masks have the picture's height and width."""
    for size in subject.sizes():
        scene = two_objects(size)
        _masks(subject.build(scene), scene, scene.view(), f"a picture of {size[0]} x {size[1]} pixels")


def check_same_seed_same_masks(subject: SegmentorUnderTest) -> None:
    """The same view, word and generator give the same mask, whatever came before and whatever is random elsewhere."""
    scene = two_objects(subject.on().image_size)
    segmentor = subject.build(scene)
    first = _masks(segmentor, scene, scene.view(), "the picture", seed=1)
    _masks(segmentor, scene, scene.view(~scene.concepts[1].mask), "another view", word="cube", seed=2)
    with other_random_numbers(1):
        again = _masks(segmentor, scene, scene.view(), "the picture", seed=1)
        anew = _masks(subject.build(scene), scene, scene.view(), "the picture", seed=1)
    for what, others in (("a second time", again), ("from another instance", anew)):
        assert len(others) == len(first), f"{what} there are {len(others)} masks, and at first there were {len(first)}"
        off = sum(int((one ^ other).sum()) for one, other in zip(first, others, strict=True))
        assert off == 0, (
            f"{what} the masks differ in {off} pixels: random numbers must come from the generator that segment is "
            "handed, and nothing may be kept between calls"
        )


def check_what_it_is_given(subject: SegmentorUnderTest) -> None:
    """The view and the backbone are afterwards as they were, and a mask that is handed out is the caller's own."""
    backbone = subject.on()
    scene, before = two_objects(backbone.image_size), trace_of(backbone)
    segmentor = subject.build(scene, backbone)
    view, copy = scene.view(~scene.concepts[1].mask), scene.view(~scene.concepts[1].mask)
    masks = _masks(segmentor, scene, view, "the picture")
    for name in ("original", "pixels", "visible"):
        assert torch.equal(getattr(view, name), getattr(copy, name)), f"it has changed the view's {name}"
    kept = [mask.clone() for mask in masks]
    for mask in masks:
        mask.logical_not_()
    assert torch.equal(view.visible, copy.visible), "the mask that it returns is the view's own tensor: clone it"
    again = _masks(segmentor, scene, scene.view(~scene.concepts[1].mask), "the picture")
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True)), (
        "a mask that was changed by its caller comes again so: hand out a clone"
    )
    assert_backbone_unchanged(backbone, before, "segmenting")


def check_ten_rounds(subject: SegmentorUnderTest) -> None:
    """Ten words one after the other, what was found being erased each time: no mask has what is erased already."""
    scene = ten_objects(subject.on().image_size)
    segmentor = _needs_words(subject, scene)
    visible = torch.ones(scene.size, dtype=torch.bool)
    for place, concept in enumerate(scene.concepts):
        [mask, *_] = _segmented(segmentor, scene.view(visible), str(concept.word), f"round {place + 1}", seed=place)
        visible &= ~mask


def check_own_picture(subject: SegmentorUnderTest) -> None:
    """A segmentor with ``check_picture`` takes the picture that its settings are for."""
    scene = two_objects(subject.on().image_size)
    check = getattr(subject.component, "check_picture", None)
    if check is None:
        raise SkipTest("it has no check_picture")
    height, width = scene.size
    try:
        check(subject.settings_for(scene), "picture.png", (width, height))
    except InputError as error:
        raise AssertionError(f"check_picture refuses the picture that its settings were made for: {error}") from error


def _needs_words(subject: SegmentorUnderTest, scene: Scene) -> Any:
    if hasattr(subject.component, "propose"):
        raise SkipTest("it proposes masks without a word")
    return subject.build(scene)


def _masks(segmentor: Any, scene: Scene, view: View, what: str, word: str = "ball", seed: int = 0) -> Masks:
    """What a segmentor of either sort gives for a picture, which is as it must be."""
    if not hasattr(segmentor, "propose"):
        return _segmented(segmentor, view, word, what, seed)
    proposals = segmentor.propose(view.original)
    assert isinstance(proposals, list | tuple), f"for {what} propose gives {kind_of(proposals)}; it should be a list"
    masks = []
    for place, one in enumerate(proposals):
        assert isinstance(one, Proposal), f"for {what} number {place} is {kind_of(one)}, no icekit.Proposal"
        assert_mask(f"for {what} the mask of number {place}", one.mask, scene.size)
        assert bool(one.mask.any()), f"for {what} the mask of number {place} is empty: leave it out"
        if one.word is not None:
            assert_text(f"for {what} the word of number {place}", one.word)
        masks.append(one.mask)
    return masks


def _segmented(segmentor: Any, view: View, word: str, what: str = "the picture", seed: int = 0) -> Masks:
    """The mask, and what is to be erased with it, where it says so."""
    found = segmentor.segment(view, word, generator_of(seed))
    size = (view.visible.shape[0], view.visible.shape[1])
    masks = [found.mask, found.erased] if isinstance(found, Segmentation) else [found]
    assert_mask(f"for {what} the mask of {word!r}", masks[0], size)
    outside = int((masks[0] & ~view.visible).sum())
    assert outside == 0, f"for {what} the mask of {word!r} has {outside} pixels that are erased: leave them out"
    if isinstance(found, Segmentation):
        assert_mask(f"for {what} what is erased with {word!r}", found.erased, size)
    return masks


CHECKS = (
    *components.CHECKS,
    check_masks,
    check_own_picture,
    check_nothing_visible,
    check_one_pixel,
    check_one_colour,
    check_what_it_is_given,
    check_same_seed_same_masks,
    check_two_sided_pictures,
    check_any_word,
    check_ten_rounds,
)
"""All checks of a segmentor, cheap ones first."""
