"""What a step of the `unet` stage sees: pictures, their noise, and their captions, right and wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icekit_tabletop.captions import Caption, caption_scene
from icekit_tabletop.train.contrast import mistake
from icekit_tabletop.train.data import SceneWords, TrainingScenes, caption_truth

BATCH = 24  # few samples are affordable on a processor: more, smaller steps learn more from them

CAPTION_DROPOUT = 0.15
"""Share of samples trained with the empty prompt, for classifier-free guidance."""

SINGLES_SHARE = 0.3
"""Share of the training, at its start, that sees hardly more than one object a picture."""

GROUP_SHARES = (0.02, 0.46, 0.36, 0.13, 0.03)
"""Shares of pictures with 0 to 4 objects from then on."""

ONE_OF_MANY = 0.1
"""Share of the pictures with several objects whose caption names one of them alone: its words must find their own. When
it is larger, pictures painted of one object's name hold several."""

CONTRASTED = 12
"""How many pictures of a batch, at most, are denoised under a wrong caption, too."""

CONTRASTED_FROM = 250
"""Timestep from which on. Where a picture can be seen, its words change nothing that a denoiser should do."""

CLEAR_SHARE = 0.15
"""Share of samples drawn uniformly from the timesteps below 450, for the sake of that loss."""


def draw_timesteps(size: int, generator: torch.Generator) -> Tensor:
    """int64 [size], 0 to 999; later (noisier) ones more often, for there the words decide. But see `CLEAR_SHARE`."""
    noisy = (1000 * torch.rand(size, generator=generator) ** 0.7).long().clamp_(max=999)
    clear = (450 * torch.rand(size, generator=generator)).long()
    return torch.where(torch.rand(size, generator=generator) < CLEAR_SHARE, clear, noisy)


def draw_caption(scene: SceneWords, rng: random.Random, drop: float) -> tuple[Caption, Caption | None]:
    """A caption to denoise a scene under: none, of all its objects, or of one of them; and one in the same wording in
    which something is wrong, if it can be made. `drop`: as `caption_scene`'s.
    """
    if rng.random() < CAPTION_DROPOUT:
        return Caption(""), None
    objects = scene.objects
    if len(objects) > 1 and rng.random() < ONE_OF_MANY:
        objects = (rng.choice(objects),)
    wrong = mistake(objects, rng)
    twin = random.Random()
    twin.setstate(rng.getstate())
    caption = caption_scene(objects, rng, drop, table=scene.table, wall=scene.wall)
    if wrong is None:
        return caption, None
    return caption, caption_scene(wrong, twin, drop, table=scene.table, wall=scene.wall)


def choose_contrasts(
    pairs: Sequence[tuple[Caption, Caption | None]], timesteps: Tensor, scenes: TrainingScenes, rows: np.ndarray
) -> dict[int, str]:
    """Places of the batch whose wrong caption says something that is not true of the scene, with that caption."""
    chosen: dict[int, str] = {}
    for place, (caption, wrong) in enumerate(pairs):
        if len(chosen) == CONTRASTED:
            break
        if wrong is None or wrong.text == caption.text or timesteps[place] < CONTRASTED_FROM:
            continue
        if not caption_truth([wrong], scenes, rows[[place]])[0, 0]:
            chosen[place] = wrong.text
    return chosen


@dataclass(frozen=True)
class Batch:
    """B pictures to denoise, some of them a second time under a wrong caption.

    `rows`: int64 [B], their scenes. `mirrored`: int64 [B], 1 where the picture is seen in a mirror. `captions`: B right
    ones, then the wrong ones, of the pictures at the places `doubled`. `timesteps`: int64 [B]. `clean` and `noise`:
    float32 [B, 4, 16, 16].
    """

    rows: np.ndarray
    mirrored: np.ndarray
    captions: list[str]
    doubled: list[int]
    timesteps: Tensor
    clean: Tensor
    noise: Tensor


class Batches:
    """Draws batches. What is drawn follows from `seed`, `step`, the number that training starts at, and the draws."""

    def __init__(self, scenes: TrainingScenes, latents: np.ndarray, seed: int, step: int) -> None:
        self.scenes, self.latents = scenes, latents
        self._rng = np.random.default_rng([seed, step, 3])
        self.words = random.Random(int(self._rng.integers(2**32)))
        self.generator = torch.Generator().manual_seed(int(self._rng.integers(2**32)))

    def draw(self, fraction: float) -> Batch:
        """The next one. `fraction`: share of the training that is done, 0 to 1."""
        shares = (0.02, 0.85, 0.13, 0.0, 0.0) if fraction < SINGLES_SHARE else GROUP_SHARES
        rows = self.scenes.sample_indices(self._rng, BATCH, shares)
        drop = 0.15 if fraction < 0.2 else 0.4
        pairs = [draw_caption(self.scenes.words[row], self.words, drop) for row in rows]
        timesteps = draw_timesteps(BATCH, self.generator)
        wrong = choose_contrasts(pairs, timesteps, self.scenes, rows)
        mirrored = self._rng.integers(2, size=BATCH)
        clean = torch.from_numpy(self.latents[mirrored, rows].astype(np.float32))
        return Batch(
            rows=rows,
            mirrored=mirrored,
            captions=[*(caption.text for caption, _ in pairs), *wrong.values()],
            doubled=list(wrong),
            timesteps=timesteps,
            clean=clean,
            noise=torch.randn(clean.shape, generator=self.generator),
        )
