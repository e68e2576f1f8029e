"""Where a diffusion model looks when it sees an image: self- and cross-attention, for ConceptExpress."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icekit.attention.segmentor import upsample
from icekit.builtin.segmentors.diffseg import aggregate
from icekit.protocols import Backbone


@torch.no_grad()
def look(
    backbone: Backbone,
    image: Tensor,
    caption: str,
    *,
    resolutions: Sequence[int],
    timestep: Sequence[float] = (0.0,),
    noise: bool = False,
    draws: int = 1,
    noise_seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention at the image, mean over timesteps and draws of the noise; float32 on the CPU.

    Args:
        backbone: the model.
        image: float32 ``[3, H, W]`` in [0, 1].
        caption: the prompt.
        resolutions: grids; all are brought to the largest, R, as DiffSeg does: the larger, the more a grid counts.
        timestep: shares of the noise schedule at which the model is asked.
        noise: add that timestep's noise; otherwise the latent is clean, and only the model is told the timestep.
        draws: of the noise.
        noise_seed: of the noise.

    Returns:
        self_attention: ``[R * R, R * R]``, each row sums to one.
        cross_attention: ``[L, R, R]`` over the prompt's positions.
    """
    side, generator = max(resolutions), torch.Generator().manual_seed(noise_seed)
    conditioning = backbone.encode_prompts([caption])
    latents = backbone.encode_images(image[None].to(backbone.device))
    self_attention = torch.zeros(side**2, side**2)
    crosses: list[Tensor] = []
    passes = [share for share in timestep for _ in range(draws if noise else 1)]
    with backbone.capture_attention(cross=tuple(resolutions), self_=tuple(resolutions)) as maps:
        for share in passes:
            step = min(round(share * backbone.num_timesteps), backbone.num_timesteps - 1)
            timesteps = torch.tensor([step], device=backbone.device)
            seen = latents
            if noise:
                drawn = torch.randn(latents.shape, generator=generator).to(latents)
                seen = backbone.add_noise(latents, drawn, timesteps)
            backbone.predict(seen, timesteps, conditioning)
            self_attention += aggregate({r: maps.self_(r)[0].float().cpu() for r in resolutions})
            crosses += [upsample(maps.cross(r)[0].float().cpu(), (side, side)) for r in resolutions]
    return self_attention / len(passes), torch.stack(crosses).mean(dim=0)


def mean_self_attention(self_attention: Tensor, masks: Tensor) -> Tensor:
    """What the places of a mask attend to, on average: a cluster's map, where the mask is the cluster.

    Args:
        self_attention: ``[R * R, R * R]``, each row (one place) sums to one.
        masks: ``[C, R, R]``, 0 or 1, none of them empty.

    Returns:
        ``[C, R, R]``, each map sums to one.
    """
    weights = masks.flatten(1).float()
    return (weights @ self_attention / weights.sum(dim=1, keepdim=True)).unflatten(1, masks.shape[1:])
