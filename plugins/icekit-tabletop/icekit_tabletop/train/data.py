"""The `data` stage: training scenes rendered in shards. Images and words are kept, masks are not: no ground-truth mask
enters any training.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from icekit_tabletop import world
from icekit_tabletop.captions import ATTRIBUTES, Caption
from icekit_tabletop.render import render_batch
from icekit_tabletop.train.checkpoint import append_log
from icekit_tabletop.train.settings import IMAGE_SIZE, Settings
from icekit_tabletop.world import ObjectSpec, SceneSpec, sample_scene

SHARD = 500
COUNT_SHARES: tuple[float, ...] = (0.03, 0.45, 0.27, 0.17, 0.08)
"""Shares of training scenes with 0, 1, 2, 3 and 4 objects."""

EVALUATION_SEED = 1_000_000_000
"""Seeds from here on belong to evaluation; training scenes stay below."""

NO_OBJECT_CODE = -2
"""In the codes of a scene, where there is no object."""

VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(world.SHAPES),
    "colour": tuple(world.COLOURS),
    "material": tuple(world.MATERIALS),
    "texture": tuple(world.TEXTURES),
}
"""Every attribute's values, in the order of the codes."""


def scene_of_count(seed: int, count: int, split: world.Split = "train") -> SceneSpec:
    """A scene of `count` objects (0 to 4) of the split; 0 is a bare table."""
    scene = sample_scene(seed, n_objects=max(1, count), split=split)
    return scene if count else dataclasses.replace(scene, objects=())


def training_scene(seed: int) -> SceneSpec:
    """The training scene of a seed below `EVALUATION_SEED`; the seed decides the number of objects too."""
    if not 0 <= seed < EVALUATION_SEED:
        raise ValueError(f"not a training seed: {seed}")
    count = random.Random(seed).choices(range(5), COUNT_SHARES)[0]
    return scene_of_count(seed, count)


@dataclass(frozen=True)
class SceneWords:
    """What is known of a stored scene: its objects in words, its table and its wall."""

    objects: tuple[ObjectSpec, ...]
    table: str
    wall: str


@dataclass(frozen=True)
class TrainingScenes:
    """`images`: uint8 [N, 3, 64, 64]. `words`: N entries. `codes`: int16 [N, 4, 4], objects by (shape, colour,
    material, texture) as indices, `NO_OBJECT_CODE` where there is none. `counts`: int64 [N].
    """

    images: np.ndarray
    words: list[SceneWords]
    codes: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_words(cls, images: np.ndarray, words: list[SceneWords]) -> TrainingScenes:
        """Works out codes and counts."""
        codes = np.full((len(words), 4, 4), NO_OBJECT_CODE, dtype=np.int16)
        for row, entry in enumerate(words):
            for column, item in enumerate(entry.objects):
                codes[row, column] = _code((item.shape, item.colour, item.material, item.texture))
        return cls(images, words, codes, np.array([len(entry.objects) for entry in words]))

    def sample_indices(self, rng: np.random.Generator, size: int, shares: tuple[float, ...]) -> np.ndarray:
        """Indices of `size` random scenes, int64, with 0 to 4 objects in the given shares."""
        counts = rng.choice(5, size=size, p=np.asarray(shares) / sum(shares))
        every = np.arange(len(self.counts))
        pools = [np.flatnonzero(self.counts == count) for count in range(5)]
        pools = [pool if len(pool) else every for pool in pools]
        return np.array([pools[count][rng.integers(len(pools[count]))] for count in counts], dtype=np.int64)


def _shard_paths(work: Path, index: int) -> tuple[Path, Path]:
    return work / "data" / f"images-{index:05d}.npy", work / "data" / f"words-{index:05d}.json"


def _render_shard(job: tuple[str, int, int, int]) -> int:
    work, index, size, first_seed = job
    torch.set_num_threads(1)
    images_path, words_path = _shard_paths(Path(work), index)
    scenes = [training_scene(first_seed + offset) for offset in range(size)]
    chunks = [render_batch(scenes[start : start + 50], IMAGE_SIZE)[0] for start in range(0, size, 50)]
    images = torch.cat(chunks).cpu().numpy()
    words = [
        {
            "objects": [[getattr(item.spec, key) for key in ATTRIBUTES] for item in scene.objects],
            "table": scene.table,
            "wall": scene.wall,
        }
        for scene in scenes
    ]
    temporary = words_path.with_suffix(".part")
    temporary.write_text(json.dumps(words))
    os.replace(temporary, words_path)
    temporary = images_path.with_suffix(".part")
    with temporary.open("wb") as out:
        np.save(out, images, allow_pickle=False)
    os.replace(temporary, images_path)  # last: a shard with images is complete
    return size


def render_data(settings: Settings) -> None:
    """Renders the shards that are missing, in `settings.processes` processes."""
    folder = settings.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    base = settings.seed * 10_000_000
    shards = [(index, min(SHARD, settings.images - index * SHARD)) for index in range(-(-settings.images // SHARD))]
    jobs = [
        (str(settings.work), index, size, base + index * SHARD)
        for index, size in shards
        if not _shard_paths(settings.work, index)[0].exists()
    ]
    done = settings.images - sum(job[2] for job in jobs)
    with tqdm(total=settings.images, initial=done, desc="data", unit="img", file=sys.stderr, mininterval=5) as bar:
        if jobs:
            # Not fork: torch's thread pool does not survive it.
            with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
                for size in pool.imap_unordered(_render_shard, jobs):
                    bar.update(size)
                    append_log(settings.work, stage="data", seen=bar.n)


def load_scenes(work: Path) -> TrainingScenes:
    """Every complete shard under `<work>/data`, in order."""
    images, words = [], []
    for path in sorted((work / "data").glob("images-*.npy")):
        images.append(np.load(path, allow_pickle=False))
        entries = json.loads(_shard_paths(work, int(path.stem.split("-")[1]))[1].read_text())
        words += [
            SceneWords(tuple(ObjectSpec(*values) for values in entry["objects"]), entry["table"], entry["wall"])
            for entry in entries
        ]
    if not images:
        raise FileNotFoundError(f"no rendered scenes in {work / 'data'}: run the data stage first")
    return TrainingScenes.from_words(np.concatenate(images), words)


def mirror(images: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Copies of images [B, 3, H, W], those of `flips` (bool [B]) left to right."""
    images = images.copy()
    images[flips] = images[flips, :, :, ::-1]
    return images


def _code(values: tuple[str | None, ...]) -> list[int]:
    return [-1 if value is None else names.index(value) for value, names in zip(values, VALUES.values(), strict=True)]


def caption_truth(captions: list[Caption], scenes: TrainingScenes, rows: np.ndarray) -> np.ndarray:
    """Whether each caption is true of each scene: bool [captions, rows]."""
    depth = max((len(caption.claims) for caption in captions), default=0)
    true = np.ones((len(captions), len(rows)), dtype=bool)
    codes = scenes.codes[rows]
    for place in range(depth):
        claims = np.full((len(captions), 4), -1, dtype=np.int16)
        used = np.zeros(len(captions), dtype=bool)
        for index, caption in enumerate(captions):
            if place < len(caption.claims):
                claims[index], used[index] = _code(caption.claims[place]), True
        fits = np.broadcast_to(codes[None, :, :, 0] >= 0, (len(captions), len(rows), 4)).copy()
        for attribute in range(4):
            claim = claims[:, None, None, attribute]
            fits &= (claim == -1) | (claim == codes[None, :, :, attribute])
        true &= fits.any(-1) | ~used[:, None]
    for key in ("table", "wall"):
        names = np.array([getattr(scenes.words[row], key) for row in rows])
        said = np.array([getattr(caption, key) or "" for caption in captions])
        true &= (said[:, None] == "") | (said[:, None] == names[None])
    wanted = np.array([-1 if caption.count is None else caption.count for caption in captions])
    return true & ((wanted[:, None] == -1) | (wanted[:, None] == scenes.counts[rows][None]))
