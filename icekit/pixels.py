"""Pictures in a model's shape and as tensors, and what is seen of them: concepts erased, or one shown alone."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor


def to_tensor(picture: Image.Image) -> Tensor:
    """Any picture -> RGB, float32 ``[3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


NEARLY = 1.02
"""A picture whose proportions are a shape's up to this factor is resized as a whole, and nothing is cut."""
MOST_SLENDER = 4.0
"""A shape for a picture has one side at most so many times as long as the other: models were not trained beyond."""


def shape_for(picture: tuple[int, int], native: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The shape in which a model sees a picture whole: its proportions, about as many pixels as the model is used to.

    Args:
        picture: its (width, height), pixels.
        native: (height, width) of the pictures that the model was trained on.
        multiple: of which both sides must be.

    Returns:
        (height, width): of all shapes that with the nearest proportions, where a tenth in these counts as much as eight
        tenths in area. Of a picture that is more slender than ``MOST_SLENDER`` the proportions are those.
    """
    wanted = min(max(picture[0] / picture[1], 1 / MOST_SLENDER), MOST_SLENDER)
    area = native[0] * native[1]

    def cost(shape: tuple[int, int]) -> float:
        height, width = shape
        return 8 * abs(math.log(width / height / wanted)) + abs(math.log(height * width / area))

    longest = math.ceil(2 * math.sqrt(area * MOST_SLENDER) / multiple)
    heights = (multiple * count for count in range(1, longest + 1))
    nearest = ((height, multiple * max(1, round(height * wanted / multiple))) for height in heights)
    return min(nearest, key=cost)


def middle(picture: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box in the middle of a picture that has the proportions of a shape; all of it where they are nearly.

    Args:
        picture: its (width, height), pixels.
        shape: (height, width) of which the proportions are taken.

    Returns:
        (left, top, right, bottom) in pixels of the picture, right and bottom excluded.
    """
    width, height = picture
    if max(width * shape[0], height * shape[1]) <= NEARLY * min(width * shape[0], height * shape[1]):
        return 0, 0, width, height
    if width * shape[0] > height * shape[1]:
        width = max(1, round(height * shape[1] / shape[0]))
    else:
        height = max(1, round(width * shape[0] / shape[1]))
    left, top = (picture[0] - width) // 2, (picture[1] - height) // 2
    return left, top, left + width, top + height


def fit(
    picture: Image.Image, shape: tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """A picture in another shape, (height, width): its ``middle`` is cut out and resized, antialiased."""
    return picture.crop(middle(picture.size, shape)).resize((shape[1], shape[0]), resample)


def cover(mask: NDArray[np.bool_], shape: tuple[int, int]) -> Tensor:
    """A mask in another shape, its ``middle`` as of a picture: what is thin is kept.

    A cell is in it that is covered at least half as much as the most covered one, which usually is covered whole. An
    object that is thinner than half a cell would vanish otherwise, or become another one.

    Args:
        mask: bool ``[H, W]``.
        shape: (height, width).

    Returns:
        bool ``shape``; all False only where the middle of the mask is.
    """
    picture = Image.fromarray(mask.astype(np.float32))
    box = middle(picture.size, shape)
    larger = shape[1] > box[2] - box[0] or shape[0] > box[3] - box[1]
    resample = Image.Resampling.BILINEAR if larger else Image.Resampling.BOX  # the latter is the covered area
    covered = torch.from_numpy(np.array(picture.crop(box).resize((shape[1], shape[0]), resample)))
    return (covered >= covered.max() / 2) & (covered > 1e-6)


def erase(image: Tensor, visible: Tensor, how: Literal["inpaint", "black", "mean"]) -> Tensor:
    """Fill what is not visible.

    ``black`` is the paper's x * (1 - m). ``mean`` fills with the mean colour of what is visible. ``inpaint`` continues
    the surroundings smoothly into the hole, so that neither a black silhouette nor a hard edge is there to be named;
    the hole is widened by 1/64 of the shorter side first, lest the object's own rim bleed back into it.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        visible: bool ``[H, W]``, False where erased.
        how: the filling.

    Returns:
        float32 ``[3, H, W]`` in [0, 1]; unchanged where visible (but for the widened rim under ``inpaint``).
    """
    if bool(visible.all()):
        return image.clone()
    if how == "black" or not bool(visible.any()):
        return image * visible
    if how == "mean":
        mean = image[:, visible].mean(dim=1)[:, None, None]
        return torch.where(visible, image, mean)
    side = min(image.shape[1:])
    known = visible.numpy()
    hole = ndimage.binary_dilation(~known, iterations=max(1, side // 64))
    if hole.all():
        hole = ~known
    pixels = image.numpy()
    nearest = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    filled = pixels[:, nearest[0], nearest[1]]
    smooth = ndimage.gaussian_filter(filled, sigma=(0, side / 32, side / 32))
    return torch.from_numpy(np.where(hole, smooth, pixels).astype(np.float32))


def isolate(image: Tensor, mask: Tensor) -> Tensor:
    """Show one region alone, so that it can be named: all else becomes the mean colour of what lies outside it.

    Not ``erase``: that would continue the region's own colours outwards, and its silhouette be gone.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        mask: bool ``[H, W]``.

    Returns:
        float32 ``[3, H, W]`` in [0, 1]; the image itself where the mask is the whole of it.
    """
    if bool(mask.all()):
        return image.clone()
    return torch.where(mask, image, image[:, ~mask].mean(dim=1)[:, None, None])
