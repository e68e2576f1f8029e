"""Prior preservation (Ruiz et al., DreamBooth, CVPR 2023): fine-tuned weights must still draw what they drew before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from icekit.learning.settings import PriorSettings
from icekit.learning.training import Trainer
from icekit.pixels import to_tensor
from icekit.protocols import Backbone, Region
from icekit.randomness import seeded_generator


def prior_prompts(
    settings: PriorSettings, regions: Sequence[Region], generator: torch.Generator
) -> tuple[list[str], list[int]]:
    """Prompts and seeds of the prior images. Without a prompt of their own the regions' words take turns, in templates
    that are drawn.
    """
    count, templates = settings.prior_images, settings.templates
    chosen = torch.randint(len(templates), (count,), generator=generator).tolist()
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()
    if settings.prior_prompt is not None:
        return [settings.prior_prompt] * count, seeds
    return [templates[t].replace("{}", regions[n % len(regions)].word) for n, t in enumerate(chosen)], seeds


def draw_prior(
    backbone: Backbone, settings: PriorSettings, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """What the model draws as it is, one image a prompt."""
    return backbone.generate(prompts, seeds=seeds, steps=settings.prior_steps, guidance_scale=settings.prior_guidance)


@torch.no_grad()
def kept_prior(
    backbone: Backbone, settings: PriorSettings, regions: Sequence[Region], trainer: Trainer
) -> tuple[Tensor, list[str]]:
    """Latents ``[N, c, h, w]``, float32, and prompts of the prior images, from the untouched model.

    Templates and noise follow from the trainer's seed; the latents are kept in its checkpoint. To be asked for before
    weights are trained.
    """
    prompts, seeds = prior_prompts(settings, regions, seeded_generator(trainer.seed, "prior"))
    latents = trainer.saved.get("prior")
    if latents is None:
        parts = [torch.empty(0, *backbone.latent_shape, device=backbone.device)]
        for start in range(0, len(prompts), settings.max_batch):
            part = slice(start, start + settings.max_batch)
            images = draw_prior(backbone, settings, prompts[part], seeds[part])
            pixels = torch.stack([to_tensor(image) for image in images]).to(backbone.device)
            parts.append(backbone.encode_images(pixels).float())
        latents = torch.cat(parts)
    trainer.kept["prior"] = latents
    return latents.to(backbone.device), prompts


def prior_loss(backbone: Backbone, latents: Tensor, prompts: Sequence[str], shares: Tensor, noise: Tensor) -> Tensor:
    """The denoising loss on prior images ``[B, c, h, w]`` of these prompts: a scalar, the mean over everything.

    shares: how noisy, float ``[B]`` in [0, 1].

    Gradients flow to the noise predictor alone: what is preserved has no token that is learned.
    """
    noisy = backbone.add_noise(latents, noise, shares)
    with torch.no_grad():
        conditioning = backbone.encode_prompts(prompts)
    prediction = backbone.predict(noisy, shares, conditioning).output
    target = backbone.training_target(latents, noise, shares)
    return (prediction.float() - target).square().mean()
