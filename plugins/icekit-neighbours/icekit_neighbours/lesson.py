"""What the neighbouring learners share beside ``icekit.learning``.

Those that learn one token a concept give it out as the instance. They learn no intrinsic attribute, and have no token
for one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icekit.learning.hints import hinted_token
from icekit.learning.lesson import Lesson
from icekit.learning.prior import kept_prior, prior_loss
from icekit.learning.rows import mean_token
from icekit.learning.training import Losses, Task, Trainer
from icekit.protocols import Attribute, Backbone, Region, token_names
from icekit.randomness import seeded_generator
from icekit_neighbours.settings import Start, WeightsSettings


def instance_name(region: Region) -> str:
    """The name of a concept's one token."""
    return token_names(region, ())["instance"]


def starting_token(
    region: Region, attributes: Sequence[Attribute], backbone: Backbone, start: Start
) -> dict[str, Tensor]:
    """Where a concept's token starts, rows by text encoder: see ``START``."""
    hinted = [hinted_token(region, one, backbone) for one in attributes] if start == "hints" else []
    return mean_token([backbone.word_rows(region.word), *(token for token in hinted if token is not None)])


def instance_tokens(task: Task, backbone: Backbone, start: Start) -> dict[str, dict[str, Tensor]]:
    """The concepts' tokens by name, in the regions' order, and where they start."""
    return {instance_name(region): starting_token(region, task.attributes, backbone, start) for region in task.regions}


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
        shares = torch.rand(total, generator=generator)[list(places)]
        noise = torch.randn((total, *self._backbone.latent_shape), generator=generator)[list(places)]
        prompts = [self.prompts[n] for n in chosen.tolist()]
        loss = prior_loss(self._backbone, self.latents[chosen], prompts, shares.to(device), noise.to(device))
        loss = loss * (len(places) / total)
        return {"prior": loss, "total": self._weight * loss}
