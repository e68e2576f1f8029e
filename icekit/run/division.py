"""Where a region might be several things: its parts that lie apart, and cuts through the narrow places of its mask."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from skimage.graph import MCP_Geometric
from skimage.morphology import h_maxima
from skimage.segmentation import watershed
from torch import Tensor

WAIST = 0.03
"""A place is narrow when its half-width lies below that of both sides by this, in units of the square root of the
mask's area."""
LEAST_PART = 0.05
"""A part below this share of the mask is no thing of its own."""
GAP = 0.25
"""Two parts of a mask are apart when as much of the picture lies between them, in units of the square root of the
smaller one's area: a quarter of its side, if it were a square."""


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


def things(mask: Tensor, hidden: Tensor, least: float) -> list[Tensor]:
    """The things that the parts of a word's mask are: parts that lie apart are several, others are one.

    A part is 8-connected. Between two parts lies the shortest way from one to the other, counted in pixels of what is
    neither the mask nor ``hidden``: what is hidden by another concept may well be theirs, so that the two ends of a dog
    behind a bench are one dog however broad the bench is. Two parts are one thing when the way is shorter than ``GAP``
    times the square root of the smaller one's area, or when a chain of such parts joins them. A part below ``least``
    is no thing of its own: it belongs to the thing next to it, by the same rule with that thing's area, or to none.

    Args:
        mask: bool ``[H, W]``.
        hidden: bool ``[H, W]``, what other concepts cover.
        least: area, as a share of the picture.

    Returns:
        Bool ``[H, W]`` each, disjoint, within the mask, the largest first. The mask itself where it has one part, or
        none of ``least`` or more.
    """
    inside = mask.numpy()
    labels, count = ndimage.label(inside, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1).astype(np.float64)
    large = [part for part in range(1, count + 1) if sizes[part] >= least * inside.size]
    if count < 2 or not large:
        return [mask]
    costs = (~(inside | hidden.numpy())).astype(np.float64)
    near = np.zeros((len(large), count + 1), dtype=bool)
    for row, part in enumerate(large):
        ways, _ = MCP_Geometric(costs).find_costs(np.argwhere(labels == part))
        nearest = ndimage.minimum(ways, labels, index=range(count + 1))
        side = np.sqrt(np.where(sizes >= least * inside.size, np.minimum(sizes, sizes[part]), sizes[part]))
        near[row] = nearest < GAP * side
    together = csr_array(near[:, large] | near[:, large].T)
    number, groups = connected_components(together, directed=False)
    found = []
    for group in range(number):
        own = near[groups == group].any(axis=0)
        own[large] = groups == group
        own[0] = False
        found.append(own[labels])
    taken = np.zeros_like(inside)
    things = []
    for one in sorted(found, key=lambda one: -int(one.sum())):  # a small part near two things is the larger one's
        things.append(torch.from_numpy(one & ~taken))
        taken |= one
    return things
