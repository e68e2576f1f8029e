"""Whether a picture is of the world that a small model knows."""

from __future__ import annotations

import torch
from torch import Tensor

from icekit.protocols import Backbone, World

DRAWS = 4
"""Draws of the noise that are averaged."""


@torch.no_grad()
def denoising_error(backbone: Backbone, image: Tensor, share: float, generator: torch.Generator) -> float:
    """How badly a model denoises a picture without a prompt: E_noise mean((predicted - target)^2), ``DRAWS`` draws.

    A model denoises what is like the pictures that it was trained on best; other pictures it takes for noise in part.

    Args:
        backbone: the model.
        image: float32 ``[3, H, W]`` in [0, 1].
        share: of the noise schedule.
        generator: makes the noise.

    Returns:
        At least 0, in the units of what the model predicts (noise and v have a mean square of about 1).
    """
    latents = backbone.encode_images(image[None].to(backbone.device)).expand(DRAWS, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    shares = torch.full((DRAWS,), share, device=latents.device)
    noisy = backbone.add_noise(latents, noise, shares)
    predicted = backbone.predict(noisy, shares, backbone.encode_prompts([""] * DRAWS)).output
    return float((predicted.float() - backbone.training_target(latents, noise, shares).float()).square().mean())


def unlike(name: str, world: World, error: float, source: str) -> str | None:
    """What to say of a picture with this denoising error; None where it is of this world.

    name: the backbone's. source: what the picture is called.
    """
    if error <= world.error:
        return None
    return (
        f"{source} is unlike all that backbone {name!r} knows, which is {world.what}: the words found in it are "
        f"guesses (denoising error {error:.2f}; pictures that it knows have at most {world.error:.2f})"
    )
