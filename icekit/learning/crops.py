"""A concept shown closer and alone: pictures for its tokens to learn from in place of the whole image.

In the image as it is an object covers a few latent cells, the model's eye is on everything else, and a token can become
the object's place. A crop around it is what its prompt, "a photo of a cup", describes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.pixels import erase

JITTER = 0.08
"""How far a crop's centre is moved at most, in sides of the crop."""


def close_ups(
    image: Tensor, mask: Tensor, others: Tensor, count: int, zoom: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Crops around a mask, at the image's own size; what other masks cover is filled from its surroundings.

    A crop has the image's shape; it is as much larger than the mask's bounding box as is drawn from ``zoom``, by the
    side that needs more, and at most the image. Its centre is drawn near the box's and stays within the image.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        mask: bool ``[H, W]``, not all False.
        others: bool ``[H, W]``, the other concepts; what is the mask's own stays.
        count: how many, 1 or more.
        zoom: the factor's least and largest, 1 or more.
        generator: draws factors and centres.

    Returns:
        Crops, float32 ``[count, 3, H, W]`` in [0, 1], and the mask in them, bool ``[count, H, W]``, never all False.
    """
    sides = torch.tensor(image.shape[1:], dtype=torch.float32)
    alone = erase(image, ~(others & ~mask), "inpaint")
    rows, columns = (axis.nonzero().flatten() for axis in (mask.any(dim=1), mask.any(dim=0)))
    ends = torch.tensor([(float(places[0]), float(places[-1]) + 1) for places in (rows, columns)])
    largest = ((ends[:, 1] - ends[:, 0]) / sides).max()
    least, most = zoom
    factors = least + (most - least) * torch.rand(count, generator=generator)
    shifts = (2 * torch.rand(count, 2, generator=generator) - 1) * JITTER
    scales = (largest * factors).clamp(max=1.0)
    sizes = scales[:, None] * sides
    middles = ends.mean(dim=1) + shifts * sizes
    middles = torch.minimum(torch.maximum(middles, sizes / 2), sides - sizes / 2)
    transforms = torch.zeros(count, 2, 3)
    transforms[:, 0, 0] = transforms[:, 1, 1] = scales
    transforms[:, 0, 2], transforms[:, 1, 2] = (2 * middles / sides - 1).flip(1).unbind(dim=1)
    height, width = image.shape[1:]
    grid = F.affine_grid(transforms, [count, 3, height, width], align_corners=False)
    crops = F.grid_sample(
        alone.expand(count, -1, -1, -1), grid, mode="bicubic", padding_mode="border", align_corners=False
    ).clamp(0, 1)
    shares = F.grid_sample(mask.float().expand(count, 1, -1, -1), grid, align_corners=False).squeeze(1)
    highest = shares.amax(dim=(1, 2), keepdim=True)
    return crops, shares >= highest.clamp(max=0.5)
