"""Textual Inversion (Gal et al., "An Image is Worth One Word", ICLR 2023): one token a concept, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pydantic import Field
from torch import Tensor

from icekit.builtin.training import Group, Losses
from icekit.protocols import (
    Attribute,
    Backbone,
    Checkpoint,
    Learned,
    Region,
    Step,
    token_names,
)
from icekit_neighbours.lesson import Lesson
from icekit_neighbours.pictures import PictureBook, PictureSettings


class TextualInversionSettings(PictureSettings):
    """Settings of ``TextualInversionLearner``; the defaults are the published ones."""

    steps: int = Field(5000, ge=1, description="learning steps")
    learning_rate: float = Field(
        5e-4, gt=0, description="AdamW's learning rate for the tokens, constant; it is multiplied by batch_size"
    )


class TextualInversionLearner:
    """One token a concept, learned by the denoising loss of the whole picture (Gal et al., eq. 2):

        v* = argmin_v E || eps - eps_theta(z_t, t, c(v)) ||^2

    in prompts of "a photo of a <v>", from the embedding of the region's word on. All concepts are learned together,
    each as if it were alone. The row stands for the category, the instance and all attributes: it learns no attribute.
    """

    Settings = TextualInversionSettings

    def __init__(self, settings: TextualInversionSettings, backbone: Backbone) -> None:
        self.settings = settings
        self.backbone = backbone

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Learn the tokens of all regions: image ``[3, H, W]`` in [0, 1], see ``protocols.Learner``.

        Raises:
            InputError: an empty mask, or a saved state of another run.
            RunError: the loss became NaN or infinite.
        """
        if not regions:
            return Learned({})
        settings = self.settings
        names = [token_names(region, ())["category"] for region in regions]
        rows = {name: self.backbone.word_embedding(region.word) for name, region in zip(names, regions, strict=True)}
        lesson = Lesson(settings, self.backbone, image, regions, rows, seed)
        book = PictureBook(lesson, settings, image)

        def losses(step: int) -> Iterator[Losses]:
            count = len(book.concepts)
            draw = lesson.draw(step, count)
            pictures = book.open(step, draw.flipped)
            for places in lesson.chunks(count):
                prompts = [lesson.prompt(draw.templates[place], names[book.concepts[place]]) for place in places]
                prediction, target = lesson.denoise(pictures[places], draw, places, prompts)
                loss = (prediction - target).square().mean() * (len(places) / count)
                yield {"reconstruction": loss, "total": loss}

        lesson.trainer(settings.steps, checkpoint, on_step).train(
            "embeddings",
            [Group({name: lesson.rows[name]}, settings.learning_rate * settings.batch_size) for name in names],
            range(1, settings.steps + 1),
            losses,
            loss_scale=len(regions),
        )
        return lesson.learned(attributes, [lesson.rows[name] for name in names])
