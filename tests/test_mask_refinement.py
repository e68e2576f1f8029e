"""Refined masks follow the image's edges, where a coarse and shifted map cannot."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.attention import log_likelihood, random_walker_with_prior, refine, without_islands


def iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def disc(side: int, row: float = 0.5, column: float = 0.45, radius: float = 0.22) -> Tensor:
    at = (torch.arange(side) + 0.5) / side
    return (at[:, None] - row) ** 2 + (at[None] - column) ** 2 < radius**2


def soft_map(mask: Tensor, shift: float = 0.02) -> Tensor:
    """What attention makes of a mask: shifted, brought to 16 x 16, blurred and enlarged again, its maximum one."""
    side = mask.shape[-1]
    moved = torch.roll(mask.float(), (round(shift * side), round(shift * side)), (0, 1))
    coarse = F.interpolate(moved[None, None], size=(16, 16), mode="area")
    kernel = torch.tensor([1.0, 2.0, 1.0])
    coarse = F.conv2d(coarse, (kernel[:, None] * kernel / 16)[None, None], padding=1)
    soft = F.interpolate(coarse, size=(side, side), mode="bilinear")[0, 0]
    return soft / soft.max()


def painted(mask: Tensor, inside: Tensor, outside: Tensor, noise: float = 0.01) -> Tensor:
    picture = torch.where(mask, inside, outside)
    return (picture + noise * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def flat(colour: tuple[float, float, float], side: int) -> Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, side, side)


@pytest.mark.parametrize("side", [64, 512])
def test_the_edge_of_a_disc_is_found(side: int) -> None:
    mask = disc(side)
    soft = soft_map(mask)
    picture = painted(mask, flat((0.8, 0.2, 0.1), side), flat((0.5, 0.5, 0.45), side))
    started = time.perf_counter()
    refined = refine(soft, picture)
    assert time.perf_counter() - started < 10  # about 0.5 s on one idle core
    assert iou(refined, mask) >= 0.95
    assert iou(refined, mask) > iou(soft >= 0.42, mask) + 0.05
    assert refined.dtype == torch.bool and refined.shape == mask.shape


@pytest.mark.parametrize("size", [(64, 112), (112, 64)])
def test_a_picture_may_have_two_sides(size: tuple[int, int]) -> None:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[-64:, -64:] = disc(64)
    soft = torch.zeros(size)
    soft[-64:, -64:] = soft_map(disc(64))
    picture = painted(mask, torch.tensor([0.8, 0.2, 0.1])[:, None, None], torch.tensor([0.5, 0.5, 0.45])[:, None, None])
    refined = refine(soft, picture)
    assert refined.shape == size and iou(refined, mask) >= 0.95


def test_a_shadow_is_not_taken_for_the_object() -> None:
    side = 64
    mask = disc(side)
    shadow = disc(side, 0.62, 0.62) & ~mask
    outside = torch.where(shadow, flat((0.25, 0.25, 0.23), side), flat((0.5, 0.5, 0.45), side))
    picture = painted(mask, flat((0.1, 0.3, 0.8), side), outside)
    soft = soft_map(mask)
    assert iou(refine(soft, picture), mask) >= 0.95 > iou(soft >= 0.42, mask)


def test_a_textured_object_stays_whole() -> None:
    side = 64
    mask = disc(side)
    stripes = (torch.arange(side) // 4 % 2).bool()[None, None].expand(3, side, side)
    picture = painted(
        mask,
        torch.where(stripes, flat((0.9, 0.8, 0.1), side), flat((0.7, 0.1, 0.1), side)),
        flat((0.3, 0.45, 0.5), side),
    )
    soft = soft_map(mask)
    assert iou(refine(soft, picture), mask) >= 0.95 > iou(soft >= 0.42, mask)


def test_without_anything_to_learn_colours_from_it_is_a_threshold() -> None:
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    everywhere = torch.full((32, 32), 0.9)
    everywhere[:4] = 0.3
    assert torch.equal(refine(everywhere, picture), everywhere >= 0.42)
    unsure = torch.full((32, 32), 0.05)
    unsure[:4] = 0.5
    assert torch.equal(refine(unsure, picture), unsure >= 0.42)
    assert not refine(torch.zeros(32, 32), picture).any()
    assert refine(torch.ones(32, 32), picture).all()


@pytest.mark.parametrize("picture", [torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
def test_an_image_without_edges_keeps_the_shape_of_the_map(picture: Tensor) -> None:
    mask = disc(64)
    soft = soft_map(mask)
    assert iou(refine(soft, picture), soft >= 0.42) > 0.8


def test_the_same_map_and_image_give_the_same_mask() -> None:
    soft, picture = soft_map(disc(64)), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = np.random.get_state()[1].copy()
    assert torch.equal(refine(soft, picture), refine(soft, picture))
    assert (np.random.get_state()[1] == before).all()


def test_the_walker_solves_its_equation() -> None:
    # Two pixels of the same colour: w = 1 + 1e-4, and (L + I) x = p is a 2 x 2 system.
    prior = np.array([[1.0, 0.0]])
    found = random_walker_with_prior(prior, np.zeros((1, 2, 3)), gamma=1.0)
    w = 1.0001
    assert found[0] == pytest.approx([(1 + w) / (1 + 2 * w), w / (1 + 2 * w)], rel=1e-3)


def test_the_walker_does_not_cross_edges() -> None:
    features = np.zeros((1, 4, 1))
    features[0, 2:] = 1.0  # one edge; the mean squared difference is 1/3, so the weight across it is exp(-3)
    found = random_walker_with_prior(np.array([[1.0, 0.5, 0.5, 0.0]]), features, gamma=0.01)
    assert found[0, 0] - found[0, 1] < 0.02 and found[0, 1] - found[0, 2] > 0.05


def test_the_likelihood_of_one_component_is_the_gaussian() -> None:
    samples = np.array([[0.0], [2.0]])
    found = log_likelihood(np.array([[[1.0], [3.0]]]), samples, components=1)
    variance = 1 + 2e-4
    assert found[0] == pytest.approx([-np.log(variance) / 2, -(4 / variance + np.log(variance)) / 2])


def test_islands_and_holes_go() -> None:
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[2:12, 2:12] = True
    whole = mask.clone()
    mask[5, 5] = False
    mask[18, 18] = True
    assert torch.equal(without_islands(mask, 0.1), whole)
    assert torch.equal(without_islands(mask, 0.0), mask)
    nothing = torch.zeros_like(mask)
    assert torch.equal(without_islands(nothing, 0.1), nothing)


def test_an_island_of_just_the_share_stays() -> None:
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[2:10, 2:13] = True  # 88 pixels
    mask[15, 2:14] = True  # 12 of 100
    assert torch.equal(without_islands(mask, 0.12), mask)
    assert without_islands(mask, 0.121).sum() == 88
