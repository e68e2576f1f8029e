"""The segmentor's formulas by hand, and the whole of it on attention that is planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planted_attention import (
    BALL,
    CUP,
    WIDE,
    JointBackbone,
    PlantedBackbone,
    generator,
    iou,
    scene,
    without_attention,
)
from torch import Tensor

from icekit.attention import Joining, colour_distance, heaviest_part, normalise_over_space, otsu, upsample
from icekit.builtin.segmentors.xattn import CrossAttentionSegmentor, compete, propagate
from icekit.protocols import InputError, View

ALL = torch.ones(4, dtype=torch.bool)


def build(backbone: Any = None, **settings: Any) -> tuple[CrossAttentionSegmentor, PlantedBackbone]:
    backbone = backbone or PlantedBackbone({"cup": CUP, "ball": BALL})
    return CrossAttentionSegmentor(CrossAttentionSegmentor.Settings.model_validate(settings), backbone), backbone


def test_propagation_by_hand() -> None:
    attention = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    cross = torch.tensor([[1.0, 3.0]])
    assert torch.equal(propagate(cross, attention, 0), cross)
    assert torch.allclose(propagate(cross, attention, 1), torch.tensor([[2.0, 3.0]]))
    assert torch.allclose(propagate(cross, attention, 2), torch.tensor([[2.5, 3.0]]))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max", [0.25, 0.5, 1.0, 0.0]),
        ("minmax", [0.0, 1 / 3, 1.0, 0.0]),
        ("l2", [1 / 21**0.5, 2 / 21**0.5, 4 / 21**0.5, 0.0]),
    ],
)
def test_normalisation_by_hand(how: Any, expected: list[float]) -> None:
    visible = torch.tensor([True, True, True, False])
    found = normalise_over_space(torch.tensor([[1.0, 2.0, 4.0, 9.0]]), how, visible)
    assert torch.allclose(found, torch.tensor([expected]))


@pytest.mark.parametrize("how", ["max", "minmax", "l2"])
def test_normalisation_has_no_zero_over_zero(how: Any) -> None:
    assert not normalise_over_space(torch.zeros(2, 4), how, ALL).any()
    assert not normalise_over_space(torch.ones(2, 4), how, ~ALL).any()
    if how == "minmax":
        assert not normalise_over_space(torch.ones(2, 4), how, ALL).any()


def test_competition_by_hand() -> None:
    maps = torch.tensor([[0.6, 0.2, 0.0], [0.2, 0.6, 0.0]])
    assert torch.allclose(compete(maps, "none", 1.0), maps[0])
    assert torch.allclose(compete(maps, "argmax", 1.0), torch.tensor([0.6, 0.0, 0.0]))
    assert torch.allclose(compete(maps, "ratio", 1.0), torch.tensor([0.45, 0.05, 0.0]))
    assert torch.allclose(compete(maps, "ratio", 0.5), torch.tensor([0.54, 0.02, 0.0]))
    share = 1 / (1 + torch.tensor(-0.4).exp())
    assert torch.allclose(
        compete(maps, "softmax", 1.0), torch.stack([0.6 * share, 0.2 * (1 - share), torch.tensor(0.0)])
    )
    assert torch.equal(compete(maps[:1], "ratio", 1.0), maps[0])


def test_upsampling_keeps_means_and_shapes() -> None:
    maps = torch.rand(2, 8, 8, generator=generator())
    assert upsample(maps, (8, 8)) is maps
    assert upsample(maps, (64, 64)).shape == (2, 64, 64)
    assert upsample(maps, (1, 1)).flatten() == pytest.approx(maps.mean(dim=(1, 2)), abs=0.05)


def test_otsu_separates_two_heights() -> None:
    soft = torch.full((8, 8), 0.1)
    soft[:4] = 0.9
    assert 0.1 <= otsu(soft, torch.ones(8, 8, dtype=torch.bool)) < 0.9


@pytest.mark.parametrize(("word", "mask"), [("cup", CUP), ("ball", BALL)])
def test_the_planted_mask_is_found(word: str, mask: Tensor) -> None:
    segmentor, _ = build()
    found = segmentor.segment(scene(), word, generator())
    assert found.dtype == torch.bool and found.shape == (64, 64)
    assert iou(found, mask) > 0.9


@pytest.mark.parametrize("word", ["cup", "ball"])
def test_a_picture_that_is_no_square(word: str) -> None:
    for objects in (WIDE, {name: mask.T.contiguous() for name, mask in WIDE.items()}):
        for refinement, one_piece in ((True, False), (True, True), (False, False)):
            segmentor, _ = build(PlantedBackbone(objects), refinement=refinement, one_piece=one_piece)
            view = scene(objects["cup"], objects["ball"])
            found = segmentor.segment(view, word, generator())
            assert found.shape == view.visible.shape == objects[word].shape
            assert iou(found, objects[word]) > 0.95
            soft = segmentor.soft_map(view, word, generator())
            assert soft.shape == view.visible.shape and soft.min() >= 0 and soft.max() == pytest.approx(1)


def test_how_much_the_prompt_gets_of_all_attention_does_not_matter() -> None:
    soft, less = (
        build(kind({"cup": CUP, "ball": BALL}))[0].soft_map(scene(), "cup", generator())
        for kind in (PlantedBackbone, JointBackbone)
    )
    torch.testing.assert_close(less, soft, rtol=1e-4, atol=1e-5)


def test_propagation_completes_the_object() -> None:
    alone, _ = build(propagation=0, refinement=False)
    spread, _ = build(propagation=1, refinement=False)
    assert iou(alone.segment(scene(), "cup", generator()), CUP) < 0.5
    assert iou(spread.segment(scene(), "cup", generator()), CUP) > 0.6


@pytest.mark.parametrize("competition", ["ratio", "softmax", "argmax", "none"])
@pytest.mark.parametrize("normalisation", ["minmax", "max", "l2"])
def test_every_way_to_compare_finds_it(competition: str, normalisation: str) -> None:
    segmentor, _ = build(competition=competition, normalisation=normalisation, threshold="otsu")
    assert iou(segmentor.segment(scene(), "cup", generator()), CUP) > 0.85


def test_nothing_is_found_where_it_was_erased() -> None:
    segmentor, _ = build()
    view = scene()
    visible = ~CUP
    found = segmentor.segment(View(view.original, view.pixels, visible), "ball", generator())
    assert iou(found, BALL) > 0.9
    assert not (segmentor.segment(View(view.original, view.pixels, visible), "cup", generator()) & CUP).any()
    hidden = View(view.original, view.pixels, torch.zeros_like(visible))
    assert not segmentor.segment(hidden, "cup", generator()).any()


def test_what_it_looks_at_is_a_setting() -> None:
    view = scene()
    erased = View(view.original, torch.zeros_like(view.pixels), view.visible)
    for look_at, expected in (("image", erased.original), ("rest", erased.pixels)):
        segmentor, backbone = build(look_at=look_at)
        segmentor.segment(erased, "cup", generator())
        assert torch.equal(backbone.seen[0][0], expected)


def test_shares_and_draws() -> None:
    segmentor, backbone = build(shares=[0.15, 1.0], draws=3)
    segmentor.segment(scene(), "cup", generator(1))
    assert backbone.shares == [0.15] * 3 + [1.0] * 3
    assert len({noise.sum().item() for noise in backbone.noises}) == 6
    again, other = build(shares=[0.15, 1.0], draws=3)
    again.segment(scene(), "cup", generator(1))
    assert all(torch.equal(a, b) for a, b in zip(backbone.noises, other.noises, strict=True))


def test_a_clean_latent_is_looked_at_once_for_each_share() -> None:
    segmentor, backbone = build(noise=False, shares=[0.15, 0.3], draws=3)
    segmentor.segment(scene(), "cup", generator())
    assert backbone.shares == [0.15, 0.3]  # said to be that noisy
    assert not torch.cat(backbone.noisy).any()  # and is not: the planted latents are zero
    assert backbone.noises == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1.0),
        ({"word_grids": 16}, 1.0),
        ({"word_grids": 7}, 4.0),
        ({"word_grids": [64, 32, 16, 8]}, (1 + 4) / 2),
        ({"word_grids": [64, 32, 16, 8], "word_weights": "side"}, (16 * 1 + 8 * 4) / 24),
    ],
)
def test_the_grids_of_a_words_attention(settings: dict[str, Any], expected: float) -> None:
    """Its attention is planted as 1 on the grid of 16 and as 4 on the grid of 8, everywhere."""
    segmentor, backbone = build(**settings)
    backbone.words = lambda grid: torch.full((5, *grid), 16 / grid[0]) ** 2  # type: ignore[method-assign]
    words, pixels = segmentor.word_maps(scene(), "cup", (32, 8), generator())
    assert torch.allclose(words, torch.full((3, 16, 16), expected))
    assert [one.shape for one in pixels] == [(16, 16, 16, 16), (8, 8, 8, 8)]


def test_a_word_that_is_its_own_rival() -> None:
    segmentor, backbone = build()
    backbone.objects["background"] = backbone.objects["ball"]
    assert segmentor.segment(scene(), "background", generator()).any()


def test_a_model_that_does_not_tell_is_refused() -> None:
    assert set(CrossAttentionSegmentor.needs) == {"attention", "similarity"}
    with pytest.raises(InputError, match=r"tells which places look at one another, and this backbone's does not: .*"):
        build(without_attention(pixel_grids=()))
    with pytest.raises(InputError, match=r"tells where the words of a prompt are, and this backbone's does not"):
        build(without_attention(word_grids=(), pixel_grids=()))


def test_what_is_wrong_is_named() -> None:
    for wrong in (
        {"prompt": "things"},
        {"shares": 150},
        {"threshold": 1.5},
        {"draws": 0},
        {"word_grids": []},
        {"word_grids": "all"},
        {"pixel_grid": 0},
    ):
        with pytest.raises(ValueError):
            build(**wrong)


def test_heaviest_part_leaves_the_other_peaks_out() -> None:
    left, dip, right = [0.9, 0.9], 0.6, [0.8, 0.8, 0.8]  # sums 1.8 and 2.4: the lower peak is the heavier one
    soft = torch.tensor([[0.1, *left, dip, *right, 0.1]] * 3)
    kept = heaviest_part(soft, 0.5, dip=0.1)
    assert kept[:, 4:7].all() and not kept[:, 1:3].any()
    assert heaviest_part(soft, 0.5, dip=0.3)[:, 1:7].all()  # the way between them goes down by 0.2 only: one peak
    faint = torch.tensor([[0.1, 0.9, 0.3, 0.4, 0.2, 0.1]] * 3)  # its second peak does not reach the level
    assert heaviest_part(faint, 0.5, dip=0.05)[0].tolist() == [True, True, True, False, False, False]
    assert heaviest_part(faint, 0.9, dip=0.05).all()  # nor half of it
    assert heaviest_part(torch.zeros(3, 4), 0.5, dip=0.1).all()
    assert heaviest_part(torch.full((3, 4), 0.6), 0.5, dip=0.1).all()


def test_peaks_that_attend_to_one_another_are_one_thing() -> None:
    """Three peaks in a row of 8 x 8 places; the outer two attend to each other nearly as to themselves."""
    soft = torch.full((8, 8), 0.1)
    left, middle, right = (soft.new_zeros(8, 8, dtype=torch.bool) for _ in range(3))
    left[:, 0:2], middle[:, 3:5], right[:, 6:8] = True, True, True
    for peak, height in ((left, 0.9), (middle, 0.8), (right, 0.85)):
        soft[peak] = height
    attention = torch.full((64, 64), 0.0)
    for one, other, weight in ((left, left, 1.0), (right, right, 1.0), (middle, middle, 1.0), (left, right, 0.75)):
        for query, key in ((one, other), (other, one)):
            attention[query.flatten()[:, None] & key.flatten()[None]] = weight
    image = torch.zeros(3, 8, 8)
    image[0, right] = 1  # red, and the left peak is black
    joining = Joining(attention.view(8, 8, 8, 8), image, join=0.7, join_alike=0.5, alike=10.0)
    kept = heaviest_part(soft, 0.5, 0.1, joining)
    assert kept[left].all() and kept[right].all() and not kept[middle].any()
    stricter = replace(joining, join=0.8, join_alike=0.7)
    assert not heaviest_part(soft, 0.5, 0.1, stricter)[right].any()
    # What looks the same needs less: black and black, but not for what attends to nothing else.
    kept = heaviest_part(soft, 0.5, 0.1, replace(stricter, image=torch.zeros(3, 8, 8)))
    assert kept[right].all() and not kept[middle].any()
    attention[left.flatten()[:, None] & right.flatten()[None]] = 0.1  # attention that is not returned joins nothing
    assert not heaviest_part(soft, 0.5, 0.1, joining)[right].any()


def test_colour_distance_by_hand() -> None:
    one, other = np.array([[0.0, 0, 0], [10, 0, 0]]), np.array([[0.0, 3, 4]])
    # There 5 and sqrt(125), in the mean 8.09; back 5.
    assert colour_distance(one, other) == pytest.approx((5 + 125**0.5) / 2)
    assert colour_distance(other, one) == colour_distance(one, other)
    assert colour_distance(one, one[::-1].repeat(3, axis=0)) == 0
