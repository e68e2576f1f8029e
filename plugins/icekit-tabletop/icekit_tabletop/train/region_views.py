"""Pictures as stage one makes them of regions: one object alone, and a scene from which objects are erased."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from icekit.pixels import erase, isolate
from icekit_tabletop.train.data import NO_OBJECT_CODE, TrainingScenes

EMPTY_SHARE = 0.1
"""Share of the regions seen alone that hold no object."""
BLACK_SHARE = 0.3
"""Share of the regions seen alone that have black around them, as metrics show them; the others the mean colour."""


class RegionViews:
    """Draws such pictures of the scenes whose objects were found.

    `scenes`: all training scenes. `masks`: bool [M, 4, H, W], the objects' regions in the first M; empty where unknown.
    """

    def __init__(self, scenes: TrainingScenes, masks: NDArray[np.bool_]) -> None:
        self._scenes, self._masks = scenes, masks
        known = np.count_nonzero(masks, axis=(2, 3)) > 0
        self._found = np.argwhere(known)
        counts = scenes.counts[: len(masks)]
        self._whole = np.flatnonzero((known.sum(1) == counts) & (counts > 0))
        self._weights = counts[self._whole] ** 2 / (counts[self._whole] ** 2).sum()

    def alone(self, rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """Regions with all else hidden, uint8 [size, 3, H, W], and their codes, int16 [size, 4, 4].

        Masks are a little too large or small now and then. Some are of another scene, where here nothing is.
        """
        pictures, codes = [], []
        for place in rng.integers(len(self._found), size=size):
            row, column = self._found[place]
            mask = self._masks[row, column]
            code = np.full((4, 4), NO_OBJECT_CODE, dtype=np.int16)
            if rng.random() < EMPTY_SHARE:
                row = self._whole[rng.integers(len(self._whole))]
                occupied = ndimage.binary_dilation(self._masks[row].any(axis=0), iterations=2)
                mask = mask & ~occupied
                if mask.sum() < 20:
                    mask = ~occupied
            else:
                mask = _rougher(mask, rng)
                code[0] = self._scenes.codes[row, column]
            image = torch.from_numpy(self._scenes.images[row]).float() / 255
            black = rng.random() < BLACK_SHARE
            picture = image * torch.from_numpy(mask) if black else isolate(image, torch.from_numpy(mask))
            pictures.append(_mirrored(picture, rng))
            codes.append(code)
        return np.stack(pictures), np.stack(codes)

    def erased(self, rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """Scenes of which some objects are erased, or all; as `alone`. Crowded scenes are drawn more often."""
        pictures, codes = [], []
        for row in rng.choice(self._whole, size=size, p=self._weights):
            count = int(self._scenes.counts[row])
            gone = rng.permutation(count)[: rng.integers(1, count + 1)]
            visible = torch.from_numpy(~self._masks[row, gone].any(axis=0))
            image = torch.from_numpy(self._scenes.images[row]).float() / 255
            code = self._scenes.codes[row].copy()
            code[gone] = NO_OBJECT_CODE
            pictures.append(_mirrored(erase(image, visible, "inpaint"), rng))
            codes.append(code)
        return np.stack(pictures), np.stack(codes)


def _rougher(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """The mask, or one a pixel larger or smaller all around."""
    kind = rng.integers(4)
    if kind == 0:
        return np.asarray(ndimage.binary_dilation(mask))
    if kind == 1:
        smaller = np.asarray(ndimage.binary_erosion(mask))
        return smaller if smaller.any() else mask
    return mask


def _mirrored(picture: torch.Tensor, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture in 0..1 as uint8, mirrored half of the time."""
    pixels = (picture * 255).round().byte().numpy()
    return pixels[:, :, ::-1] if rng.random() < 0.5 else pixels
