"""Crops around a concept: where they lie, what is in them and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from icekit.learning.crops import close_ups

SIDE = 64


def box(top: int, bottom: int, left: int, right: int) -> Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def crops(mask: Tensor, others: Tensor, image: Tensor, zoom: float = 2.0, count: int = 3) -> tuple[Tensor, Tensor]:
    return close_ups(image, mask, others, count, (zoom, zoom), torch.Generator().manual_seed(0))


def test_a_crop_is_as_large_as_the_zoom_says() -> None:
    mask = box(24, 40, 20, 28)  # 16 high and 8 wide: in a crop of 32 it covers a half by a quarter
    pictures, masks = crops(mask, torch.zeros_like(mask), torch.rand(3, SIDE, SIDE))
    assert pictures.shape == (3, 3, SIDE, SIDE) and masks.shape == (3, SIDE, SIDE)
    for cropped in masks:
        rows, columns = cropped.any(dim=1).sum().item(), cropped.any(dim=0).sum().item()
        assert rows == pytest.approx(SIDE / 2, abs=1) and columns == pytest.approx(SIDE / 4, abs=1)


def test_the_mask_lies_on_the_object_in_every_crop() -> None:
    mask = box(5, 21, 40, 60)  # at the image's edge: the crop is moved inside
    image = 0.2 + 0.6 * mask.float().expand(3, -1, -1)
    pictures, masks = crops(mask, torch.zeros_like(mask), image, zoom=1.5)
    for picture, cropped in zip(pictures, masks, strict=True):
        assert picture[0][cropped].mean() > 0.75 and picture[0][~cropped].mean() < 0.25


def test_other_concepts_are_gone_but_not_where_they_overlap() -> None:
    mask, others = box(24, 40, 20, 30), box(24, 40, 28, 44)
    image = torch.zeros(3, SIDE, SIDE)
    image[0][others & ~mask] = 1
    image[1][mask] = 1
    pictures, masks = crops(mask, others, image)
    for picture, cropped in zip(pictures, masks, strict=True):
        assert picture[0].max() < 0.1  # red is filled from the surroundings
        assert picture[1][cropped].mean() > 0.9


def test_never_larger_than_the_image_and_as_it_is_then() -> None:
    mask = box(2, 62, 2, 62)
    image = torch.rand(3, SIDE, SIDE)
    pictures, masks = crops(mask, torch.zeros_like(mask), image, count=1)
    torch.testing.assert_close(pictures[0], image)
    assert torch.equal(masks[0], mask)


def test_an_object_of_one_pixel_stays() -> None:
    mask = box(10, 11, 50, 51)
    assert crops(mask, torch.zeros_like(mask), torch.rand(3, SIDE, SIDE))[1].flatten(1).any(dim=1).all()


def test_the_same_generator_the_same_crops() -> None:
    mask, image = box(20, 30, 20, 30), torch.rand(3, SIDE, SIDE)
    drawn = [
        close_ups(image, mask, torch.zeros_like(mask), 4, (1.4, 2.0), torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])
