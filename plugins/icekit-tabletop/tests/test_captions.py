"""Captions: what they may say, and that what they claim is so."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np
import pytest
from icekit_tabletop.captions import WORDS, Caption, caption_scene, describe, sample_caption
from icekit_tabletop.train.data import (
    EVALUATION_SEED,
    SceneWords,
    TrainingScenes,
    caption_truth,
    scene_of_count,
    training_scene,
)
from icekit_tabletop.world import ObjectSpec, is_held_out

CUP = ObjectSpec("cup", "red", "wood", "striped")
BALL = ObjectSpec("ball", "orange", "metal")


@dataclass
class _Scene:
    objects: tuple[ObjectSpec, ...]
    table: str = "grey"
    wall: str = "dusty blue"


def test_describe_names_everything_in_order() -> None:
    assert describe([CUP]) == "a red striped wood cup"
    assert describe([CUP, BALL]) == "a red striped wood cup and an orange metal ball"
    assert describe([CUP, BALL, CUP]).count(",") == 1
    assert describe([]) == "an empty table"


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_every_word_is_known(drop: float) -> None:
    rng = random.Random(1)
    known = set(WORDS)
    for seed in range(400):
        scene = scene_of_count(seed, seed % 5)
        for word in re.findall(r"[a-z]+", sample_caption(scene, rng=rng, drop=drop)):
            assert word in known


def test_words_are_single_and_lower_case() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(re.fullmatch("[a-z]+", word) for word in WORDS)
    assert {"colour", "color", "material", "texture", "shape", "thing", "things", "background"} <= set(WORDS)


def test_nothing_dropped_names_shape_colour_and_material() -> None:
    rng = random.Random(2)
    for _ in range(100):
        text = sample_caption(_Scene((CUP, BALL)), rng=rng, drop=0.0)
        assert {"cup", "red", "wood", "striped", "ball", "orange", "metal"} <= set(re.findall("[a-z]+", text))


def test_bare_words_attributes_as_things_and_orders_occur() -> None:
    rng = random.Random(3)
    texts = {sample_caption(_Scene((CUP,)), rng=rng, drop=0.9) for _ in range(4000)}
    assert {"cup", "cup things background", "a cup made of wood", "a red colour", "the material wood"} <= texts
    assert any(re.fullmatch("(a )?cup,? red,? striped,? wood", text) for text in texts)


def test_the_same_generator_gives_the_same_caption() -> None:
    scene = _Scene((CUP, BALL))
    assert sample_caption(scene, rng=random.Random(4)) == sample_caption(scene, rng=random.Random(4))
    assert sample_caption([CUP, BALL], "grey", "dusty blue", random.Random(4)) == sample_caption(
        scene, rng=random.Random(4)
    )


def test_objects_alone_need_table_and_wall() -> None:
    with pytest.raises(ValueError, match="table and wall"):
        sample_caption([CUP])


def test_a_backdrop_does_not_use_an_objects_word() -> None:
    rng = random.Random(5)
    for _ in range(300):
        assert "dusty" not in sample_caption(_Scene(()), rng=rng)


def _stored(scenes: list[tuple[ObjectSpec, ...]]) -> TrainingScenes:
    words = [SceneWords(objects, "grey", "sage") for objects in scenes]
    return TrainingScenes.from_words(np.zeros((len(words), 3, 4, 4), np.uint8), words)


def test_captions_are_true_of_their_own_scene() -> None:
    rng = random.Random(6)
    words = []
    for seed in range(60):
        scene = scene_of_count(seed, seed % 5)
        words.append(SceneWords(tuple(item.spec for item in scene.objects), scene.table, scene.wall))
    stored = TrainingScenes.from_words(np.zeros((60, 3, 4, 4), np.uint8), words)
    captions = [caption_scene(entry, rng, 0.7) for entry in words]
    truth = caption_truth(captions, stored, np.arange(60))
    assert truth.diagonal().all()
    assert truth.mean() < 0.5


def test_truth_follows_the_claims() -> None:
    stored = _stored([(CUP,), (BALL,), (CUP, BALL), ()])
    captions = [
        Caption("cup", (("cup", None, None, None),)),
        Caption("a red metal thing", ((None, "red", "metal", None),)),
        Caption("a cup and an orange thing", (("cup", None, None, None), (None, "orange", None, None))),
        Caption("an empty table", count=0),
        Caption("a thing in front of a beige wall", wall="beige"),
    ]
    truth = caption_truth(captions, stored, np.array([0, 1, 2, 3]))
    assert truth.tolist() == [
        [True, False, True, False],
        [False, False, False, False],
        [False, False, True, False],
        [False, False, False, True],
        [False, False, False, False],
    ]


def test_training_scenes_hold_no_held_out_combination() -> None:
    for seed in range(200):
        for item in training_scene(seed).objects:
            assert not is_held_out(item.spec.shape, item.spec.colour, item.spec.material)
    with pytest.raises(ValueError, match="training seed"):
        training_scene(EVALUATION_SEED)
