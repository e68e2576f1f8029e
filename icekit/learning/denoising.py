"""The masked denoising loss of stage two: at which noise, with which noise, and where it counts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.protocols import Grid

BINS = 1000
"""Shares of the schedule are drawn from so many, as many as Stable Diffusion has timesteps."""


def share_density(start: float = 0.0, end: float = 1.0) -> Tensor:
    """ICE's density of training timesteps over shares s = n / BINS of the schedule: p(s) ~ 1 - 0.5 cos(pi s).

    Later, noisier steps come up to three times as often as early ones. Outside of ``[start, end)`` it is zero. Returns
    float64 ``[BINS]``, which sums to one.
    """
    s = torch.arange(BINS, dtype=torch.float64) / BINS
    density = 1 - 0.5 * torch.cos(math.pi * s)
    density[(s < start) | (s >= end)] = 0
    return density / density.sum()


def draw_shares(density: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many shares of the schedule from a density over ``BINS`` of them: float32 ``[count]`` in [0, 1)."""
    return torch.multinomial(density, count, replacement=True, generator=generator).float() / BINS


def uniform_shares(span: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """So many shares of the schedule, each as likely, between two: float32 ``[count]``."""
    return span[0] + (span[1] - span[0]) * torch.rand(count, generator=generator)


def offset_noise(shape: tuple[int, int, int, int], offset: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise plus ``offset`` times one Gaussian number per sample and channel ("noise offset").

    The shift teaches the mean brightness, which pure white noise hardly touches. Returns float32 ``[B, C, h, w]``, CPU.
    """
    noise = torch.randn(shape, generator=generator)
    return noise + offset * torch.randn((*shape[:2], 1, 1), generator=generator)


def coverage(masks: Tensor, size: Grid) -> Tensor:
    """How much of each cell of a coarser grid a mask covers: bool ``[B, H, W]`` -> float32 ``[B, h, w]`` in [0, 1]."""
    return F.interpolate(masks.float().unsqueeze(1), size=size, mode="area").squeeze(1)


def latent_mask(masks: Tensor, size: Grid) -> Tensor:
    """Masks at latent resolution: cells at least half covered; where none is, those covered half as much as the most
    covered one, or more.

    An object thinner than half a cell would vanish otherwise, and its loss with it.
    bool ``[B, H, W]`` -> float32 ``[B, h, w]`` of 0 and 1; all zero only for an empty mask.
    """
    covered = coverage(masks, size)
    most = covered.amax(dim=(1, 2), keepdim=True)
    enough = torch.where(most >= 0.5, 0.5, most / 2)
    return ((covered >= enough) & (covered > 0)).float()


def nearest_mask(masks: Tensor, size: Grid) -> Tensor:
    """Masks at a coarser grid by nearest neighbour: a cell is what its first (top left) pixel is.

    That is ``torch.nn.functional.interpolate``'s "nearest". A thin or small object may fall between the pixels that
    are looked at; its mask then is that of ``latent_mask``.
    bool ``[B, H, W]`` -> float32 ``[B, h, w]`` of 0 and 1; all zero only for an empty mask.
    """
    nearest = F.interpolate(masks.float().unsqueeze(1), size=size, mode="nearest").squeeze(1)
    vanished = nearest.amax(dim=(1, 2), keepdim=True) == 0
    return torch.where(vanished, latent_mask(masks, size), nearest)


def masked_denoising_loss(prediction: Tensor, target: Tensor, mask: Tensor, by_area: bool = False) -> Tensor:
    """L_recon of ICE (CVPR 2025): || M * prediction - M * target ||^2, one mean per sample.

    Args:
        prediction: the noise predictor's output, float ``[B, C, h, w]``.
        target: noise or v, ``[B, C, h, w]``.
        mask: ``[B, h, w]``, 0 or 1.
        by_area: divide by the mask's share of the cells, so that a small object weighs as much as a large one. The
            paper takes the plain mean over all cells.

    Returns:
        ``[B]``.
    """
    mask = mask.unsqueeze(1)
    loss = (mask * prediction.float() - mask * target.float()).square().mean(dim=(1, 2, 3))
    return loss / mask.mean(dim=(1, 2, 3)) if by_area else loss
