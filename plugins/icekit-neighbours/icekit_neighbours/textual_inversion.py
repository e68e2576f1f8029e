"""Textual Inversion (Gal et al., "An Image is Worth One Word", ICLR 2023): one token a concept, and nothing else."""

from __future__ import annotations

from pydantic import Field

from icekit.learning.training import Group, Task, TaskLearner
from icekit.protocols import Learned
from icekit_neighbours.lesson import START, Lesson, Start, instance_rows
from icekit_neighbours.pictures import PictureBook, PictureSettings


class TextualInversionSettings(PictureSettings):
    """Settings of ``TextualInversionLearner``; the defaults are the published ones."""

    steps: int = Field(5000, ge=1, description="learning steps")
    learning_rate: float = Field(
        5e-4, gt=0, description="AdamW's learning rate for the tokens, constant; it is multiplied by batch_size"
    )
    start: Start = Field("noun", description=START)


class TextualInversionLearner(TaskLearner[TextualInversionSettings]):
    """One token a concept, learned by the denoising loss of the whole picture (Gal et al., eq. 2):

        v* = argmin_v E || eps - eps_theta(z_t, t, c(v)) ||^2

    in prompts of "a photo of a <v>", from the embedding of the region's word on. All concepts are learned together,
    each as if it were alone. The token is the instance: neither a category nor an attribute is learned.
    """

    Settings = TextualInversionSettings
    parts = ("instance",)

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``."""
        settings = self.settings
        rows = instance_rows(task, self.backbone, settings.start)
        lesson = Lesson(settings, self.backbone, task, rows)
        book = PictureBook(lesson, settings)

        lesson.trainer(settings.steps).train(
            "embeddings",
            [Group({name: lesson.rows[name]}, settings.learning_rate * settings.batch_size) for name in rows],
            range(1, settings.steps + 1),
            lambda step: (losses for _, losses in book.losses(step, list(rows))),
            loss_scale=len(task.regions),
        )
        return lesson.learned(rows)
