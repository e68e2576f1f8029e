"""What the `unet` stage holds a picture against: wrong captions, CLIP's look; worked by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from icekit_tabletop.train.alignment import alignment_loss
from icekit_tabletop.train.batches import CONTRASTED, choose_contrasts, draw_caption
from icekit_tabletop.train.checkpoint import load_state, save_state
from icekit_tabletop.train.clip import build_clip
from icekit_tabletop.train.contrast import contrast_loss, mistake
from icekit_tabletop.train.data import VALUES, SceneWords, TrainingScenes, caption_truth, training_scene
from icekit_tabletop.train.perceptual import perceptual_distance
from icekit_tabletop.train.settings import Settings
from icekit_tabletop.train.unet import WEIGHTS, train_unet, without_padding
from icekit_tabletop.world import ObjectSpec, is_held_out


def _words(seed: int) -> SceneWords:
    scene = training_scene(seed)
    return SceneWords(tuple(item.spec for item in scene.objects), scene.table, scene.wall)


def test_a_wrong_caption_differs_in_one_thing_and_names_no_held_out_combination() -> None:
    rng = random.Random(0)
    items = (ObjectSpec("cup", "red", "metal", "plain"), ObjectSpec("ball", "blue", "wood", "striped"))
    exchanged = 0
    for _ in range(300):
        wrong = mistake(items, rng)
        assert wrong is not None and set(wrong) != set(items)
        assert not any(is_held_out(item.shape, item.colour, item.material) for item in wrong)
        differing = {
            name
            for name in VALUES
            if any(getattr(a, name) != getattr(b, name) for a, b in zip(items, wrong, strict=True))
        }
        assert len(differing) == 1
        [name] = differing
        exchanged += [getattr(item, name) for item in wrong] == [getattr(item, name) for item in items][::-1]
    assert 180 < exchanged < 260  # 0.7 of them are meant to be, some of them are held out
    assert mistake((), rng) is None


def test_wrong_captions_are_worded_as_the_right_ones_and_not_true() -> None:
    scenes = TrainingScenes.from_words(np.zeros((200, 3, 1, 1), np.uint8), [_words(seed) for seed in range(200)])
    rng, rows = random.Random(1), np.arange(200)
    pairs = [draw_caption(scenes.words[row], rng, 0.4) for row in rows]
    chosen = choose_contrasts(pairs, torch.full((200,), 600), scenes, rows)
    assert 60 < len(chosen) <= CONTRASTED * len(rows)
    assert choose_contrasts(pairs, torch.full((200,), 100), scenes, rows) == {}
    for place, text in chosen.items():
        right, wrong = pairs[place]
        assert wrong is not None and wrong.text == text
        if [claim[3] for claim in right.claims] == [claim[3] for claim in wrong.claims]:  # "plain" is left unsaid
            assert len(right.text.split()) == len(wrong.text.split())
        assert not caption_truth([wrong], scenes, rows[[place]])[0, 0]
        assert caption_truth([right], scenes, rows[[place]])[0, 0]


def test_contrast_is_the_log_likelihood_ratio() -> None:
    target = torch.zeros(2, 1, 2, 2)
    predicted, contradicted = target.clone(), target.clone()
    predicted[0], contradicted[0] = 0.5, 1.0  # errors 1 and 4: log(1 + exp(-3/2))
    predicted[1], contradicted[1] = 1.0, 0.0  # errors 4 and 0: log(1 + exp(2))
    expected = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(2.0))) / 2
    assert float(contrast_loss(predicted, contradicted, target)) == pytest.approx(expected, rel=1e-6)
    assert float(contrast_loss(predicted[:0], contradicted[:0], target[:0])) == 0


def test_alignment_is_the_angle_to_how_places_differ() -> None:
    looks = torch.tensor([[1.0, 3.0], [7.0, 5.0]]).view(1, 2, 1, 2)  # two places, two channels
    normal = torch.tensor([[[-1.0, 1.0], [1.0, -1.0]]])  # [1, places, channels]: the mean of both is gone
    assert float(alignment_loss(3 * normal, looks)) == pytest.approx(0.0, abs=1e-4)
    assert float(alignment_loss(-normal, looks)) == pytest.approx(2.0, abs=1e-4)


def test_perceptual_distance_by_hand() -> None:
    one = torch.tensor([[[[3.0]], [[0.0]]]])
    other = torch.tensor([[[[0.0]], [[0.5]]]])  # at right angles: |(1, 0) - (0, 1)|^2 = 2
    assert float(perceptual_distance([one, one], [other, 2 * one])) == pytest.approx(1.0)


def test_padding_is_left_out() -> None:
    ids = torch.tensor([[8, 1, 9, 9, 9], [8, 1, 2, 9, 9]])  # 9 ends and pads
    assert without_padding(ids).tolist() == [[8, 1, 9, 9], [8, 1, 2, 9]]


def test_the_stage_trains_what_it_should_and_logs_every_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = build_clip()
    for stage, module in (("clip", clip), ("clip-image", clip.visual)):
        save_state(tmp_path / f"{stage}.safetensors", {f"average/{k}": v for k, v in module.state_dict().items()}, {})
    rng = np.random.default_rng(0)
    scenes = [_words(seed) for seed in range(40)]
    words = [
        {
            "objects": [[o.shape, o.colour, o.material, o.texture] for o in one.objects],
            "table": one.table,
            "wall": one.wall,
        }
        for one in scenes
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words-00000.json").write_text(json.dumps(words))
    np.save(tmp_path / "data" / "images-00000.npy", rng.integers(256, size=(40, 3, 64, 64), dtype=np.uint8))
    np.save(tmp_path / "latents.npy", rng.normal(size=(2, 40, 4, 16, 16)).astype(np.float16))

    train_unet(Settings(work=tmp_path, device="cpu", unet_images=1))
    before, _ = load_state(tmp_path / "unet.safetensors", "weights/")
    train_unet(Settings(work=tmp_path, device="cpu", unet_images=30))
    after, info = load_state(tmp_path / "unet.safetensors", "weights/")

    assert info["step"] == 2
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert still and all("embedding" in name for name in still)
    assert {name.split(".")[0] for name in after} == {"unet", "text", "eyes"}
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert set(WEIGHTS) <= line.keys() and all(line[name] > 0 for name in WEIGHTS if name != "moved")
