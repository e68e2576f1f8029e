"""Offsets of the modulation: in the blocks, in tokens, in diffusers' own pipelines, and learned."""

from __future__ import annotations

import functools
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import subjects_under_test as families
import tiny_transformers as tiny
import torch
from icekit_dit.modulated import ModulatedFlux, ModulatedStableDiffusion3
from icekit_dit.modulation import MODULATION, Offsets, in_pipeline, offset_block
from icekit_dit.modulation_learner import ModulationLearner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from icekit import extract
from icekit.protocols import InputError, Look
from icekit.run.compose import compose
from icekit.settings import load_settings
from icekit.testing import BackboneUnderTest, LearnerUnderTest, checks_of, parametrize_with_checks
from icekit.testing.tiny import tiny_backbone


@functools.cache
def temporary() -> tempfile.TemporaryDirectory[str]:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="icekit-dit-")


@functools.cache
def folder(name: str) -> Path:
    """A tiny model whose modulation of the text is strong, as a trained one's is: random weights hardly hear it."""
    path: Path = getattr(tiny, f"write_{name}")(Path(temporary().name) / name)
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for key, value in weights.items():
        if "norm1_context.linear" in key:
            value *= 10
    save_file(weights, file, metadata={"format": "pt"})
    return path


class WithOffsets(BackboneUnderTest):
    """A backbone whose reference is told of tokens' offsets by ``in_pipeline``, for good."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.told = ExitStack()

    def add_row(self, name: str, encoder: str, row: Tensor) -> None:
        if encoder == MODULATION:
            self.told.enter_context(in_pipeline(self.reference, {name: row}))
        else:
            super().add_row(name, encoder, row)


class FluxWithOffsets(WithOffsets, families.FluxUnderTest):
    """FLUX.1."""


class StableDiffusion3WithOffsets(WithOffsets, families.FlowUnderTest):
    """Stable Diffusion 3.x."""


def flux(**settings: Any) -> BackboneUnderTest:
    plain = families.flux(folder("flux"), image_size=64)
    values = {"model": str(folder("flux")), "steps": 2, "image_size": 64, **settings}
    backbone = ModulatedFlux(ModulatedFlux.Settings(**values), "cpu")
    return FluxWithOffsets(backbone, plain.reference, encoders=plain.encoders, call=plain.call)


def sd3(**settings: Any) -> BackboneUnderTest:
    kind = ModulatedStableDiffusion3
    plain = families.sd3(folder("sd3"))
    backbone = kind(kind.Settings(model=str(folder("sd3")), steps=2, **settings), "cpu")
    return StableDiffusion3WithOffsets(backbone, plain.reference, encoders=plain.encoders, call=plain.call)


flux_with_offsets = functools.cache(flux)

QUICK = {
    "its_facts_are_consistent",
    "rows_of_words",
    "wrong_rows_and_prompts_are_refused",
    "texts_are_points",
    "a_batch_is_its_parts",
    "gradients_reach_every_row",
    "the_prediction_is_the_pipelines",
    "saved_tokens_are_loaded_by_the_pipeline",
    "calls_leave_nothing_behind",
}
"""The checks that an offset can fail, if the family beside it passes all."""


@pytest.mark.parametrize("check", [one for one in checks_of("backbone") if one.__name__ in QUICK])
def test_conforms(check: Any) -> None:
    check(flux_with_offsets())


@pytest.mark.slow
@parametrize_with_checks([flux(gradient_checkpointing=True), sd3()])
def test_all_conforms(check: Any, subject: Any) -> None:
    check(subject)


@functools.cache
def modulated_sd3() -> ModulatedStableDiffusion3:
    backbone = sd3().backbone
    assert isinstance(backbone, ModulatedStableDiffusion3)
    return backbone


@pytest.mark.slow
@parametrize_with_checks([LearnerUnderTest(ModulationLearner, backbone=modulated_sd3())])
def test_the_learner_conforms(check: Any, subject: Any) -> None:
    check(subject)


def test_an_offset_steers_its_own_positions_alone() -> None:
    """The states of other positions are normalised and gated as before, bit for bit; zero changes nothing at all."""
    backbone = modulated_sd3()
    block = backbone.transformer.transformer_blocks[0]
    states, told = torch.randn(2, 5, 32), torch.randn(2, 32)
    plain, *numbers = block.norm1_context(states, emb=told)
    offsets = Offsets(torch.randn(2, 1, 32), torch.tensor([[3], [-1]]))
    with offset_block(block, offsets):
        changed, *given = block.norm1_context(states, emb=told)
    here = torch.zeros(2, 5, dtype=torch.bool)
    here[0, 3] = True
    assert torch.equal(changed[~here], plain[~here]) and not torch.isclose(changed[here], plain[here]).any()
    [expected, *_] = block.norm1_context(states[:1], emb=told[:1] + offsets.values[0])
    torch.testing.assert_close(changed[0, 3], expected[0, 3])
    assert all(bool((one == one.flatten()[0]).all()) for one in given) and len(given) == len(numbers)
    assert not block.norm1_context._forward_hooks

    noisy, at = torch.randn(1, *backbone.latent_shape), torch.tensor([0.5])
    word = {"<cup-0>": backbone.word_rows("cup")}
    with torch.no_grad():
        of_word = backbone.predict(noisy, at, backbone.encode_prompts(["a cup"])).output
        of_token = backbone.predict(noisy, at, backbone.encode_prompts(["a <cup-0>"], word)).output
    assert torch.equal(of_word, of_token)


@pytest.mark.parametrize("make", [flux, sd3])
def test_gradients_are_the_same_where_blocks_are_computed_again(make: Any) -> None:
    gradients = []
    for again in (False, True):
        backbone = make(gradient_checkpointing=again).backbone
        noisy = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        offset = torch.full((backbone.rows[MODULATION],), 0.1, requires_grad=True)
        token = {"<cup-0>": {**backbone.word_rows("cup"), MODULATION: offset}}
        encoded = backbone.encode_prompts(["a red <cup-0>"], token)
        backbone.predict(noisy, torch.tensor([0.5]), encoded, Look(words=(8,))).output.square().sum().backward()
        gradients.append(offset.grad)
    assert gradients[0] is not None and gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_a_backbone_without_offsets_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="take --backbone flux-modulation or sd3-modulation, with another"):
        ModulationLearner(ModulationLearner.Settings(), tiny_backbone((64, 64)))


def test_a_run_and_two_mixed(tmp_path: Path) -> None:
    """Whoever asks for the learner gets the backbone; words stay and offsets are learned; diffusers draws the same."""
    pixels = np.full((64, 64, 3), 200, dtype=np.uint8)
    pixels[16:40, 20:44] = (180, 30, 40)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    options = {
        "components": {"retriever": "words", "segmentor": "xattn", "learner": "modulation"},
        "backbone": {"model": str(folder("flux")), "steps": 1, "image_size": 64},
        "retriever": {"words": ["cup"]},
        "attributes": ["colour"],
        "learner": {"steps": 4, "learning_rate": 0.1},
        "naming": "alone",
        "samples": 1,
        "max_concepts": 1,
        "device": "cpu",
    }
    run = extract(tmp_path / "photo.png", tmp_path / "run", load_settings(options=options))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["components"]["backbone"] == "flux-modulation"
    backbone = ModulatedFlux(ModulatedFlux.Settings(model=str(folder("flux")), image_size=64), "cpu")
    for part, word in (("category", "cup"), ("instance", "cup"), ("colour", "colour")):
        token = run.tokens[manifest["concepts"][0]["tokens"][part]]
        assert {name: len(row) for name, row in token.items()} == manifest["backbone"]["rows"]
        for name, row in backbone.word_rows(word).items():
            assert torch.equal(token[name], row) is (name != MODULATION), (part, name)
    made = compose("{a.colour} {b} on a table", {"a": run, "b": run}, n=1, out=tmp_path / "mixed")
    with Image.open(made.images[0]) as picture:
        assert picture.size == (64, 64)

    subject = flux()
    prompt = "a photo of <cup-0> on a table"
    subject.load_token("<cup-0>", tmp_path / "run" / "embeddings" / "cup-0.safetensors")
    [own] = backbone.generate([prompt], seeds=[5], tokens=run.tokens, steps=2, guidance_scale=5.0)
    other = subject.reference_picture(prompt, 5, num_inference_steps=2)
    assert np.abs(np.asarray(own, float) - np.asarray(other, float)).max() <= 2
