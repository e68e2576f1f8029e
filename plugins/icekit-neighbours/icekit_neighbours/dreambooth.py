"""DreamBooth (Ruiz et al., CVPR 2023): a rare word bound to an object by training the weights, the prior preserved."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, field_validator
from torch import Tensor

from icekit.builtin.training import Group, Losses, Task, TaskLearner
from icekit.protocols import InputError, Learned, token_names
from icekit_neighbours.lesson import Lesson, Prior, WeightsSettings
from icekit_neighbours.pictures import PictureBook, PictureSettings


class DreamBoothSettings(PictureSettings, WeightsSettings):
    """Settings of ``DreamBoothLearner``; the defaults are the paper's, or are said to be ours."""

    steps: int = Field(1000, ge=1, description="learning steps")
    weights_learning_rate: float = Field(
        1e-4, gt=0, description="AdamW's learning rate of the LoRA adapter (the paper tunes all weights, at 5e-6)"
    )
    identifiers: tuple[str, ...] = Field(
        ("sks", "ohwx", "zwx", "xjy", "qlk", "vzt", "jqh", "wpd", "kfx", "ybn"),
        min_length=1,
        description="rare words, one for each concept in turn",
    )

    @field_validator("identifiers")
    @classmethod
    def _differ(cls, identifiers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(identifiers)) < len(identifiers) or not all(identifiers):
            raise ValueError("words that differ, none of them empty")
        return identifiers


class DreamBoothLearner(TaskLearner[DreamBoothSettings]):
    """The noise predictor learns to draw the object at "a photo of a [V] class", [V] a rare word of its own (eq. 2):

        L = || target - model(z_t, "[V] class") ||^2 + prior_weight * || target - model(z_pr, "class") ||^2

    z_pr are images that the untouched model drew of the class, the region's word. No embedding is trained. The instance
    token is the rare word's row, the category token the class noun's; [V] stands for all attributes: it learns none.
    The weights are trained as one LoRA adapter for all concepts, which is what a run can keep and diffusers reads.
    """

    Settings = DreamBoothSettings

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``.

        Raises:
            InputError: more concepts than rare words.
        """
        settings, regions = self.settings, task.regions
        if len(regions) > len(settings.identifiers):
            raise InputError(
                f"learner.identifiers: {len(settings.identifiers)} rare words for {len(regions)} concepts;"
                " give one for each"
            )
        rows: dict[str, Tensor] = {}
        phrases = []
        tokens = [token_names(region, ()) for region in regions]
        for region, names, identifier in zip(regions, tokens, settings.identifiers, strict=False):
            rows[names["instance"]] = self.backbone.word_embedding(identifier)
            rows[names["category"]] = self.backbone.word_embedding(region.word)
            phrases.append(f"{names['instance']} {names['category']}")
        lesson = Lesson(settings, self.backbone, task, rows)
        trainer = lesson.trainer(settings.steps)
        book, prior = PictureBook(lesson, settings), Prior(lesson, settings, trainer)

        def losses(step: int) -> Iterator[Losses]:
            for places, reconstruction in book.losses(step, phrases):
                yield reconstruction
                if preserved := prior.losses(step, places, len(book.concepts)):
                    yield preserved

        with trainer.adapter(self.backbone.unet, settings.weights_rank) as weights:
            trainer.train(
                "weights",
                [Group(weights, settings.weights_learning_rate, "weights_learning_rate")],
                range(1, settings.steps + 1),
                losses,
            )
            return lesson.learned(
                [lesson.rows[names["instance"]] for names in tokens],
                [lesson.rows[names["category"]] for names in tokens],
                lora=weights,
            )
