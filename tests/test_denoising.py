"""The parts of the masked denoising loss against values worked by hand."""

import math

import pytest
import torch

from icekit.learning.denoising import (
    coverage,
    draw_shares,
    latent_mask,
    masked_denoising_loss,
    nearest_mask,
    offset_noise,
    share_density,
)


def test_share_density_by_hand() -> None:
    density = share_density()
    assert density.sum().item() == pytest.approx(1.0)
    # At a half 1 - 0.5 cos(pi / 2) = 1, at 0 it is 0.5.
    assert (density[500] / density[0]).item() == pytest.approx(2.0)
    assert (density[999] / density[0]).item() == pytest.approx((1 + 0.5 * math.cos(math.pi / 1000)) / 0.5)
    part = share_density(0.5, 0.75)
    assert part[:500].sum() == 0 and part[750:].sum() == 0 and part[500:750].sum().item() == pytest.approx(1.0)
    assert (part[700] / part[500]).item() == pytest.approx((density[700] / density[500]).item())


def test_shares_are_drawn_as_often_as_the_density_says() -> None:
    shares = draw_shares(share_density(0.2, 0.8), 20_000, torch.Generator().manual_seed(0))
    assert shares.dtype == torch.float32 and 0.2 <= float(shares.min()) < float(shares.max()) < 0.8
    # The mean of s (1 - 0.5 cos(pi s)) over [0.2, 0.8], numerically.
    s = torch.linspace(0.2, 0.8, 10_001, dtype=torch.float64)
    weight = 1 - 0.5 * torch.cos(math.pi * s)
    assert float(shares.mean()) == pytest.approx(float((s * weight).mean() / weight.mean()), abs=4 * 0.17 / 20_000**0.5)


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
    assert coverage(mask, (2, 2)).tolist() == [[[1.0, 0.5], [0.0, 0.0]]]
    assert latent_mask(mask, (2, 2)).tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_a_tiny_object_keeps_its_most_covered_cell() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 7, 7] = mask[0, 0, 0] = mask[0, 1, 0] = mask[0, 1, 1] = True
    assert latent_mask(mask, (2, 2)).tolist() == [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]


def test_nearest_mask_takes_the_first_pixel_of_each_cell() -> None:
    mask = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(nearest_mask(mask, (4, 3)), mask[:, ::4, ::8].float())


def test_an_object_between_the_pixels_that_are_looked_at_keeps_its_most_covered_cell() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 1:4, 1:7] = True  # 9 pixels of the upper left cell, 9 of the upper right one without its first
    mask[0, 2, 2] = mask[0, 1, 4] = False  # now 8 and 8
    mask[0, 3, 4] = False  # and 7
    assert nearest_mask(mask, (2, 2))[0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert nearest_mask(mask, (2, 2))[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]  # an empty mask stays empty


def test_masked_denoising_loss_by_hand() -> None:
    prediction, target = torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 2.0)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert masked_denoising_loss(prediction, target, mask).tolist() == [1.0]  # 4 on a quarter of the cells
    assert masked_denoising_loss(prediction, target, mask, by_area=True).tolist() == [4.0]
