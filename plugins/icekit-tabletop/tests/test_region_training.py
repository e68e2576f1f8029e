"""What the image tower learns of regions: found by the shipped models as stage one finds them, and shown alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from icekit_tabletop.dataset import distinct_scene
from icekit_tabletop.train.data import NO_OBJECT_CODE, VALUES, SceneWords, TrainingScenes
from icekit_tabletop.train.region_views import RegionViews
from icekit_tabletop.train.regions import SHARD, Finder, distinct, load_regions, match_regions
from icekit_tabletop.weights import clip_dir
from icekit_tabletop.world import ObjectSpec

from icekit.pixels import to_tensor

RED_BALL = ObjectSpec("ball", "red", "metal", "plain")
BLUE_CUP = ObjectSpec("cup", "blue", "wood", "striped")


def box(top: int, left: int, side: int = 16) -> torch.Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def code(spec: ObjectSpec) -> list[int]:
    return [VALUES[key].index(getattr(spec, key)) for key in ("shape", "colour", "material", "texture")]


@pytest.fixture
def scenes() -> TrainingScenes:
    """A grey picture with a red and a blue box in it, and one whose only object was not found."""
    pictures = np.full((2, 3, 64, 64), 128, dtype=np.uint8)
    pictures[0][:, box(4, 4)] = np.array([[255], [0], [0]])
    pictures[0][:, box(40, 40)] = np.array([[0], [0], [255]])
    words = [SceneWords((RED_BALL, BLUE_CUP), "grey", "white"), SceneWords((RED_BALL,), "grey", "white")]
    return TrainingScenes.from_words(pictures, words)


@pytest.fixture
def views(scenes: TrainingScenes) -> RegionViews:
    masks = np.zeros((2, 4, 64, 64), dtype=bool)
    masks[0, 0], masks[0, 1] = box(4, 4), box(40, 40)
    return RegionViews(scenes, masks)


def colours(picture: np.ndarray) -> tuple[bool, bool]:
    """Whether there is pure red, and pure blue."""
    red = (picture[0] > 250) & (picture[1] < 5) & (picture[2] < 5)
    blue = (picture[2] > 250) & (picture[1] < 5) & (picture[0] < 5)
    return bool(red.any()), bool(blue.any())


def test_a_region_alone_is_what_its_code_says(views: RegionViews) -> None:
    pictures, codes = views.alone(np.random.default_rng(0), 200)
    assert pictures.dtype == np.uint8 and pictures.shape == (200, 3, 64, 64)
    there = {(True, False): code(RED_BALL), (False, True): code(BLUE_CUP), (False, False): [NO_OBJECT_CODE] * 4}
    seen = [colours(picture) for picture in pictures]
    for what, said in zip(seen, codes, strict=True):
        assert said[0].tolist() == there[what] and (said[1:] == NO_OBJECT_CODE).all()
    assert set(seen) == set(there)
    assert 5 < seen.count((False, False)) < 40
    black = [bool((picture == 0).all(axis=0).mean() > 0.5) for picture in pictures]
    assert 30 < sum(black) < 90


def test_what_is_erased_is_gone_from_picture_and_code(views: RegionViews) -> None:
    pictures, codes = views.erased(np.random.default_rng(0), 60)
    seen = [colours(picture) for picture in pictures]
    for (red, blue), said in zip(seen, codes, strict=True):
        assert said[0].tolist() == (code(RED_BALL) if red else [NO_OBJECT_CODE] * 4)
        assert said[1].tolist() == (code(BLUE_CUP) if blue else [NO_OBJECT_CODE] * 4)
    assert set(seen) == {(True, False), (False, True), (False, False)}


def test_regions_are_given_to_objects_by_what_they_look_like() -> None:
    one, other, nearly = box(0, 0), box(30, 30), box(1, 1)
    assert [mask.sum().item() for mask in distinct([one, nearly, torch.zeros_like(one), other])] == [256, 256]
    # Both regions are most like the first object, but together they fit better the other way round.
    assert match_regions(np.array([[0.9, 0.8], [0.7, 0.1]])) == {1: 0, 0: 1}
    assert match_regions(np.array([[0.2, 0.8]])) == {1: 0}


def test_the_shipped_models_find_the_objects_that_a_caption_names() -> None:
    finder = Finder(clip_dir().parent)
    overlaps = []
    for number in range(4):
        scene = distinct_scene([number], (2_000_000_000, 2**31), 1 + number % 2, 64, "train")
        image = to_tensor(scene.image)
        found = finder.find(image, tuple(scene.objects), seed=number)
        assert found.shape == (4, 64, 64) and found.dtype == bool
        assert not found[len(scene.objects) :].any()
        for mask, true in zip(found, scene.masks, strict=False):
            overlaps.append((mask & true).sum() / (mask | true).sum())
    assert np.mean(overlaps) > 0.5
    assert not finder.find(image, (RED_BALL, RED_BALL), seed=0).any()  # nobody can tell which is which


def test_only_shards_in_a_row_count(tmp_path: Path, scenes: TrainingScenes) -> None:
    with pytest.raises(FileNotFoundError, match="run the regions stage first"):
        load_regions(tmp_path, scenes)
    (tmp_path / "regions").mkdir()
    masks = np.zeros((SHARD, 4, 64, 64), dtype=bool)
    masks[3, 1] = box(4, 4)
    for index in (0, 2):
        np.save(tmp_path / "regions" / f"{index:05d}.npy", np.packbits(masks, axis=-1))
    np.testing.assert_array_equal(load_regions(tmp_path, scenes), masks)
