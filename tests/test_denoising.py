"""The parts of the masked denoising loss against values worked by hand."""

import math

import pytest
import torch

from icekit.learning.denoising import (
    coverage,
    latent_mask,
    masked_denoising_loss,
    nearest_mask,
    offset_noise,
    timestep_density,
)


def test_timestep_density_by_hand() -> None:
    # T = 2: 1 - 0.5 cos 0 = 0.5 and 1 - 0.5 cos(pi / 2) = 1.
    assert timestep_density(2).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert timestep_density(4, 0.5, 1.0).tolist() == pytest.approx([0, 0, 1 / (2 + 0.5**1.5), 1 - 1 / (2 + 0.5**1.5)])
    density = timestep_density(1000)
    assert density.sum().item() == pytest.approx(1.0)
    assert (density[999] / density[0]).item() == pytest.approx((1 + 0.5 * math.cos(math.pi / 1000)) / 0.5)


def test_offset_noise_shifts_whole_channels() -> None:
    plain = offset_noise((2, 3, 4, 4), 0.0, torch.Generator().manual_seed(0))
    shifted = offset_noise((2, 3, 4, 4), 0.1, torch.Generator().manual_seed(0))
    difference = shifted - plain
    assert torch.equal(plain, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference))
    assert len(difference[:, :, 0, 0].unique()) == 6


def test_latent_mask_takes_the_cells_that_are_at_least_half_covered() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, :6] = True  # of a 2 x 2 grid: one cell whole, one half
    assert coverage(mask, 2).tolist() == [[[1.0, 0.5], [0.0, 0.0]]]
    assert latent_mask(mask, (2, 2)).tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_a_tiny_object_keeps_its_most_covered_cell() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 7, 7] = mask[0, 0, 0] = mask[0, 1, 0] = True
    assert latent_mask(mask, (2, 2)).tolist() == [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]


def test_nearest_mask_takes_the_first_pixel_of_each_cell() -> None:
    mask = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(nearest_mask(mask, (4, 3)), mask[:, ::4, ::8].float())


def test_an_object_between_the_pixels_that_are_looked_at_keeps_its_most_covered_cell() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 1:4, 1:7] = True  # 9 pixels of the upper left cell, 9 of the upper right one without its first
    mask[0, 2, 2] = mask[0, 1, 4] = False  # now 8 and 8
    mask[0, 3, 4] = False  # and 7
    assert nearest_mask(mask, 2)[0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert nearest_mask(mask, 2)[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]  # an empty mask stays empty


def test_masked_denoising_loss_by_hand() -> None:
    prediction, target = torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 2.0)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert masked_denoising_loss(prediction, target, mask).tolist() == [1.0]  # 4 on a quarter of the cells
    assert masked_denoising_loss(prediction, target, mask, by_area=True).tolist() == [4.0]
