"""Pictures with truth, drawn here: plain objects of one colour each, side by side on a grey table.

Drawn from the size alone, without a file or a model. What they are called, and their colour, is in the picture; their
material and their texture are only said, so that there is a true word for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icekit.pixels import erase
from icekit.protocols import Attribute, BenchImage, Region, TrueConcept, View

NOUNS = ("ball", "cube", "cup", "vase", "bowl", "bottle", "box", "plate", "book", "lamp")
"""What the objects are called, in turn."""
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.80, 0.14, 0.12),
    "blue": (0.14, 0.28, 0.76),
    "green": (0.16, 0.58, 0.24),
    "yellow": (0.88, 0.76, 0.14),
}
"""Their colours, in turn: RGB in [0, 1]."""
WORDS: Mapping[str, Sequence[str]] = {
    "colour": tuple(COLOURS),
    "material": ("metal", "rubber"),
    "texture": ("plain", "striped"),
}
"""Attribute -> the true words of the objects, in turn."""


@dataclass(frozen=True)
class Scene:
    """A picture, float32 ``[3, H, W]`` in [0, 1], and all that is true of it."""

    image: Tensor
    concepts: tuple[TrueConcept, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image.shape[1], self.image.shape[2])

    @property
    def picture(self) -> Image.Image:
        """The picture, RGB of 8 bits."""
        return to_picture(self.image)

    def view(self, visible: Tensor | None = None) -> View:
        """What a run hands to retriever and segmentor; visible: bool ``[H, W]``, None for all of it."""
        if visible is None:
            visible = torch.ones(self.size, dtype=torch.bool)
        return View(self.image.clone(), erase(self.image, visible, "inpaint"), visible.clone())

    def regions(self, attributes: Sequence[Attribute] = ()) -> list[Region]:
        """Its objects as stage one finds them at its best; attributes: those that are described, as hints."""
        hints = {one.name: _likely(one.vocabulary) for one in attributes}
        return [
            Region(place, concept.word or "thing", 0.5, concept.mask.clone(), hints)
            for place, concept in enumerate(self.concepts)
        ]

    def bench_image(self, name: str = "scene") -> BenchImage:
        """As a data set has it."""
        return BenchImage(name, self.image.clone(), self.concepts)


def two_objects(
    size: tuple[int, int] = (64, 64), nouns: Sequence[str] = (), words: Mapping[str, Sequence[str]] | None = None
) -> Scene:
    """A red ball on the left and a blue cube on the right.

    Args:
        size: (height, width) in pixels.
        nouns: other names for them.
        words: attribute -> other true words, in turn.
    """
    return _drawn(size, 2, nouns, words)


def ten_objects(
    size: tuple[int, int] = (64, 64), nouns: Sequence[str] = (), words: Mapping[str, Sequence[str]] | None = None
) -> Scene:
    """Ten objects in rows; see ``two_objects``."""
    return _drawn(size, 10, nouns, words)


def one_pixel_object(
    size: tuple[int, int] = (64, 64), nouns: Sequence[str] = (), words: Mapping[str, Sequence[str]] | None = None
) -> Scene:
    """As ``two_objects``, but that the second is a single pixel."""
    scene = _drawn(size, 2, nouns, words)
    mask = torch.zeros_like(scene.concepts[1].mask)
    mask[size[0] // 2, size[1] - size[1] // 4] = True
    image = torch.where(scene.concepts[1].mask & ~mask, _table(size), scene.image)
    first, second = scene.concepts
    return Scene(image, (first, TrueConcept(mask, second.word, second.attributes)))


def one_colour(
    size: tuple[int, int] = (64, 64), nouns: Sequence[str] = (), words: Mapping[str, Sequence[str]] | None = None
) -> Scene:
    """A picture in which every pixel has the same colour; it is said to show what ``two_objects`` shows."""
    scene = _drawn(size, 2, nouns, words)
    return Scene(torch.full_like(scene.image, 0.5), scene.concepts)


def to_picture(image: Tensor) -> Image.Image:
    """``[3, H, W]`` in [0, 1] -> RGB of 8 bits."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def to_mask_picture(mask: Tensor) -> Image.Image:
    """Bool ``[H, W]`` -> 8-bit grey, white where it is True: what mask files are."""
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)


def _likely(words: Sequence[str]) -> dict[str, float]:
    """What a ``Describer`` says: the first two words of a vocabulary."""
    return {words[0]: 0.75, words[1]: 0.25} if len(words) > 1 else dict.fromkeys(words, 1.0)


def _table(size: tuple[int, int]) -> Tensor:
    """A grey that grows brighter downwards, with a grain: no two places are quite the same."""
    height, width = size
    grain = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(0.45, 0.65, height)[None, :, None]
    return slope.expand(3, height, width) + 0.04 * (grain - 0.5)


def _drawn(size: tuple[int, int], count: int, nouns: Sequence[str], words: Mapping[str, Sequence[str]] | None) -> Scene:
    nouns, words = nouns or NOUNS, {**WORDS, **(words or {})}
    height, width = size
    columns = min(count, max(1, round(math.sqrt(count * width / height)))) if count > 2 else count
    rows = math.ceil(count / columns)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    image, concepts = _table(size), []
    for place in range(count):
        row, column = divmod(place, columns)
        middle = ((row + 0.5) * height / rows, (column + 0.5) * width / columns)
        radius = 0.33 * min(height / rows, width / columns)
        across, down = (x - middle[1]) / radius, (y - middle[0]) / radius
        round_one = place % 2 == 0
        mask = across**2 + down**2 <= 1 if round_one else (across.abs() <= 0.9) & (down.abs() <= 0.9)
        colour = torch.tensor(list(COLOURS.values())[place % len(COLOURS)])[:, None, None]
        light = (1 - 0.25 * (across + down)).clamp(0.6, 1.3)
        image = torch.where(mask, (colour * light).clamp(0, 1), image)
        true = {name: choices[place % len(choices)] for name, choices in words.items()}
        concepts.append(TrueConcept(mask, nouns[place % len(nouns)], true))
    return Scene(image.contiguous(), tuple(concepts))
