"""Attention maps as tensors: brought to one grid, and made comparable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.attention.settings import Normalisation
from icekit.protocols import Grid


def upsample(maps: Tensor, size: Grid) -> Tensor:
    """Bilinear (antialiased when it gets smaller): ``[T, h, w]`` -> ``[T, H, W]``."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def on_grid(visible: Tensor, grid: Grid) -> Tensor:
    """Which cells of an attention grid are visible by more than half: bool ``[H, W]`` -> bool ``[h * w]``.

    Where what is visible is too thin for that, those that are visible half as much as the most visible one, or more.
    """
    share = F.interpolate(visible.float()[None, None], size=grid, mode="area").flatten()
    seen = share > 0.5
    return seen if bool(seen.any()) else (share >= share.max() / 2) & (share > 0)


def flat(pixels: Tensor) -> Tensor:
    """What places look at, one row a place: ``[h, w, h, w]`` -> ``[h * w, h * w]``."""
    return pixels.flatten(2).flatten(0, 1)


def normalise_over_space(maps: Tensor, how: Normalisation, visible: Tensor) -> Tensor:
    """Make the maps of different words comparable: a frequent word gets more attention everywhere.

    ``max``: c / max c. ``minmax``: (c - min c) / (max c - min c). ``l2``: c / ||c||_2. The statistics are those of the
    visible pixels, and all others become 0. A constant map becomes 0 under ``minmax``, a zero map stays zero.

    Args:
        maps: c >= 0, ``[T, n]``.
        how: see above.
        visible: bool ``[n]``.

    Returns:
        ``[T, n]`` in [0, 1].
    """
    if not bool(visible.any()):
        return torch.zeros_like(maps)
    seen = maps[:, visible]
    lowest = seen.amin(dim=1, keepdim=True) if how == "minmax" else torch.zeros_like(seen[:, :1])
    seen = seen - lowest
    size = seen.norm(dim=1, keepdim=True) if how == "l2" else seen.amax(dim=1, keepdim=True)
    out = torch.zeros_like(maps)
    out[:, visible] = seen / size.clamp_min(torch.finfo(maps.dtype).tiny)
    return out


def aggregate(pixels: Sequence[Tensor]) -> Tensor:
    """What each cell of the finest grid looks at, from all grids: A[q] = sum_g (s_g / sum s) up(A_g[q_g]), with s_g the
    cells along the shorter side of grid g (DiffSeg, Tian et al., CVPR 2024, eq. 1, where all grids are square).

    The maps that are looked at are upsampled bilinearly and each made to sum to one again; places of a coarser grid
    that look stand for all cells of the finest that they cover (q_g covers q). The finer the grid, the more it counts.

    Args:
        pixels: A_g, ``[h, w, h, w]`` each, as in ``Attention.pixels``: places that look first, sums over the last pair
            are one. At least one; their order does not matter.

    Returns:
        ``[h, w, h, w]`` of the finest grid, sums over the last pair are one.
    """
    grids = [(one.shape[0], one.shape[1]) for one in pixels]
    height, width = max(grids, key=min)
    total = torch.zeros(height, width, height, width)
    for maps, (rows, columns) in zip(pixels, grids, strict=True):
        looked_at = upsample(maps.flatten(0, 1), (height, width)).unflatten(0, (rows, columns))
        looked_at = looked_at / looked_at.sum(dim=(2, 3), keepdim=True)
        row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
        total += looked_at[row[:, None], column] * (min(rows, columns) / sum(map(min, grids)))
    return total


def otsu(soft: Tensor, visible: Tensor) -> float:
    """Otsu's threshold of the visible part of a soft map ``[H, W]``: the least variance within both of its sides."""
    from skimage.filters import threshold_otsu

    return float(threshold_otsu(soft[visible].numpy()))
