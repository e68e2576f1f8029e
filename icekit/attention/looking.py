"""Looking at a picture with the model: its noise is predicted under a prompt, and its attention read off meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icekit.model_files import check_finite
from icekit.protocols import NO_TOKENS, Attention, Backbone, InputError, Look, Tokens


@torch.no_grad()
def look_at(
    backbone: Backbone,
    image: Tensor,
    prompt: str,
    look: Look,
    *,
    shares: Sequence[float],
    generator: torch.Generator,
    noise: bool = True,
    draws: int = 1,
    tokens: Tokens = NO_TOKENS,
) -> Attention:
    """The attention at one picture under one prompt, mean over shares of the schedule and draws of the noise.

    Args:
        backbone: the model.
        image: float32 ``[3, H, W]`` in [0, 1], the backbone's image size.
        prompt: plain words and extra tokens.
        look: which grids are wanted; the backbone's nearest are taken, each once, the finest first.
        shares: how noisy, shares of the noise schedule in [0, 1], at least one.
        generator: makes the noise, on the CPU: a fresh draw for each share and draw, in that order. Without noise it is
            not used.
        noise: make the picture as noisy as each share says; otherwise its latent is clean, and the model is only told
            that it is that noisy.
        draws: of the noise, for each share; with noise only.
        tokens: the extra tokens.

    Returns:
        float32 on the CPU: ``words`` a ``[L, h, w]`` and ``pixels`` a ``[h, w, h, w]`` for each grid.

    Raises:
        InputError: see ``Backbone.encode_prompts``; attention is asked for that the model's family does not have.
        RunError: it is NaN or infinite.
    """
    conditioning = backbone.encode_prompts([prompt], tokens)
    latents = backbone.encode_images(image[None].to(backbone.device))
    passes = [share for share in shares for _ in range(draws if noise else 1)]
    words: list[Tensor] = []
    pixels: list[Tensor] = []
    for share in passes:
        noisy, at = latents, torch.tensor([share], device=backbone.device)
        if noise:
            drawn = torch.randn(latents.shape, generator=generator).to(latents)
            noisy = backbone.add_noise(latents, drawn, at)
        seen = backbone.predict(noisy, at, conditioning, look).attention
        words = _added(words, seen.words)
        pixels = _added(pixels, seen.pixels)
    for maps in (*words, *pixels):
        check_finite(maps, "backbone's attention", "the model is damaged, or its number format too narrow")
    return Attention(
        words=tuple(total / len(passes) for total in words), pixels=tuple(total / len(passes) for total in pixels)
    )


def _added(totals: list[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
    """What one more pass has seen, ``[1, ...]`` a grid, added to the sums so far, if there are any."""
    maps = [one[0].float().cpu() for one in seen]
    return [total + one for total, one in zip(totals, maps, strict=True)] if totals else maps


def require_similarity(backbone: Backbone) -> None:
    """Refuse, for a segmentor, a backbone that does not tell where words are looked for, or what places look at.

    Raises:
        InputError: it has none.
    """
    if not backbone.word_grids or not backbone.pixel_grids:
        what = "where the words of a prompt are" if not backbone.word_grids else "which places look at one another"
        raise InputError(
            f"this segmentor needs a model whose attention tells {what}, and this backbone's does not: choose another "
            "backbone, or another segmentor, such as masks"
        )
