"""Cuts through the narrow places of a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from icekit.run.division import divisions, things


def disc(x: float, y: float, radius: float, side: int = 64) -> Tensor:
    grid = torch.arange(side)
    return (grid[None] - x) ** 2 + (grid[:, None] - y) ** 2 <= radius**2


def same(one: Tensor, other: Tensor) -> bool:
    """Equal but for a few pixels of the border between the parts."""
    return float((one & other).sum() / (one | other).sum()) > 0.95


@pytest.mark.parametrize("distance", [17, 30])
def test_two_discs_are_told_apart_whether_they_touch_or_not(distance: int) -> None:
    left, right = disc(14, 32, 9), disc(14 + distance, 32, 9)
    [(one, other)] = divisions(left | right)
    assert not bool((one & other).any())
    assert torch.equal(one | other, left | right)
    assert sorted([same(one, left) and same(other, right), same(one, right) and same(other, left)]) == [False, True]


def test_of_three_discs_each_is_cut_off_once() -> None:
    discs = [disc(10, 32, 9), disc(27, 32, 9), disc(44, 32, 9)]
    whole = discs[0] | discs[1] | discs[2]
    found = divisions(whole)
    assert len(found) == 3
    assert all(any(same(one, each) for one, _ in found) for each in discs)
    assert all(torch.equal(one | rest, whole) and not bool((one & rest).any()) for one, rest in found)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(64, 64, dtype=torch.bool),
        torch.ones(64, 64, dtype=torch.bool),
        disc(32, 32, 12),
        disc(0, 32, 12),  # what is outside the image is no part of it
        disc(32, 32, 12) | disc(32, 20, 3),  # a bump is no waist
        disc(20, 32, 14) | disc(50, 32, 1),  # a speck is no thing
    ],
)
def test_one_thing_has_no_cut(mask: Tensor) -> None:
    assert divisions(mask) == []


NOTHING = torch.zeros(64, 64, dtype=torch.bool)


@pytest.mark.parametrize(("gap", "count"), [(2, 1), (3, 1), (4, 2), (20, 2)])
def test_things_are_apart_from_a_quarter_of_their_side_on(gap: int, count: int) -> None:
    """Discs of 253 pixels, as large as a square of 16."""
    left, right = disc(14, 32, 9), disc(33 + gap, 32, 9)
    found = things(left | right, NOTHING, 0.01)
    assert len(found) == count
    assert torch.equal(torch.stack(found).any(dim=0), left | right)
    assert all(torch.equal(one, other) for one, other in zip(found, [left, right], strict=False)) == (count == 2)


def test_what_another_concept_hides_is_no_gap() -> None:
    bar = NOTHING.clone()
    bar[:, 26:42] = True
    ends = disc(34, 32, 20) & ~bar
    assert len(things(ends, NOTHING, 0.01)) == 2
    [whole] = things(ends, bar, 0.01)
    assert torch.equal(whole, ends)
    assert len(things(disc(8, 32, 7) | disc(56, 32, 7), bar, 0.01)) == 2  # on both sides of it, and both away from it


def test_small_parts_belong_to_what_they_are_near_or_to_nothing() -> None:
    near, far = disc(26, 32, 1), disc(50, 10, 1)
    [found] = things(disc(14, 32, 9) | near | far, NOTHING, 0.01)
    assert torch.equal(found, disc(14, 32, 9) | near)
    between = disc(32, 32, 1)  # three pixels from each
    large, small = things(disc(18, 32, 9) | between | disc(45, 32, 8), NOTHING, 0.01)
    assert torch.equal(large | small, disc(18, 32, 9) | between | disc(45, 32, 8))
    assert not bool((large & small).any()) and int(large.sum()) > int(small.sum())


def test_a_chain_of_parts_is_one_thing_and_the_largest_comes_first() -> None:
    row = disc(10, 32, 6) | disc(25, 32, 6) | disc(40, 32, 6)
    assert len(things(row, NOTHING, 0.01)) == 1
    sizes = [int(one.sum()) for one in things(disc(10, 10, 4) | disc(40, 40, 9), NOTHING, 0.005)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 2


@pytest.mark.parametrize("mask", [NOTHING, torch.ones_like(NOTHING), disc(32, 32, 2) | disc(10, 10, 2)])
def test_a_mask_of_one_part_or_of_none_that_is_large_enough_is_as_it_was(mask: Tensor) -> None:
    [one] = things(mask, NOTHING, 0.01)
    assert torch.equal(one, mask)
