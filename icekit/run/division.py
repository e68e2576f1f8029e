"""Where a region might be two things: cuts through the narrow places of its mask."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from skimage.morphology import h_maxima
from skimage.segmentation import watershed
from torch import Tensor

WAIST = 0.03
"""A place is narrow when its half-width lies below that of both sides by this, in units of the square root of the
mask's area."""
LEAST_PART = 0.05
"""A part below this share of the mask is no thing of its own."""


def divisions(mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ways to cut a mask in two at its waists: a part, and all the rest of it.

    The parts are the basins of the watershed of the distance from the mask's border (Meyer and Beucher, 1990): each has
    a place that is wider than the ways to the others by ``WAIST``. Parts that do not touch are told apart as well.

    Args:
        mask: bool ``[H, W]``.

    Returns:
        Pairs of bool ``[H, W]``, disjoint, together the mask; none where it has no waist.
    """
    inside = mask.numpy()
    area = int(inside.sum())
    widths = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]  # what is outside the image is outside
    if not area:
        return []
    tops, count = ndimage.label(h_maxima(widths, WAIST * area**0.5), np.ones((3, 3)))
    parts = watershed(-widths, tops, mask=inside)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    found = []
    for part in range(1, count + 1 if count > 2 else 2):  # of two parts, one is the other's rest
        if LEAST_PART * area <= sizes[part] <= (1 - LEAST_PART) * area:
            one = parts == part
            found.append((torch.from_numpy(one), torch.from_numpy(inside & ~one)))
    return found
