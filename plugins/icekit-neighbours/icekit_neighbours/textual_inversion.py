"""Textual Inversion (Gal et al., "An Image is Worth One Word", ICLR 2023): one token a concept, and nothing else."""

from __future__ import annotations

from icekit.learning.lesson import Lesson
from icekit.learning.rows import flat
from icekit.learning.training import Group, Task, TaskLearner
from icekit.protocols import Learned
from icekit_neighbours.lesson import instance_tokens
from icekit_neighbours.pictures import PictureBook
from icekit_neighbours.settings import TextualInversionSettings


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
        tokens = instance_tokens(task, self.backbone, settings.start)
        lesson = Lesson(settings, self.backbone, task, tokens)
        book = PictureBook(lesson, settings)

        lesson.trainer(settings.steps).train(
            "embeddings",
            [Group(flat(lesson.tokens, [name]), settings.learning_rate * settings.batch_size) for name in tokens],
            range(1, settings.steps + 1),
            lambda step: (losses for _, losses in book.losses(step, list(tokens))),
            loss_scale=len(task.regions),
        )
        return lesson.learned()
