"""DreamBooth (Ruiz et al., CVPR 2023): a rare word bound to an object by training the weights, the prior preserved."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from icekit.learning.hints import described_token
from icekit.learning.lesson import Lesson
from icekit.learning.training import Group, Losses, Task, TaskLearner
from icekit.protocols import Capability, InputError, Learned, Trained, token_names
from icekit_neighbours.lesson import Prior
from icekit_neighbours.pictures import PictureBook
from icekit_neighbours.settings import DreamBoothSettings

WEIGHTS_LEARNING_RATES: dict[Trained, float] = {"lora": 1e-4, "all": 5e-6}
"""AdamW's learning rate of the weights by what is trained, where none is set."""


class DreamBoothLearner(TaskLearner[DreamBoothSettings]):
    """The noise predictor learns to draw the object at "a photo of a [V] class", [V] a rare word of its own (eq. 2):

        L = || target - model(z_t, "[V] class") ||^2 + prior_weight * || target - model(z_pr, "class") ||^2

    z_pr are images that the untouched model drew of the class, the region's word. No embedding is trained. The instance
    token is the rare word's row, the category token the class noun's; no attribute is learned. One model is trained for
    all concepts: by a LoRA adapter, or with ``weights = "all"`` as published.
    """

    Settings = DreamBoothSettings
    parts = ("category", "instance")
    needs: tuple[Capability, ...] = ("fine_tuning",)

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
        tokens: dict[str, dict[str, Tensor]] = {}
        phrases = []
        names_of = [token_names(region, ()) for region in regions]
        for region, names, identifier in zip(regions, names_of, settings.identifiers, strict=False):
            described = described_token(region, task.attributes, self.backbone) if settings.start == "hints" else None
            tokens[names["instance"]] = self.backbone.word_rows(identifier) if described is None else described
            tokens[names["category"]] = self.backbone.word_rows(region.word)
            phrases.append(f"{names['instance']} {names['category']}")
        lesson = Lesson(settings, self.backbone, task, tokens)
        trainer = lesson.trainer(settings.steps)
        book, prior = PictureBook(lesson, settings), Prior(lesson, settings, trainer)

        def losses(step: int) -> Iterator[Losses]:
            for places, reconstruction in book.losses(step, phrases):
                yield reconstruction
                if preserved := prior.losses(step, places, len(book.concepts)):
                    yield preserved

        rate = settings.weights_learning_rate or WEIGHTS_LEARNING_RATES[settings.weights]
        with trainer.fine_tuned(self.backbone, settings.weights, settings.weights_rank) as tuned:
            trainer.train(
                "weights",
                [Group(tuned.parameters, rate, "weights_learning_rate")],
                range(1, settings.steps + 1),
                losses,
            )
            return lesson.learned(tuning=tuned.kept())
