"""What a step of the `unet` stage sees: pictures, their noise, and their captions, right and wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from icekit_tabletop.captions import Caption, caption_scene
from icekit_tabletop.tokenizer import MAX_LENGTH, build_tokenizer
from icekit_tabletop.train.contrast import mistake
from icekit_tabletop.train.data import SceneWords, TrainingScenes, caption_truth, mirror

CAPTION_DROPOUT = 0.15
"""Share of samples trained with the empty prompt, for classifier-free guidance."""

SINGLES_SAMPLES = 90_000
"""Samples, at the start of the training, that show hardly more than one object a picture."""

EASY_SAMPLES = 60_000
"""Samples, at the start of the training, whose captions leave little out."""

GROUP_SHARES = (0.02, 0.40, 0.40, 0.14, 0.04)
"""Shares of pictures with 0 to 4 objects from then on."""

ONE_OF_MANY = 0.1
"""Share of the pictures with several objects whose caption names one of them alone: its words must find their own. When
it is larger, pictures painted of one object's name hold several."""

CONTRASTED = 0.5
"""Share of a batch's pictures that are denoised under a wrong caption, too, at most."""

WORDS_ONLY = 0.8
"""Share of batches whose end token and padding are hidden from the UNet; see `unet.audible`."""

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
        if len(chosen) >= CONTRASTED * len(pairs):
            break
        if wrong is None or wrong.text == caption.text or timesteps[place] < CONTRASTED_FROM:
            continue
        if not caption_truth([wrong], scenes, rows[[place]])[0, 0]:
            chosen[place] = wrong.text
    return chosen


@dataclass(frozen=True)
class Batch:
    """B pictures to denoise, some of them a second time under a wrong caption.

    `rows`: int64 [B], their scenes. `pixels`: uint8 [B, 3, 64, 64]. `ids`: int64 [B + D, L], tokens of the B right
    captions, then of the wrong ones, of the pictures at the D places `doubled`. `words_only`: whether the end and the
    padding of these are hidden. `timesteps`: int64 [B]. `clean` and `noise`: float32 [B, 4, 16, 16].
    """

    rows: np.ndarray
    pixels: Tensor
    ids: Tensor
    words_only: bool
    doubled: list[int]
    timesteps: Tensor
    clean: Tensor
    noise: Tensor


class Batches(IterableDataset[Batch]):
    """An endless row of batches of `size` pictures.

    What is drawn follows from `seed`, `step`, the number that training starts at, and the number of the process that
    draws. `seen`: samples that were trained on before.
    """

    def __init__(
        self, scenes: TrainingScenes, latents: np.ndarray, size: int, seed: int, step: int = 0, seen: int = 0
    ) -> None:
        super().__init__()
        self.scenes, self.latents, self.size = scenes, latents, size
        self.seed, self.step, self.seen = seed, step, seen

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = np.random.default_rng([self.seed, self.step, number, 3])
        words = random.Random(int(rng.integers(2**32)))
        generator = torch.Generator().manual_seed(int(rng.integers(2**32)))
        tokenizer = build_tokenizer()
        seen = self.seen
        while True:
            shares = (0.02, 0.85, 0.13, 0.0, 0.0) if seen < SINGLES_SAMPLES else GROUP_SHARES
            rows = self.scenes.sample_indices(rng, self.size, shares)
            drop = 0.15 if seen < EASY_SAMPLES else 0.4
            pairs = [draw_caption(self.scenes.words[row], words, drop) for row in rows]
            timesteps = draw_timesteps(self.size, generator)
            wrong = choose_contrasts(pairs, timesteps, self.scenes, rows)
            mirrored = rng.integers(2, size=self.size)
            clean = torch.from_numpy(self.latents[mirrored, rows].astype(np.float32))
            captions = [*(caption.text for caption, _ in pairs), *wrong.values()]
            tokens = tokenizer(
                captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
            )
            yield Batch(
                rows=rows,
                pixels=torch.from_numpy(mirror(self.scenes.images[rows], mirrored == 1)),
                ids=tokens["input_ids"],
                words_only=words.random() < WORDS_ONLY,
                doubled=list(wrong),
                timesteps=timesteps,
                clean=clean,
                noise=torch.randn(clean.shape, generator=generator),
            )
            seen += self.size * workers

    def load(self, workers: int) -> Iterator[Batch]:
        """The batches, drawn by so many processes beside this one; 0: by this one."""
        loader: DataLoader[Batch] = DataLoader(
            self, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
        )
        return iter(loader)
