"""A diffusion transformer with joint attention, flow matching and three text encoders, through icekit as it is: a
plugin that is found by its entry point, learned with ICE, shown, refined and composed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import joint_attention
import numpy as np
import plain_components as plain
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from icekit_process import ROOT, icekit
from joint_attention import ENCODERS, TRAINED_PROJECTIONS, JointAttention
from PIL import Image
from plain_components import beside_builtins
from safetensors.torch import load_file

from icekit import extract
from icekit.backbones.common import quiet
from icekit.plugins import Plugins
from icekit.protocols import InputError, Look
from icekit.run.compose import compose
from icekit.settings import load_settings

OPTIONS: dict[str, Any] = {
    "components": {"backbone": "joint", "retriever": "words", "segmentor": "xattn", "learner": "ice"},
    "retriever": {"words": ["cup", "ball"]},
    "attributes": ["colour"],
    "samples": 1,
    "device": "cpu",
}
STEPS = 4
TOKENS = ["<cup-0>", "<cup-0-instance>", "<cup-0-colour>"]


@pytest.fixture
def backbone(joint_folder: Path) -> JointAttention:
    return JointAttention(JointAttention.Settings(model=str(joint_folder)), "cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.full((48, 72, 3), 200, dtype=np.uint8)
    pixels[16:40, 20:44] = (180, 30, 40)
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def plugins() -> Plugins:
    return beside_builtins(joint=joint_attention)


def test_noise_target_and_time_by_hand(backbone):
    """A shift of 3 makes half of the schedule three quarters of noise: 3 / 2 over 1 + 2 / 2."""
    latents, noise, shares = torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), 6.0), torch.tensor([0.5])
    torch.testing.assert_close(backbone.add_noise(latents, noise, shares), torch.full((1, 4, 2, 2), 5.0))
    assert torch.equal(backbone.training_target(latents, noise, shares), torch.full((1, 4, 2, 2), 4.0))
    assert backbone.share_of(750.0) == pytest.approx(0.5)


def test_a_place_divides_its_attention_among_the_prompt_and_the_picture(backbone, monkeypatch):
    """Joint softmax: words and places together sum to one, so that words alone do not."""
    shared = []
    softmax = joint_attention.attention_weights

    def recorded(*given):
        shared.append(softmax(*given))
        return shared[-1]

    monkeypatch.setattr(joint_attention, "attention_weights", recorded)
    encoded = backbone.encode_prompts(["a cup"])
    seen = backbone.predict(torch.zeros(1, 4, 16, 16), torch.tensor([0.5]), encoded, Look((8,), (8,))).attention
    [words], [pixels] = seen.words, seen.pixels
    assert (words.shape, pixels.shape) == ((1, 77 + 256, 8, 8), (1, 8, 8, 8, 8))
    assert len(shared) == 2  # a block each
    to_picture = torch.stack(shared).mean(dim=(0, 2))[..., :64].sum(-1)
    torch.testing.assert_close(words.sum(1).flatten(1) + to_picture, torch.ones(1, 64))
    assert 0 < float(words.sum(1).max()) < 1


def test_a_token_has_a_row_for_each_encoder(backbone):
    assert backbone.rows == {"clip_l": 8, "clip_g": 16, "t5xxl": 32}
    assert [part.split()[0] for part in backbone.identity.split(", ")] == ["clip_g", "clip_l", "t5xxl"]
    token = {"<cup-0>": backbone.word_rows("cup")}
    [places] = backbone.token_positions("a red <cup-0>", ["<cup-0>"], token)
    assert places == [3, 77 + 2]  # in CLIP after the start token, in T5 without one
    del token["<cup-0>"]["t5xxl"]
    with pytest.raises(InputError, match="<cup-0> has rows for clip_l, clip_g, and this model reads rows for t5xxl"):
        backbone.encode_prompts(["a <cup-0>"], token)


@pytest.mark.slow
def test_the_program_runs_it_whole(photo: Path, joint_folder: Path, tmp_path: Path) -> None:
    """A process of its own that finds the plugin by its entry point."""
    source = f"import sys; sys.path.append({str(ROOT / 'tests')!r})\nfrom joint_attention import *\n"
    plain.write_distribution(tmp_path / "plugin", "joint_plugin", source, name="joint-plugin")
    settings = load_settings(options=OPTIONS | {"backbone": {"model": str(joint_folder), "steps": 1}})
    (tmp_path / "settings.toml").write_text(settings.to_toml())
    done = icekit(
        ["run", photo, "--out", "run", "--config", "settings.toml", "--set", f"learner.steps={STEPS}", "--json"],
        tmp_path,
        tmp_path / "plugin",
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["components"] == OPTIONS["components"]
    assert manifest["backbone"]["rows"] == {"clip_l": 8, "clip_g": 16, "t5xxl": 32}
    assert (manifest["image"]["height"], manifest["image"]["width"]) == (64, 64)
    concept = manifest["concepts"][0]
    assert list(concept["tokens"].values()) == TOKENS
    folder = tmp_path / "run"
    rows = load_file(folder / "embeddings.safetensors")
    tokens = [token for one in manifest["concepts"] for token in one["tokens"].values()]
    assert set(rows) == {f"{token}.{encoder}" for token in tokens for encoder in ENCODERS}
    assert all(row.isfinite().all() for row in rows.values())
    own = load_file(folder / "embeddings" / "cup-0-colour.safetensors")
    assert {name: len(row) for name, row in own.items()} == manifest["backbone"]["rows"]
    for part in concept["tokens"]:
        assert (folder / "attention" / f"0-{part}.png").is_file()
    for name in ("0-object-0", "0-colour-0", "0-object-words-0", "0-colour-words-0"):
        with Image.open(folder / "samples" / f"{name}.png") as sample:
            assert sample.size == (64, 64)
    losses = [json.loads(line)["losses"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    assert all(np.isfinite(list(one.values())).all() for one in losses)
    assert (folder / "report.html").is_file()


def test_refined_and_composed(photo: Path, joint_folder: Path, plugins: Plugins, tmp_path: Path) -> None:
    """A transformer's LoRA adapter: learned, kept, loaded by the pipeline; two sides; the run's tokens in a prompt."""
    options = OPTIONS | {
        "max_concepts": 1,
        "backbone": {"model": str(joint_folder), "steps": 1, "image_size": [48, 64]},
        "learner": {"steps": 2, "refine_steps": 2, "prior_images": 1},
    }
    run = extract(photo, tmp_path / "run", load_settings(options=options), installed=plugins)
    assert {name: row.shape for name, row in run.tokens["<cup-0-colour>"].items()} == {
        "clip_l": (8,), "clip_g": (16,), "t5xxl": (32,),
    }  # fmt: skip
    assert [one.mask().shape for one in run.concepts] == [(48, 64)]
    tuning = run.tuning()
    assert tuning.folder == "transformer"
    assert all(key.startswith("transformer.") for key in tuning.lora)
    trained = {re.sub(r".*\.attn2?\.(.*)\.lora_[AB]\.weight", r"\1", key) for key in tuning.lora}
    assert trained == set(TRAINED_PROJECTIONS)
    assert any(value.any() for key, value in tuning.lora.items() if ".lora_B." in key)
    with quiet():
        pipeline = StableDiffusion3Pipeline.from_pretrained(joint_folder)
        pipeline.load_lora_weights(tmp_path / "run", weight_name="lora.safetensors")
    assert pipeline.get_list_adapters() == {"transformer": ["default_0"]}

    made = compose("a {a.colour} {a}", {"a": run}, n=2, out=tmp_path / "mixed", installed=plugins)
    assert made.expanded == "a <a-cup-0-colour> <a-cup-0-instance> <a-cup-0>"
    for file in made.images:
        with Image.open(file) as picture:
            assert picture.size == (64, 48)
