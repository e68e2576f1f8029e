"""The peaks of a soft map, and which of them are one thing's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import h_maxima
from skimage.segmentation import watershed
from torch import Tensor

from icekit.attention.colours import colour_distance, lab
from icekit.attention.maps import flat

FAINT = 0.5
"""Where a map has a maximum of this share of the level, there may be another thing."""


@dataclass(frozen=True)
class Joining:
    """When two peaks of a soft map are one thing's; see ``heaviest_part``.

    Attributes:
        pixels: ``[h, w, h, w]``, what each place of a grid (the first pair) looks at, as in ``Attention.pixels``.
        image: float32 ``[3, H, W]`` in [0, 1].
        join: peaks that attend to one another this much, as a share of how much they attend to themselves, are joined;
        join_alike: this much is enough for peaks that look alike:
        alike: whose ``colour_distance`` is this or less.
    """

    pixels: Tensor
    image: Tensor
    join: float
    join_alike: float
    alike: float


def heaviest_part(soft: Tensor, level: float, dip: float, joining: Joining | None = None) -> Tensor:
    """The basin of the soft map's heaviest peak, by the watershed of its peaks (Vincent and Soille, 1991).

    Two maxima are two peaks when every way between them goes down by ``dip`` at least from the lower one. Things that
    touch in the image are told apart so. A peak below ``level`` cannot be the heaviest, but what is nearest to it
    belongs to no other, if it is at least ``FAINT`` of the level.

    One thing may have two peaks, such as the halves of a ring: those that attend to the heaviest as to themselves, and
    it to them, are its own. A peak's places are those of its basin that reach ``level`` of its own height. With a_ij
    the mean weight that peak i's places give to peak j's in sum, how much they attend to one another is the smaller one
    of a_ij / a_jj and a_ji / a_ii.

    Args:
        soft: float ``[H, W]`` in [0, 1].
        level: a value of it. A peak weighs the sum of its basin's values from here on.
        dip: a difference of values.
        joining: which peaks are joined; None: none.

    Returns:
        bool ``[H, W]``: what belongs to that peak, or is not nearer to another; all True without a peak.
    """
    heights = soft.numpy().astype(np.float64)
    maxima = h_maxima(heights, dip).astype(bool) & (heights >= FAINT * level)
    peaks, count = ndimage.label(maxima, np.ones((3, 3)))
    if count == 0 or heights.max() < level:
        return torch.ones_like(soft, dtype=torch.bool)
    basins = watershed(-heights, peaks)
    weights = ndimage.sum_labels(heights * (heights >= level), basins, index=range(1, count + 1))
    first = int(weights.argmax())
    own = [first]
    if joining is not None:
        tops = ndimage.maximum(heights, basins, index=range(1, count + 1))
        places = np.stack([(basins == 1 + i) & (heights >= level * top) for i, top in enumerate(tops)])
        own = _joined(first, places, joining)
    return torch.from_numpy(np.isin(basins, [1 + i for i in own]))


def _joined(first: int, peaks: NDArray[np.bool_], joining: Joining) -> list[int]:
    """The peaks, ``[P, H, W]``, that belong to the first, itself among them; see ``heaviest_part``."""
    attention, grid = flat(joining.pixels), (joining.pixels.shape[0], joining.pixels.shape[1])
    places = F.adaptive_avg_pool2d(torch.from_numpy(peaks).float().unsqueeze(0), grid)[0].flatten(1)
    given = (places @ attention @ places.T) / places.sum(dim=1, keepdim=True).clamp_min(1e-12)  # a_ij
    share = given / given.diagonal().clamp_min(1e-12)
    mutual = torch.minimum(share[first], share[:, first])
    colours = lab(joining.image)

    def belongs(other: int) -> bool:
        if mutual[other] >= joining.join or other == first:
            return True
        enough = bool(mutual[other] >= joining.join_alike)
        return enough and colour_distance(colours[peaks[first]], colours[peaks[other]]) <= joining.alike

    return [other for other in range(len(peaks)) if belongs(other)]
