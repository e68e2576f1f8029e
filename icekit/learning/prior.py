"""Prior preservation (Ruiz et al., DreamBooth, CVPR 2023): fine-tuned weights must still draw what they drew before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

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
        latents = _latest.of(backbone, settings, prompts, seeds)
    trainer.kept["prior"] = latents
    return latents.to(backbone.device), prompts


def _prior_latents(backbone: Backbone, settings: PriorSettings, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    parts = [torch.empty(0, *backbone.latent_shape, device=backbone.device)]
    for start in range(0, len(prompts), settings.max_batch):
        part = slice(start, start + settings.max_batch)
        images = draw_prior(backbone, settings, prompts[part], seeds[part])
        pixels = torch.stack([to_tensor(image) for image in images]).to(backbone.device)
        parts.append(backbone.encode_images(pixels).float())
    return torch.cat(parts)


class _Latest:
    """The prior images that were drawn last: the runs of a bench that have one prompt share them, and one seed.

    Their latents wait on the CPU, and not longer than their backbone lives.
    """

    def __init__(self) -> None:
        self._backbone: Callable[[], object] = lambda: None
        self._how: object = None
        self._latents: Tensor | None = None

    def of(self, backbone: Backbone, settings: PriorSettings, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Latents ``[N, c, h, w]``, drawn now unless the same ones were drawn last."""
        how = (list(prompts), list(seeds), settings.prior_steps, settings.prior_guidance, settings.max_batch)
        if self._latents is None or self._backbone() is not backbone or self._how != how:
            latents = _prior_latents(backbone, settings, prompts, seeds)
            self._how, self._latents = how, latents.cpu()
            self._backbone = weakref.ref(backbone, lambda gone: self._forget(gone))
        return self._latents.to(backbone.device)

    def _forget(self, gone: Callable[[], object]) -> None:
        if gone is self._backbone:
            self._latents = None


_latest = _Latest()


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
