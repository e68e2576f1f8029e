"""The `regions` stage: where the trained UNet sees the objects of training scenes, for the image tower to look at.

Stage one names an object by looking at its region alone, and looks on where found ones are erased: neither is like any
picture that was rendered. What it will be shown is made here as it makes it itself, by cross-attention, so that no
ground-truth mask enters.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

import icekit
from icekit import plugins
from icekit.clip import ClipModel
from icekit.pixels import isolate
from icekit.protocols import View
from icekit.run.models import build_component
from icekit_tabletop.backbone import Tabletop
from icekit_tabletop.captions import describe
from icekit_tabletop.train.checkpoint import append_log
from icekit_tabletop.train.data import TrainingScenes, load_scenes
from icekit_tabletop.train.export import export_models
from icekit_tabletop.train.settings import Settings
from icekit_tabletop.world import MAX_OBJECTS, ObjectSpec

SHARD = 100
DRAWS = 2
"""Draws of the noise that attention is averaged over: a quarter of stage one's, so its masks are a little rougher."""
SAME = 0.5
"""Two words have found the same region from this IoU on."""


def match_regions(likeness: NDArray[np.float64]) -> dict[int, int]:
    """The regions' objects, each at most once, by the largest total likeness.

    `likeness`: [regions, objects]. Returns object -> region.
    """
    regions, objects = linear_sum_assignment(likeness, maximize=True)
    return dict(zip(objects.tolist(), regions.tolist(), strict=True))


def distinct(masks: list[Tensor]) -> list[Tensor]:
    """Those masks, bool [H, W], that are not empty and overlap no earlier one by an IoU of `SAME` or more."""
    kept: list[Tensor] = []
    for mask in masks:
        overlaps = [float((mask & other).sum() / (mask | other).sum()) for other in kept]
        if bool(mask.any()) and all(overlap < SAME for overlap in overlaps):
            kept.append(mask)
    return kept


class Finder:
    """Finds the objects that a training scene's caption names, with exported models."""

    def __init__(self, models: Path) -> None:
        device = torch.device("cpu")
        backbone = Tabletop(Tabletop.Settings(model=str(models / "stable-diffusion")), device)
        installed = plugins.installed()
        chosen = {"segmentor": {"draws": DRAWS}, "components": {"backbone": "tabletop", "segmentor": "xattn"}}
        settings = installed.resolve(icekit.Settings.model_validate(chosen))
        self._segmentor = build_component(installed, settings, "segmentor", backbone)
        self._clip = ClipModel(f"local-dir:{models / 'open-clip'}", "", device)

    def find(self, image: Tensor, objects: tuple[ObjectSpec, ...], seed: int) -> NDArray[np.bool_]:
        """Bool [4, H, W], a mask an object; empty where none was found, or another object has the same shape.

        Words find regions, but in a group not always their own: which object a region is, the image-text model
        decides, among the scene's.

        `image`: float32 [3, H, W] in 0..1.
        """
        shapes = [item.shape for item in objects]
        found = np.zeros((MAX_OBJECTS, *image.shape[1:]), dtype=bool)
        if not objects or len(set(shapes)) < len(shapes):
            return found
        view = View(image, image, torch.ones(image.shape[1:], dtype=torch.bool))
        generator = torch.Generator().manual_seed(seed)
        masks = distinct([self._segmentor.segment(view, shape, generator) for shape in shapes])
        if masks:
            looks = self._clip.embed_images([isolate(image, mask) for mask in masks])
            texts = self._clip.embed_texts([describe([item]) for item in objects])
            for place, region in match_regions((looks @ texts.T).double().numpy()).items():
                found[place] = masks[region].numpy()
        return found


@cache
def _finder(models: Path) -> Finder:
    torch.set_num_threads(1)
    return Finder(models)


def _shard_path(work: Path, index: int) -> Path:
    return work / "regions" / f"{index:05d}.npy"


def _find_shard(job: tuple[Path, int, NDArray[np.uint8], list[tuple[ObjectSpec, ...]], int]) -> int:
    work, index, images, objects, seed = job
    finder = _finder(_models(work))
    masks = [
        finder.find(torch.from_numpy(image).float() / 255, specs, seed + row)
        for row, (image, specs) in enumerate(zip(images, objects, strict=True))
    ]
    temporary = _shard_path(work, index).with_suffix(".part")
    with temporary.open("wb") as out:
        np.save(out, np.packbits(np.stack(masks), axis=-1), allow_pickle=False)
    os.replace(temporary, _shard_path(work, index))
    return len(images)


def _models(work: Path) -> Path:
    return work / "regions" / "models"


def find_regions(settings: Settings) -> None:
    """Finds the objects of the first `settings.region_scenes` scenes, in `settings.processes` processes."""
    (settings.work / "regions").mkdir(parents=True, exist_ok=True)
    export_models(dataclasses.replace(settings, models=_models(settings.work)))
    scenes = load_scenes(settings.work)
    total = min(settings.region_scenes, len(scenes.images))
    missing = [i for i in range(-(-total // SHARD)) if not _shard_path(settings.work, i).exists()]

    def job(index: int) -> tuple[Any, ...]:
        rows = range(index * SHARD, min(total, (index + 1) * SHARD))
        objects = [scenes.words[row].objects for row in rows]
        return settings.work, index, scenes.images[rows.start : rows.stop], objects, settings.seed + rows.start

    with tqdm(total=len(missing) * SHARD, desc="regions", unit="scene", file=sys.stderr, mininterval=5) as bar:
        if missing:
            with multiprocessing.get_context("spawn").Pool(settings.processes) as pool:
                for done in pool.imap_unordered(_find_shard, map(job, missing)):
                    bar.update(done)
                    append_log(settings.work, stage="regions", seen=bar.n)


def load_regions(work: Path, scenes: TrainingScenes) -> NDArray[np.bool_]:
    """The masks of all shards, up to the first that is missing: bool [M, 4, H, W], of the first M scenes.

    Raises ``FileNotFoundError`` when there are none.
    """
    paths = itertools.takewhile(Path.exists, (_shard_path(work, index) for index in itertools.count()))
    shards = [np.load(path, allow_pickle=False) for path in paths]
    if not shards:
        raise FileNotFoundError(f"no regions in {work / 'regions'}: run the regions stage first")
    packed = np.concatenate(shards)
    return np.unpackbits(packed, axis=-1, count=scenes.images.shape[-1]).astype(bool)
