"""Where a diffusion model looks when it sees a picture, as ConceptExpress reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icekit.attention import aggregate, look_at, upsample
from icekit.protocols import Backbone, Look
from icekit.randomness import seeded_generator
from icekit_neighbours.settings import GRIDS


def look(
    backbone: Backbone,
    image: Tensor,
    caption: str,
    grids: Sequence[int] = GRIDS,
    *,
    shares: Sequence[float] = (0.0,),
    noise: bool = False,
    draws: int = 1,
    noise_seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention at the picture, all grids in one; float32 on the CPU.

    Args:
        backbone: the model.
        image: float32 ``[3, H, W]`` in [0, 1].
        caption: the prompt.
        grids: cells along the picture's shorter side; the model's nearest are taken and brought to the finest, as
            DiffSeg does: the finer, the more a grid counts for what places look at.
        shares: how noisy, shares of the noise schedule; several are averaged.
        noise: add that much noise; otherwise the latent is clean, and only the model is told that it is noisy.
        draws: of the noise, for each share.
        noise_seed: of the noise.

    Returns:
        pixels: ``[h, w, h, w]``, what each place (the first pair) looks at; sums over the last pair are one.
        words: ``[L, h, w]`` over the prompt's positions.

    Raises:
        InputError: see ``look_at``.
    """
    attention = look_at(
        backbone,
        image,
        caption,
        Look(words=tuple(grids), pixels=tuple(grids)),
        shares=shares,
        noise=noise,
        draws=draws,
        generator=seeded_generator(noise_seed, "look"),
    )
    pixels = aggregate(attention.pixels)
    finest = (pixels.shape[0], pixels.shape[1])
    return pixels, torch.stack([upsample(maps, finest) for maps in attention.words]).mean(dim=0)


def mean_self_attention(pixels: Tensor, masks: Tensor) -> Tensor:
    """What the places of a mask look at, on average: a cluster's map, where the mask is the cluster.

    Args:
        pixels: ``[h, w, h, w]``, what each place (the first pair) looks at; sums over the last pair are one.
        masks: ``[C, h, w]``, 0 or 1, none of them empty.

    Returns:
        ``[C, h, w]``, each map sums to one.
    """
    weights = masks.float()
    return torch.einsum("cij,ijkl->ckl", weights, pixels) / weights.sum(dim=(1, 2))[:, None, None]
