"""Break-A-Scene (Avrahami et al., SIGGRAPH Asia 2023): all concepts of a scene from one image and a mask for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icekit.learning.lesson import Draw, Lesson
from icekit.learning.rows import flat
from icekit.learning.training import Group, Losses, Task, TaskLearner
from icekit.protocols import Backbone, Capability, Learned, Tokens, Trained
from icekit.randomness import seeded_generator
from icekit_neighbours.lesson import Prior, instance_tokens
from icekit_neighbours.settings import BreakASceneSettings

WEIGHTS_LEARNING_RATES: dict[Trained, float] = {"lora": 1e-4, "all": 2e-6}
"""AdamW's learning rate of the weights by what is trained, where none is set."""


def union_sample(count: int, generator: torch.Generator) -> list[int]:
    """A random subset of ``count`` concepts in random order: its size uniform in 1 to ``count``, its members too."""
    size = int(torch.randint(1, count + 1, (), generator=generator))
    chosen: list[int] = torch.randperm(count, generator=generator)[:size].tolist()
    return chosen


def union(masks: Tensor) -> Tensor:
    """The union of masks of 0 and 1: ``[n, h, w]`` -> ``[h, w]``."""
    return masks.amax(dim=0)


def attention_loss(attention: Tensor, masks: Tensor) -> Tensor:
    """The cross-attention loss (eq. 3): (CA(v_i) - M_i)^2, mean over the grid's cells, summed over the tokens.

    Each map is divided by its maximum: a softmax over a whole prompt never comes near the 1 that a mask asks for.

    Args:
        attention: CA, float ``[n, r, r]``, at least zero, one map a token.
        masks: M, ``[n, r, r]`` in [0, 1], how much of each cell the mask covers.

    Returns:
        A scalar, at least zero.
    """
    highest = attention.amax(dim=(1, 2), keepdim=True)
    return (attention / highest - masks).square().mean(dim=(1, 2)).sum()


class BreakASceneLearner(TaskLearner[BreakASceneSettings]):
    """One token a concept, learned from random subsets of the concepts ("union sampling"), then the weights as well.

        L = || M_s (eps - eps_theta(z_t, t, "a photo of v_i and v_j")) ||^2 + attention_weight * L_attention

    with M_s the union of the subset's masks. Phase "embeddings", the first half of the steps, learns the tokens; phase
    "weights" goes on with them and the noise predictor together, with prior preservation: by a LoRA adapter, or with
    ``weights = "all"`` as published. The text encoder stays as it is. A concept's token is its instance: neither a
    category nor an attribute is learned.
    """

    Settings = BreakASceneSettings
    parts = ("instance",)
    needs: tuple[Capability, ...] = ("attention", "fine_tuning")

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``.

        Raises:
            InputError: concepts that do not fit into one prompt.
        """
        settings = self.settings
        tokens = instance_tokens(task, self.backbone, settings.start)
        names = list(tokens)
        scene = Scene(settings, self.backbone, task, tokens)
        trainer = scene.trainer(settings.steps)
        half = (settings.steps + 1) // 2
        # The prior is the untouched model's, so its images are made before there is an adapter.
        prior = Prior(scene, settings, trainer)

        trainer.train(
            "embeddings",
            [Group(flat(scene.tokens), settings.learning_rate)],
            range(1, half + 1),
            lambda step: scene.losses(step, names),
        )
        rate = settings.weights_learning_rate or WEIGHTS_LEARNING_RATES[settings.weights]
        with trainer.fine_tuned(self.backbone, settings.weights, settings.weights_rank) as tuned:
            trainer.train(
                "weights",
                [
                    Group(flat(scene.tokens), settings.tuning_learning_rate, "tuning_learning_rate"),
                    Group(tuned.parameters, rate, "weights_learning_rate"),
                ],
                range(half + 1, settings.steps + 1),
                lambda step: scene.losses(step, names, prior),
            )
            return scene.learned(tuning=tuned.kept())


class Scene(Lesson):
    """A lesson in all concepts of the image at once."""

    settings: BreakASceneSettings

    def __init__(self, settings: BreakASceneSettings, backbone: Backbone, task: Task, tokens: Tokens) -> None:
        super().__init__(settings, backbone, task, tokens)
        self.check_fits([" and ".join(tokens)], "all concepts must fit into one prompt")  # before a step is made

    def losses(self, step: int, names: Sequence[str], prior: Prior | None = None) -> Iterator[Losses]:
        """One step's losses, chunk by chunk."""
        count, generator = self.settings.batch_size, seeded_generator(self.seed, "union", step)
        draw = self.draw(step, count)
        subsets = [union_sample(len(names), generator) for _ in range(count)]
        for places in self.chunks(count):
            losses = self._chunk(draw[places], [subsets[place] for place in places], names)
            yield {name: loss * (len(places) / count) for name, loss in losses.items()}
            if prior is not None and (preserved := prior.losses(step, places, count)):
                yield preserved

    def _chunk(self, draw: Draw, subsets: list[list[int]], names: Sequence[str]) -> Losses:
        prompts = [
            self.prompt(template, " and ".join(names[i] for i in subset))
            for template, subset in zip(draw.templates, subsets, strict=True)
        ]
        sides = draw.flipped.tolist()
        latents = torch.stack([self.pictures.latents[0, 0, side] for side in sides])
        prediction, target = self.denoise(latents, draw, prompts, look=self.look)
        pairs = list(zip(subsets, sides, strict=True))
        masks = torch.stack([union(self.pictures.masks[subset, 0, side]) for subset, side in pairs])
        reconstruction = self.masked_loss(prediction, target, masks).mean()
        words = prediction.attention.words[0].float()
        attention = torch.stack(
            [
                attention_loss(
                    torch.stack([self.attention(words[n], prompts[n], [names[i]]) for i in subset]),
                    self.pictures.attention_masks[subset, 0, side],
                )
                for n, (subset, side) in enumerate(pairs)
            ]
        ).mean()
        total = reconstruction + self.settings.attention_weight * attention
        return {"reconstruction": reconstruction, "attention": attention, "total": total}
