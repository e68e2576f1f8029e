"""Prior preservation (Ruiz et al., DreamBooth, CVPR 2023): fine-tuned weights must still draw what they drew before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icekit.builtin.pixels import to_tensor
from icekit.builtin.training import Trainer, step_generator
from icekit.protocols import Backbone, Region


@torch.no_grad()
def prior_latents(backbone: Backbone, prompts: Sequence[str], seeds: Sequence[int], at_once: int) -> Tensor:
    """Latents ``[N, c, h, w]``, float32, of what the model draws as it is: one image a prompt, ``at_once`` together."""
    latents = [torch.empty(0, *backbone.latent_shape, device=backbone.device)]
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        images = backbone.generate(prompts[part], seeds=seeds[part])
        pixels = torch.stack([to_tensor(image) for image in images]).to(backbone.device)
        latents.append(backbone.encode_images(pixels).float())
    return torch.cat(latents)


def kept_prior(
    backbone: Backbone, regions: Sequence[Region], templates: Sequence[str], count: int, at_once: int, trainer: Trainer
) -> tuple[Tensor, list[str]]:
    """Latents ``[count, c, h, w]`` and prompts of images of the regions' plain words, from the untouched model.

    The words take turns, templates and noise follow from the trainer's seed; the latents are kept in its checkpoint.
    """
    generator = step_generator(trainer.seed, "prior")
    chosen = torch.randint(len(templates), (count,), generator=generator).tolist()
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()
    prompts = [templates[t].replace("{}", regions[n % len(regions)].word) for n, t in enumerate(chosen)]
    latents = trainer.saved.get("prior")
    if latents is None:
        latents = prior_latents(backbone, prompts, seeds, at_once)
    trainer.kept["prior"] = latents
    return latents.to(backbone.device), prompts


def prior_loss(backbone: Backbone, latents: Tensor, prompts: Sequence[str], timesteps: Tensor, noise: Tensor) -> Tensor:
    """The denoising loss on prior images ``[B, c, h, w]`` of these prompts: a scalar, the mean over everything."""
    noisy = backbone.add_noise(latents, noise, timesteps)
    prediction = backbone.predict(noisy, timesteps, backbone.encode_prompts(prompts))
    target = backbone.training_target(latents, noise, timesteps)
    return (prediction.float() - target).square().mean()
