"""Whole runs on Stable Diffusion 3.x and FLUX.1: the family is read from the model, tokens go into its own pipeline."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from icekit_dit.flux import Flux
from icekit_dit.sd3 import StableDiffusion3
from PIL import Image
from safetensors.torch import load_file
from tiny_transformers import write_photo

from icekit import Settings, extract
from icekit.plugins import installed
from icekit.protocols import Learned
from icekit.run.compose import compose
from icekit.run.directory import RunDirectory
from icekit.run.in_diffusers import python_code
from icekit.run.records import BackboneRecord
from icekit.settings import load_settings
from icekit.testing.scenes import two_objects


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than high, with a red square."""
    return write_photo(tmp_path_factory.mktemp("photo") / "photo.png", width=96)


def options(folder: Path, segmentor: str, **backbone: Any) -> dict[str, Any]:
    """Nothing says which backbone."""
    return {
        "components": {"retriever": "words", "segmentor": segmentor, "learner": "ice"},
        "backbone": {"model": str(folder), "steps": 1, **backbone},
        "retriever": {"words": ["cup"]},
        "attributes": ["colour"],
        "learner": {"steps": 2},
        "samples": 1,
        "max_concepts": 1,
        "device": "cpu",
    }


def test_a_run_of_each_family_and_both_mixed(
    photo: Path, sd3_folder: Path, flux_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A picture is seen whole; FLUX's rows are warned of, SD 3's are not; a run's own tokens are composed."""
    runs = {}
    for name, folder, segmentor, size in (
        ("sd3", sd3_folder, "conceptattention", {}),
        ("flux", flux_folder, "conceptattention", {"image_size": [48, 96]}),
    ):
        caplog.clear()
        settings = load_settings(options=options(folder, segmentor, **size))
        runs[name] = extract(photo, tmp_path / name, settings)
        warned = any("--learner modulation" in record.message for record in caplog.records)
        assert warned is (name == "flux")
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["components"]["backbone"] == name
        assert manifest["backbone"]["pipeline_loads_tokens"] is (name == "flux")
        height, width = manifest["image"]["height"], manifest["image"]["width"]
        assert width / height == pytest.approx(2, rel=0.15)
        with Image.open(tmp_path / name / "samples" / "0-colour-0.png") as sample:
            assert sample.size == (width, height)
        rows = load_file(tmp_path / name / "embeddings" / "cup-0-colour.safetensors")
        assert {encoder: len(row) for encoder, row in rows.items()} == manifest["backbone"]["rows"]
        assert (tmp_path / name / "attention" / "0-colour.png").is_file()
    made = compose("a {a.colour} {b}", {"a": runs["flux"], "b": runs["flux"]}, n=1, out=tmp_path / "mixed")
    assert made.expanded == "a <a-cup-0-colour> <b-cup-0-instance> <b-cup-0>"
    with Image.open(made.images[0]) as picture:
        assert picture.size == (96, 48)


@pytest.mark.slow
def test_a_run_with_attention_weights(photo: Path, sd3_folder: Path, flux_folder: Path, tmp_path: Path) -> None:
    for folder, size in ((sd3_folder, {}), (flux_folder, {"image_size": [48, 96]})):
        settings = load_settings(options=options(folder, "xattn", **size))
        assert extract(photo, tmp_path / folder.name, settings).concepts


def test_what_places_look_at_can_be_clustered(flux_folder: Path) -> None:
    """``diffseg`` has regions; which of them is a cup, weights that know nothing do not say."""
    backbone = Flux(Flux.Settings(model=str(flux_folder), steps=1, image_size=(48, 96)), "cpu")
    component: Any = installed().component("segmentor", "diffseg")
    segmentor = component(component.Settings(), backbone)
    mask = segmentor.segment(two_objects((48, 96)).view(), "cup", torch.Generator().manual_seed(0))
    mask = getattr(mask, "mask", mask)
    assert mask.shape == (48, 96) and mask.dtype == torch.bool


@pytest.mark.parametrize(("kind", "more"), [(StableDiffusion3, {}), (StableDiffusion3, {"t5": False}), (Flux, {})])
def test_the_lines_for_diffusers(
    kind: Any, more: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """They run as they stand, and the picture is icekit's: SD 3's pipeline has no ``load_textual_inversion``, and must
    be told where T5 was left out.
    """
    folder = request.getfixturevalue("flux_folder" if kind is Flux else "sd3_folder")
    backbone = kind(kind.Settings(model=str(folder), steps=2, image_size=(48, 64), **more), "cpu")
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: {
            encoder: row.std() * torch.randn(row.shape, generator=generator)
            for encoder, row in backbone.word_rows("cup").items()
        }
        for name in ("<cup-0>", "<cup-0-colour>")
    }
    RunDirectory(tmp_path).save_learned(Learned(rows))
    facts = [name for name in BackboneRecord.model_fields if hasattr(backbone, name)]
    record = BackboneRecord.model_validate({name: _plain(getattr(backbone, name)) for name in facts})
    prompt = "a photo of a <cup-0-colour> <cup-0>"
    code = python_code(RunDirectory(tmp_path), str(tmp_path), record.pipeline_source or "", record, prompt)
    assert ("load_textual_inversion" in code) is (kind is Flux)
    scope: dict[str, Any] = {"torch": torch}
    how = "height=48, width=64, num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(1)"
    exec(re.sub(r"\)\.images\[0\]", f", {how}).images[0]", code), scope)
    [own] = backbone.generate([prompt], seeds=[1], tokens=rows, steps=2, guidance_scale=3.0)
    assert np.abs(np.asarray(own, float) - np.asarray(scope["image"], float)).max() <= 1


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dict(value) if hasattr(value, "items") else value))


def test_entry_point(sd3_folder: Path, flux_folder: Path) -> None:
    [entry] = entry_points(group="icekit", name="dit")
    assert entry.dist is not None and entry.dist.name == "icekit-dit"
    plugins = installed()
    assert [str(broken) for broken in plugins.broken if broken.origin.plugin == "dit"] == []
    for role, name in (("backbone", "sd3"), ("backbone", "flux"), ("segmentor", "conceptattention")):
        registered = plugins.offered(role)[name]
        assert registered.origin.distribution == "icekit-dit"
        assert plugins.component(role, name).__module__.startswith("icekit_dit.")
    for folder, name in ((sd3_folder, "sd3"), (flux_folder, "flux")):
        given = Settings.model_validate({"backbone": {"model": str(folder)}})
        assert plugins.resolve(given).components.backbone == name


def test_declaring_them_is_quick() -> None:
    """Whoever lists plugins waits for none of the libraries that take seconds to import."""
    heavy = ("torch", "torchvision", "transformers", "diffusers", "numpy")
    code = f"import sys, icekit_dit.plugin; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
