"""Cuts through the narrow places of a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from icekit.run.division import divisions


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
