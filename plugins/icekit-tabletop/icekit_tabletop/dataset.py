"""The tabletop as a data set for ``icekit bench``: scenes that no model has seen, and all that is true of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from icekit.pixels import middle
from icekit.protocols import BenchPicture, TrueConcept
from icekit.waiting import told
from icekit_tabletop.render import Scene, render_scene
from icekit_tabletop.settings import DatasetSettings
from icekit_tabletop.world import Split

FIRST_SEED, LAST_SEED = 3_000_000_000, 2**32
"""Scenes of the bench are rendered from seeds in this range: training, the judge of generated images, the models' own
evaluation and `benchmarks/` use smaller ones."""
DEFAULT_COUNT = 16


class TabletopDataset:
    """Rendered scenes of one to three objects, all of combinations that no model was trained on, no shape twice."""

    Settings = DatasetSettings

    preset = "tabletop-bench"

    def __init__(self, settings: DatasetSettings) -> None:
        self.settings = settings

    @property
    def metrics(self) -> Sequence[str]:
        """All that the truth of a scene allows."""
        general = ("miou", "recall", "word_accuracy", "sim_i", "sim_c", "acc1", "acc3")
        return (*general, "attribute_words", "attribute_images", "transfer", "leakage", "recompose")

    def pictures(self, count: int | None, seed: int, size: tuple[int, int]) -> Sequence[BenchPicture]:
        """Scene ``i`` follows from the seed and ``i`` alone; of a scene, which is square, the middle is used."""
        side = max(size)
        left, top, right, bottom = middle((side, side), size)
        pictures = []
        for number in told(range(DEFAULT_COUNT if count is None else count), "rendering scenes"):
            objects = self.settings.objects or 1 + number % 3
            scene = distinct_scene([seed, number], (FIRST_SEED, LAST_SEED), objects, side, self.settings.split)
            masks = [mask[top:bottom, left:right] for mask in scene.masks]
            concepts = tuple(
                TrueConcept(
                    torch.from_numpy(mask),
                    spec.shape,
                    {"colour": spec.colour, "material": spec.material, "texture": spec.texture},
                )
                for spec, mask in zip(scene.objects, masks, strict=True)
                if mask.any()
            )
            pictures.append(BenchPicture(f"scene-{number:03d}", scene.image, concepts))
        return pictures


def distinct_scene(seed: Sequence[int], seeds: tuple[int, int], objects: int, size: int, split: Split) -> Scene:
    """A scene whose objects all have different shapes.

    A run uses a word once, so of two balls it could name only one; such scenes are drawn again.

    Args:
        seed: what the choice follows from.
        seeds: the range of rendering seeds, the upper end excluded.
        objects: how many, 1 to 4.
        size: side in pixels.
        split: which combinations of shape, colour and material.
    """
    attempt = 0
    while True:
        rng = np.random.default_rng([*seed, attempt])
        scene = render_scene(int(rng.integers(*seeds)), n_objects=objects, size=size, split=split)
        if len({spec.shape for spec in scene.objects}) == objects:
            return scene
        attempt += 1
