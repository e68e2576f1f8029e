"""The family is read from the model: ``--model`` needs no other option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from icekit_process import with_what_is_installed
from PIL import Image
from plain_components import beside_builtins
from safetensors.torch import load_file, save_file
from single_files import write_single_file

from icekit import InputError, Settings
from icekit.backbones.families import plugin_for
from icekit.plugins import installed
from icekit.testing.tiny import tiny_pipeline, tiny_xl_pipeline


def backbone_of(model: str | Path, **settings: object) -> str:
    given = Settings.model_validate({"backbone": {"model": str(model)}} | settings)
    return installed().resolve(given).components.backbone


def test_folders(sd15_folder: Path, sd_v_folder: Path, sdxl_folder: Path) -> None:
    assert backbone_of(sd15_folder) == backbone_of(sd_v_folder) == "sd21"
    assert backbone_of(sdxl_folder) == "sdxl"
    assert backbone_of(sdxl_folder, components={"backbone": "sd21"}) == "sd21"  # who says it himself is believed


def test_files(tmp_path: Path) -> None:
    xl = write_single_file(tiny_xl_pipeline(), tmp_path / "xl.safetensors")
    assert backbone_of(xl) == "sdxl"
    assert backbone_of(write_single_file(tiny_pipeline(version=1), tmp_path / "one.safetensors")) == "sd21"


def test_a_family_that_there_is_no_backbone_for(tmp_path: Path) -> None:
    """Those of installed plugins are among those that there are."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(InputError) as error:
        backbone_of(tmp_path)
    said = str(error.value)
    assert "made for PixArtSigmaPipeline" in said
    assert "StableDiffusionPipeline (backbone sd21), StableDiffusionXLPipeline (backbone sdxl)" in said
    assert "StableDiffusion3Pipeline (backbone sd3)" in said and "FluxPipeline (backbone flux)" in said


def test_what_to_install_for_a_family_that_a_known_plugin_has(tmp_path: Path) -> None:
    """Of a folder, and of a file whose layout nobody here reads."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    marks = ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight")
    save_file({mark: torch.zeros(2) for mark in marks}, tmp_path / "flux.safetensors")
    for model in (tmp_path, tmp_path / "flux.safetensors"):
        with pytest.raises(InputError, match=r"made for FluxPipeline, .*`pip install icekit-dit` brings one"):
            beside_builtins().resolve(Settings.model_validate({"backbone": {"model": str(model)}}))


def test_what_is_known_of_plugins_is_so() -> None:
    """Each has a backbone for these pipelines, where it is installed."""
    takes = {
        pipeline: one.origin.distribution
        for one in installed().offered("backbone").values()
        for pipeline in getattr(one.settings, "pipelines", ())
    }
    known = ("StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline", "Flux2KleinPipeline", "ZImagePipeline")
    for pipeline in known:
        assert plugin_for(pipeline) == takes[pipeline]
    assert plugin_for("StableDiffusionPipeline") is None


def test_where_nothing_says_it_the_default_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert backbone_of(tmp_path / "empty") == backbone_of(tmp_path / "nowhere") == "sd21"


def test_a_damaged_index(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"^backbone.model = .*model_index.json cannot be read"):
        backbone_of(folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    image = Image.new("RGB", (96, 64), (200, 200, 200))
    image.paste((180, 30, 40), (24, 16, 60, 50))
    image.save(file)
    mask = Image.new("L", (96, 64))
    mask.paste(255, (24, 16, 60, 50))
    mask.save(file.with_name("mask.png"))
    return file


def test_a_run_of_stable_diffusion_xl(
    sdxl_folder: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the program, to tokens of two rows, a composition and a report."""
    call = with_what_is_installed(tmp_path, monkeypatch, capsys)
    values = ("backbone.image_size=[64, 96]", "backbone.steps=2", "retriever.words=cup", "learner.steps=4", "samples=1")
    sets = [f"--set={value}" for value in (*values, f"segmentor.files={photo.with_name('mask.png')}")]
    out = tmp_path / "run"
    components = ["--retriever", "words", "--segmentor", "masks", "--attribute", "colour"]
    status, _, err = call("run", photo, "--model", sdxl_folder, "--out", out, *components, *sets)
    assert status == 0, err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["components"]["backbone"] == "sdxl"
    for token in ("cup-0", "cup-0-instance", "cup-0-colour"):
        rows = load_file(out / "embeddings" / f"{token}.safetensors")
        assert {name: tuple(row.shape) for name, row in rows.items()} == {"clip_l": (32,), "clip_g": (48,)}
    status, _, err = call("compose", "a {a.category} {a.colour}", f"a={out}", "--n", "1", "--out", tmp_path / "made")
    assert status == 0, err
    assert Image.open(next((tmp_path / "made").glob("*.png"))).size == (96, 64)
