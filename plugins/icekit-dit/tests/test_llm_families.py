"""Sana and Z-Image: the conformance checks, and what is their own."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llm_models as tiny
import torch
from diffusers import SanaPipeline, ZImagePipeline
from icekit_dit.llm_encoder import lower_plain, mean_of_words
from icekit_dit.sana import Sana
from icekit_dit.z_image import ZImage, rotated
from PIL import Image
from torch import Tensor

from icekit import extract
from icekit.backbones.common import quiet
from icekit.protocols import InputError
from icekit.run.compose import compose
from icekit.run.directory import RunDirectory
from icekit.run.in_diffusers import python_code
from icekit.run.records import BackboneRecord
from icekit.settings import load_settings
from icekit.testing import BackboneUnderTest, parametrize_with_checks


@functools.cache
def temporary() -> tempfile.TemporaryDirectory[str]:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="icekit-dit-")


@functools.cache
def folder(name: str) -> Path:
    return getattr(tiny, f"write_{name}")(Path(temporary().name) / name)


@dataclass
class FlowUnderTest(BackboneUnderTest):
    """A backbone whose transformer is told how much is noise, times 1000."""

    def share_of(self, timestep: float) -> float:
        return self.backbone.share_of(timestep / 1000)


@dataclass
class ZImageUnderTest(FlowUnderTest):
    """Its transformer takes and returns lists of pictures of one frame, and counts time from noise to picture."""

    def call_of(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, float]:
        frames, time = arguments[:2]
        return torch.stack(frames).squeeze(2), 1000 * (1 - float(time[0]))

    def output_of(self, returned: Any) -> Tensor:
        return -torch.stack(list(returned[0])).squeeze(2)

    def returned(self, prediction: Tensor) -> Any:
        return (list(-prediction.unsqueeze(2)),)


def sana() -> BackboneUnderTest:
    with quiet():
        pipeline = SanaPipeline.from_pretrained(folder("sana"))
    backbone = Sana(Sana.Settings(model=str(folder("sana")), steps=2, image_size=(64, 96)), "cpu")
    return FlowUnderTest(backbone, pipeline, call={"use_resolution_binning": False}, takes_space=True)


def z_image() -> BackboneUnderTest:
    with quiet():
        pipeline = ZImagePipeline.from_pretrained(folder("z_image"))
    backbone = ZImage(ZImage.Settings(model=str(folder("z_image")), steps=2, image_size=(64, 96)), "cpu")
    return ZImageUnderTest(backbone, pipeline, takes_space=True, unguided=0.0)


@parametrize_with_checks([sana(), z_image()])
def test_conforms(check: Any, subject: Any) -> None:
    check(subject)


def test_sana_with_the_other_scheduler_and_without_the_instruction(tmp_path: Path) -> None:
    """The prediction is the pipeline's without an instruction; its schedule is shifted as much as the other."""
    path = tiny.write_sana(tmp_path / "sana", flow_match=True)
    backbone = Sana(Sana.Settings(model=str(path), instruction=False, image_size=64), "cpu")
    with quiet():
        pipeline = SanaPipeline.from_pretrained(path)
    call = {"use_resolution_binning": False, "complex_human_instruction": None}
    subject = FlowUnderTest(backbone, pipeline, call=call, takes_space=True)
    from icekit.testing.backbone.common import assert_predicts_as_the_pipeline

    assert_predicts_as_the_pipeline(subject, "A photo of a CUP", {})
    assert backbone.share_of(0.75) == pytest.approx(0.5)  # a shift of 3: 3 / 2 over 1 + 2 / 2


@pytest.mark.parametrize("kind", [Sana, ZImage])
def test_words_and_tokens_in_a_prompt(kind: Any) -> None:
    """A token is where its word would be, with the space before it; of the instruction nothing is shown."""
    model = folder("sana" if kind is Sana else "z_image")
    backbone = kind(kind.Settings(model=str(model), image_size=64), "cpu")
    token = {"<cup-0>": backbone.word_rows("cup")}
    [word], [place] = (
        backbone.token_positions("a red cup", ["cup"]),
        backbone.token_positions("a red <cup-0>", ["<cup-0>"], token),
    )
    assert word == place and len(word) == 1
    plain, learned = backbone.encode_prompts(["a red cup"]), backbone.encode_prompts(["a red <cup-0>"], token)
    torch.testing.assert_close(plain.parts["sequence"], learned.parts["sequence"])
    length = plain.parts["sequence"].shape[1]
    assert length == 4 if kind is Sana else length > 4  # <bos>, three words; or a chat around them
    with pytest.raises(InputError, match=r"prompt too long, \d+ tokens of at most \d+: 'cup cup"):
        backbone.encode_prompts([" ".join(["cup"] * 600)])
    torch.testing.assert_close(backbone.embed_texts(["<cup-0>"], token), backbone.embed_texts(["cup"]))


def test_lower_case_of_words_alone() -> None:
    assert lower_plain(" A Photo of <Cup-0>  On A <x> Table ") == "a photo of <Cup-0>  on a <x> table"


def test_the_mean_of_words_by_hand() -> None:
    states = torch.tensor([[[9.0, 9.0], [3.0, 0.0], [0.0, 4.0]], [[9.0, 9.0], [0.0, 2.0], [7.0, 7.0]]])
    words = torch.tensor([[False, True, True], [False, True, False]])
    torch.testing.assert_close(mean_of_words(states, words), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_rotations_by_hand() -> None:
    """A quarter turn of (1, 0) is (0, 1)."""
    states, turn = torch.tensor([1.0, 0.0, 2.0, 0.0]).view(1, 1, 1, 4), torch.tensor([1j, 1.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(rotated(states, turn).flatten(), torch.tensor([0.0, 1.0, 2.0, 0.0]))


def test_a_sana_of_another_schedule_is_refused(tmp_path: Path) -> None:
    path = shutil.copytree(folder("sana"), tmp_path / "sana")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_flow_sigmas": False}))
    with pytest.raises(InputError, match="use_flow_sigmas"):
        Sana(Sana.Settings(model=str(path), image_size=64), "cpu")


@pytest.mark.parametrize("name", ["sana", "z_image"])
def test_a_run_and_two_mixed(name: str, tmp_path: Path) -> None:
    """The family is read from the model; what the report shows for diffusers draws what icekit draws."""
    photo = tmp_path / "photo.png"
    pixels = np.full((48, 64, 3), 200, dtype=np.uint8)
    pixels[16:40, 20:44] = (180, 30, 40)
    Image.fromarray(pixels).save(photo)
    mask = tmp_path / "mask.png"
    Image.fromarray((pixels[..., 1] < 100).astype(np.uint8) * 255).save(mask)
    # Sana has no map of places over places, and so takes masks from elsewhere.
    segmentor = "masks" if name == "sana" else "xattn"
    options = {
        "components": {"retriever": "words", "segmentor": segmentor, "learner": "ice"},
        "segmentor": {"masks": {"files": [str(mask)], "words": ["cup"]}} if segmentor == "masks" else {},
        "backbone": {"model": str(folder(name)), "steps": 1, "image_size": 64},
        "retriever": {"words": ["cup"]},
        "attributes": ["colour"],
        "learner": {"steps": 2},
        "samples": 1,
        "max_concepts": 1,
        "device": "cpu",
    }
    run = extract(photo, tmp_path / "run", load_settings(options=options))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["components"]["backbone"] == name.replace("_", "-")
    assert list(manifest["concepts"][0]["tokens"].values()) == ["<cup-0>", "<cup-0-instance>", "<cup-0-colour>"]
    record = BackboneRecord.model_validate(manifest["backbone"])
    assert not record.pipeline_loads_tokens and record.pipeline_takes_space
    made = compose("{a.colour} {b} on a table", {"a": run, "b": run}, n=1, out=tmp_path / "mixed")
    with Image.open(made.images[0]) as picture:
        assert picture.size == (64, 64)

    place, prompt = tmp_path / "run", "a photo of a <cup-0-instance> <cup-0>"
    code = python_code(RunDirectory(place), str(place), record.pipeline_source or "", record, prompt)
    how = "num_inference_steps=2, guidance_scale=3.0, height=64, width=64, generator=torch.Generator().manual_seed(1)"
    how += ", use_resolution_binning=False" * (name == "sana")
    scope: dict[str, Any] = {"torch": torch}
    exec(code.replace(").images", f", {how}).images"), scope)
    kind = Sana if name == "sana" else ZImage
    backbone = kind(kind.Settings(model=str(folder(name)), image_size=64), "cpu")
    prompt = code.partition('image = pipe(prompt="')[2].partition('"')[0]
    [own] = backbone.generate([prompt], seeds=[1], tokens=run.tokens, steps=2, guidance_scale=3.0)
    assert np.abs(np.asarray(own, float) - np.asarray(scope["image"], float)).max() <= 2
