"""What a learner is made of. Public: learners of plugins are built on it, as ICE is.

A learner is a ``TaskLearner`` with settings that are a ``LessonSettings``. Its ``teach`` makes a ``Lesson``, which
looks at the picture once and draws each step's noise, and lets the lesson's ``Trainer`` run its losses, phase by phase:
with AdamW, clipping and a checkpoint from which a killed run goes on bit for bit::

    class MyLesson(Lesson):
        def losses(self, step: int) -> Iterator[Losses]:
            draw = self.draw(step)
            for chunk in self.chunks(len(self.regions)):
                latents, masks, _ = self.shown(chunk, draw[chunk])
                prompts = [f"a photo of {instance}" for instance in ...]
                prediction, target = self.denoise(latents, draw[chunk], prompts)
                loss = self.masked_loss(prediction, target, masks).mean() * len(chunk) / len(self.regions)
                yield {"reconstruction": loss, "total": loss}

    class MyLearner(TaskLearner[MySettings]):
        Settings = MySettings
        parts = ("instance",)

        def teach(self, task: Task) -> Learned:
            lesson = MyLesson(self.settings, self.backbone, task, tokens)
            groups, steps = [Group(flat(lesson.tokens), self.settings.learning_rate)], self.settings.steps
            lesson.trainer(steps).train("tokens", groups, range(1, steps + 1), lesson.losses)
            return lesson.learned()

Losses: ``denoising`` (masked, by area), ``wasserstein`` (attention to mask), ``triplet`` (ICE's two), ``prior``
(preservation while weights are trained). Where tokens start: ``hints`` (what the retriever saw), ``word_posterior``
(words weighed by the denoising loss). What they see: ``close_ups``. Their rows, one for each text encoder: ``rows``.
"""

from icekit.learning.close_ups import close_ups
from icekit.learning.denoising import Shares, draw_shares, masked_denoising_loss, offset_noise, share_density
from icekit.learning.hints import described_token, hinted_token
from icekit.learning.lesson import Draw, Lesson, LessonSettings, Pictures
from icekit.learning.prior import PriorSettings, kept_prior, prior_loss
from icekit.learning.rows import assign, finished, flat, mean_token, parameters, weighted_sum
from icekit.learning.templates import PHOTO_TEMPLATES, Templates
from icekit.learning.training import Group, Losses, Task, TaskLearner, Trainer, TrainingSettings
from icekit.learning.triplet import intrinsic_triplet, object_triplet
from icekit.learning.wasserstein import wasserstein_distance
from icekit.learning.word_posterior import Mixture, WordPosterior, signal_to_noise

__all__ = [
    "PHOTO_TEMPLATES",
    "Draw",
    "Group",
    "Lesson",
    "LessonSettings",
    "Losses",
    "Mixture",
    "Pictures",
    "PriorSettings",
    "Shares",
    "Task",
    "TaskLearner",
    "Templates",
    "Trainer",
    "TrainingSettings",
    "WordPosterior",
    "assign",
    "close_ups",
    "described_token",
    "draw_shares",
    "finished",
    "flat",
    "hinted_token",
    "intrinsic_triplet",
    "kept_prior",
    "masked_denoising_loss",
    "mean_token",
    "object_triplet",
    "offset_noise",
    "parameters",
    "prior_loss",
    "share_density",
    "signal_to_noise",
    "wasserstein_distance",
    "weighted_sum",
]
