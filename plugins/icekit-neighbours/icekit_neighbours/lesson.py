"""What the neighbouring learners share: one call of ``learn``, with what never changes in it.

None of them learns an intrinsic attribute. icekit asks every learner for a category, an instance and a token for each
attribute; they hand out the row of their one token for all of these, so that a comparison shows what it should: that
nothing intrinsic was learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from icekit.builtin.denoising import coverage, latent_mask
from icekit.builtin.ice import nearest_resolution
from icekit.builtin.prior import kept_prior, prior_loss
from icekit.builtin.training import Losses, Task, Trainer, TrainingSettings, step_generator
from icekit.protocols import Backbone, Learned, Region, token_names


class WeightsSettings(TrainingSettings):
    """Settings of those that train the noise predictor's weights too, as a LoRA adapter."""

    weights_rank: int = Field(4, ge=1, description="rank of the LoRA adapter, which stands for the weights themselves")
    prior_images: int = Field(64, ge=0, description="images generated to preserve the prior; DreamBooth's paper: 1000")
    prior_weight: float = Field(1.0, ge=0, description="weight of the prior-preservation loss")


@dataclass(frozen=True)
class Draw:
    """The random choices of one step for n images; tensors on the backbone's device.

    timesteps: int64 ``[n]``, uniform. noise: ``[n, c, h, w]``, Gaussian. flipped: int64 ``[n]``, 1 where mirrored.
    templates: indices into the templates.
    """

    timesteps: Tensor
    noise: Tensor
    flipped: Tensor
    templates: list[int]


def word_rows(regions: Sequence[Region], backbone: Backbone) -> dict[str, Tensor]:
    """The category tokens' names, in the regions' order, and where they start: their words' rows."""
    return {token_names(region, ())["category"]: backbone.word_embedding(region.word) for region in regions}


class Lesson:
    """One call of a learner: C regions, their tokens' rows, latents and masks, and the draws of each step.

    rows: extra tokens by name, known to the backbone. latents: the image and its mirror image, ``[2, c, h, w]``.
    latent_masks: ``[2, C, h, w]``, 0 or 1.
    """

    def __init__(self, settings: TrainingSettings, backbone: Backbone, task: Task, rows: Mapping[str, Tensor]) -> None:
        """Look at everything once."""
        self.settings, self.backbone, self.task = settings, backbone, task
        image, regions = task.image, task.regions
        self.regions, self.seed = regions, task.seed
        masks = torch.stack([region.mask for region in regions]).to(backbone.device)
        self.masks = torch.stack([masks, masks.flip(-1)])
        self.latent_masks = torch.stack([latent_mask(side, backbone.latent_shape[1:]) for side in self.masks])
        with torch.no_grad():
            self.latents = backbone.encode_images(torch.stack([image, image.flip(-1)]).to(backbone.device)).float()
        self.rows = {
            name: nn.Parameter(row.detach().to(backbone.device, torch.float32).clone(), requires_grad=False)
            for name, row in rows.items()
        }
        backbone.set_tokens(self.rows)
        self._positions: dict[tuple[str, str], list[int]] = {}

    def trainer(self, total: int) -> Trainer:
        """The training loop, standing where the checkpoint stands; the rows are restored from it."""
        return Trainer(self.rows, self.settings, self.task, total)

    def attention_grid(self, side: int | None) -> tuple[int, Tensor]:
        """The grid of an attention loss, ``side`` or the model's nearest to 16, and how much of its cells the masks
        cover: ``[2, C, r, r]``.
        """
        side = side or nearest_resolution(self.backbone.attention_resolutions)
        return side, torch.stack([coverage(masks, side) for masks in self.masks])

    def draw(self, step: int, count: int) -> Draw:
        """One step's random choices for ``count`` images."""
        generator, device = step_generator(self.seed, "learn", step), self.backbone.device
        return Draw(
            timesteps=torch.randint(self.backbone.num_timesteps, (count,), generator=generator).to(device),
            noise=torch.randn((count, *self.backbone.latent_shape), generator=generator).to(device),
            flipped=(torch.rand(count, generator=generator) < self.settings.flip_probability).long().to(device),
            templates=torch.randint(len(self.settings.templates), (count,), generator=generator).tolist(),
        )

    def denoise(
        self, latents: Tensor, draw: Draw, places: Sequence[int], prompts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """The noise predictor's output for latents ``[B, c, h, w]`` and what it should be, with these places' noise."""
        timesteps, noise = draw.timesteps[list(places)], draw.noise[list(places)]
        noisy = self.backbone.add_noise(latents, noise, timesteps)
        prediction = self.backbone.predict(noisy, timesteps, self.backbone.encode_prompts(prompts))
        return prediction.float(), self.backbone.training_target(latents, noise, timesteps)

    def prompt(self, template: int, tokens: str) -> str:
        """A template with the tokens in it."""
        return self.settings.templates[template].replace("{}", tokens)

    def attention(self, cross: Tensor, prompt: str, token: str) -> Tensor:
        """One token's map of one prompt's cross-attention ``[L, r, r]``: ``[r, r]``, mean over its positions."""
        if (prompt, token) not in self._positions:
            [self._positions[prompt, token]] = self.backbone.token_positions(prompt, [token])
        return cross[self._positions[prompt, token]].mean(dim=0)

    def chunks(self, count: int) -> list[list[int]]:
        """The places 0 to ``count`` - 1, at most ``max_batch`` together."""
        size = self.settings.max_batch
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]

    def learned(
        self,
        rows: Sequence[Tensor],
        categories: Sequence[Tensor] | None = None,
        lora: Mapping[str, Tensor] | None = None,
    ) -> Learned:
        """Hand out each region's row under all of its names.

        rows: one ``[embedding_dim]`` for each region.
        categories: for the categories, where these are not the rows too.
        lora: weights of an adapter.
        """
        tokens: dict[str, Tensor] = {}
        for place, region in enumerate(self.regions):
            for kind, name in token_names(region, self.task.attributes).items():
                row = categories[place] if categories is not None and kind == "category" else rows[place]
                tokens[name] = row.detach().float().cpu().clone()
        return Learned(tokens, {key: weight.detach().float().cpu().clone() for key, weight in (lora or {}).items()})


class Prior:
    """Images of the concepts' plain words, from the model before it is trained; kept in the trainer's checkpoint."""

    def __init__(self, lesson: Lesson, settings: WeightsSettings, trainer: Trainer) -> None:
        self._backbone, self._seed, self._weight = lesson.backbone, lesson.seed, settings.prior_weight
        self.latents, self.prompts = kept_prior(
            lesson.backbone, lesson.regions, settings.templates, settings.prior_images, settings.max_batch, trainer
        )

    def losses(self, step: int, places: Sequence[int], total: int) -> Losses:
        """The loss at some of a step's ``total`` places, their share of a mean. Empty without prior images."""
        if not len(self.latents):
            return {}
        generator, device = step_generator(self._seed, "prior-step", step), self._backbone.device
        chosen = torch.randint(len(self.latents), (total,), generator=generator)[list(places)]
        timesteps = torch.randint(self._backbone.num_timesteps, (total,), generator=generator)[list(places)]
        noise = torch.randn((total, *self._backbone.latent_shape), generator=generator)[list(places)]
        prompts = [self.prompts[n] for n in chosen.tolist()]
        loss = prior_loss(self._backbone, self.latents[chosen], prompts, timesteps.to(device), noise.to(device))
        loss = loss * (len(places) / total)
        return {"prior": loss, "total": self._weight * loss}
