"""What the neighbouring learners share: one call of ``learn``, with what never changes in it.

Those that learn one token a concept give it out as the instance. They learn no intrinsic attribute, and have no token
for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from icekit.builtin.learners.ice import nearest_resolution
from icekit.learning.denoising import Shares, coverage, latent_mask
from icekit.learning.fine_tuning import Tuned, Weights
from icekit.learning.hints import hinted_row
from icekit.learning.prior import PriorSettings, kept_prior, prior_loss
from icekit.learning.training import Losses, Task, Trainer, TrainingSettings
from icekit.protocols import Attribute, Backbone, Learned, Region, token_names
from icekit.randomness import seeded_generator

Start = Literal["noun", "hints"]
START = (
    "noun: a token starts as the row of the region's word (published); hints: as the mean of that and of the rows of "
    "the words that the retriever described the region with, where there are some"
)


class LessonSettings(TrainingSettings):
    """Settings of all learners of this plugin, by which they can be given what another learner is given."""

    timestep_range: Shares = Field(
        (0.0, 1.0), description="share of the noise schedule that steps are drawn from (published: all of it)"
    )
    by_area: bool = Field(
        False, description="divide a concept's denoising loss by its mask's share of the image (published: no)"
    )


class WeightsSettings(LessonSettings, PriorSettings):
    """Settings of those that train the noise predictor's weights too."""

    weights: Weights = Field(
        "lora",
        description="what is trained of the noise predictor: a LoRA adapter on its attention, or all of its weights "
        "(published), which a run then keeps as a model of its own",
    )
    weights_rank: int = Field(4, ge=1, description="rank of the LoRA adapter")


@dataclass(frozen=True)
class Draw:
    """The random choices of one step for n images; tensors on the backbone's device.

    timesteps: int64 ``[n]``, uniform in ``timestep_range``. noise: ``[n, c, h, w]``, Gaussian.
    flipped: int64 ``[n]``, 1 where mirrored.
    templates: indices into the templates.
    """

    timesteps: Tensor
    noise: Tensor
    flipped: Tensor
    templates: list[int]


def instance_name(region: Region) -> str:
    """The name of a concept's one token."""
    return token_names(region, ())["instance"]


def starting_row(region: Region, attributes: Sequence[Attribute], backbone: Backbone, start: Start) -> Tensor:
    """Where a concept's token starts, float32 ``[embedding_dim]``: see ``START``."""
    noun = backbone.word_embedding(region.word).float()
    hinted = [hinted_row(region, one, backbone) for one in attributes] if start == "hints" else []
    return torch.stack([noun, *(row for row in hinted if row is not None)]).mean(dim=0)


def instance_rows(task: Task, backbone: Backbone, start: Start) -> dict[str, Tensor]:
    """The concepts' tokens by name, in the regions' order, and where they start."""
    return {instance_name(region): starting_row(region, task.attributes, backbone, start) for region in task.regions}


class Lesson:
    """One call of a learner: C regions, their tokens' rows, latents and masks, and the draws of each step.

    rows: extra tokens by name, known to the backbone. latents: the image and its mirror image, ``[2, c, h, w]``.
    latent_masks: ``[2, C, h, w]``, 0 or 1.
    """

    def __init__(self, settings: LessonSettings, backbone: Backbone, task: Task, rows: Mapping[str, Tensor]) -> None:
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

    def draw(self, step: int, count: int, purpose: str = "learn") -> Draw:
        """One step's random choices for ``count`` images."""
        generator, device = seeded_generator(self.seed, purpose, step), self.backbone.device
        first, last = (math.ceil(share * self.backbone.num_timesteps) for share in self.settings.timestep_range)
        return Draw(
            timesteps=torch.randint(first, max(last, first + 1), (count,), generator=generator).to(device),
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

    def learned(self, names: Iterable[str], tuned: Tuned | None = None) -> Learned:
        """Hand out the rows of these tokens; tuned: the noise predictor, if it was trained."""
        tokens = {name: self.rows[name].detach().float().cpu().clone() for name in names}
        return tuned.learned(tokens) if tuned else Learned(tokens)


class Prior:
    """Images that the model drew before it was trained; kept in the trainer's checkpoint."""

    def __init__(self, lesson: Lesson, settings: WeightsSettings, trainer: Trainer) -> None:
        self._backbone, self._seed, self._weight = lesson.backbone, lesson.seed, settings.prior_weight
        self.latents, self.prompts = kept_prior(lesson.backbone, settings, lesson.regions, trainer)

    def losses(self, step: int, places: Sequence[int], total: int) -> Losses:
        """The loss at some of a step's ``total`` places, their share of a mean. Empty without prior images."""
        if not len(self.latents):
            return {}
        generator, device = seeded_generator(self._seed, "prior-step", step), self._backbone.device
        chosen = torch.randint(len(self.latents), (total,), generator=generator)[list(places)]
        timesteps = torch.randint(self._backbone.num_timesteps, (total,), generator=generator)[list(places)]
        noise = torch.randn((total, *self._backbone.latent_shape), generator=generator)[list(places)]
        prompts = [self.prompts[n] for n in chosen.tolist()]
        loss = prior_loss(self._backbone, self.latents[chosen], prompts, timesteps.to(device), noise.to(device))
        loss = loss * (len(places) / total)
        return {"prior": loss, "total": self._weight * loss}
