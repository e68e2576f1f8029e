"""The pictures of one concept that Textual Inversion and DreamBooth learn from, where there is but one image of many.

Both were made for several images of one object. Break-A-Scene (Avrahami et al., SIGGRAPH Asia 2023) compares itself
with them on small collections made from its one image: each object alone, before a background of one random colour.
That is done here too. With the whole image instead every concept's token would learn the same, the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icekit.learning.lesson import Lesson
from icekit.learning.training import Losses
from icekit.randomness import seeded_generator
from icekit_neighbours.settings import PictureSettings


def alone(image: Tensor, mask: Tensor, colours: Tensor) -> Tensor:
    """An object before plain colours: the image where the mask is, the colour elsewhere.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        mask: bool ``[H, W]``.
        colours: float32 ``[V, 3]`` in [0, 1].

    Returns:
        ``[V, 3, H, W]``.
    """
    return torch.where(mask, image, colours[:, :, None, None])


@torch.no_grad()
def picture_latents(lesson: Lesson, settings: PictureSettings) -> Tensor:
    """Each concept's pictures, plain and mirrored, as latents ``[C, 2, V, c, h, w]``: V backgrounds, or 1 image."""
    if settings.shown == "image":
        return lesson.pictures.latents.transpose(1, 2)
    encoded = []
    for region in lesson.regions:
        generator = seeded_generator(lesson.seed, "backgrounds", region.index)
        colours = torch.rand(settings.backgrounds, 3, generator=generator)
        pictures = alone(lesson.task.image, region.mask, colours)
        latents = lesson.encode(torch.cat([pictures, pictures.flip(-1)]))
        encoded.append(latents.unflatten(0, (2, settings.backgrounds)))
    return torch.stack(encoded)


class PictureBook:
    """A concept's pictures, drawn step by step: ``batch_size`` of each concept, those of one concept side by side."""

    def __init__(self, lesson: Lesson, settings: PictureSettings) -> None:
        self._lesson, self._seed = lesson, lesson.seed
        self._latents = picture_latents(lesson, settings)
        self._by_area = settings.by_area and settings.shown == "alone"
        self.concepts = [concept for concept in range(len(lesson.regions)) for _ in range(settings.batch_size)]
        """The concept at each place of a step."""

    def open(self, step: int, flipped: Tensor) -> Tensor:
        """One step's pictures as latents, ``[n, c, h, w]``; flipped: int64 ``[n]``, 1 where mirrored."""
        generator = seeded_generator(self._seed, "pictures", step)
        shown = torch.randint(self._latents.shape[2], (len(self.concepts),), generator=generator)
        return self._latents[torch.tensor(self.concepts, device=flipped.device), flipped, shown.to(flipped.device)]

    def losses(self, step: int, phrases: Sequence[str]) -> Iterator[tuple[list[int], Losses]]:
        """The denoising loss of the whole pictures (Gal et al., eq. 2), chunk by chunk: the chunk's places, its share.

        phrases: what stands for each concept in a prompt.
        """
        lesson, count = self._lesson, len(self.concepts)
        draw = lesson.draw(step, count)
        pictures = self.open(step, draw.flipped)
        for places in lesson.chunks(count):
            prompts = [lesson.prompt(draw.templates[place], phrases[self.concepts[place]]) for place in places]
            prediction, target = lesson.denoise(pictures[places], draw[places], prompts)
            each = (prediction.output.float() - target).square().mean(dim=(1, 2, 3))
            if self._by_area:
                each = each / lesson.pictures.masks[[self.concepts[place] for place in places], 0, 0].mean(dim=(1, 2))
            loss = each.mean() * (len(places) / count)
            yield places, {"reconstruction": loss, "total": loss}
