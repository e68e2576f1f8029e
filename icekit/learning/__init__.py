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

import lazy_loader

# What there is to import is in __init__.pyi; each name is imported when it is first used, for torch takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
