"""What a model will need of memory, said before it is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from icekit import plugins
from icekit.backbones.estimate import GIB, Measured, memory_need, weights_in
from icekit.backbones.file_layouts import read_layout
from icekit.backbones.settings import StableDiffusionSettings
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.cli.program import main
from icekit.protocols import InputError, MemoryNeed
from icekit.run.machine import check_memory, free_memory, memory_needed
from icekit.settings import Settings
from icekit.testing import tiny

CPU = torch.device("cpu")
MEASURED = Measured(learning=8.0, checkpointed=2.0, drawing=1.0, decoding=4.0, source="made up")
COUNTS = {"text_encoder": GIB, "unet": 4 * GIB, "vae": GIB // 4}
SIZES = {"text_encoder": 4, "unet": 2, "vae": 4}


def needed(in_turn: bool = False, **settings) -> tuple[float, ...]:
    """Weights, learning and drawing for two pictures of a million pixels, GiB."""
    own = StableDiffusionSettings(**settings)
    need = memory_need(COUNTS, SIZES, "unet", own, MEASURED, pixels=10**6, pictures=2, in_turn=in_turn)
    return tuple(round(one / GIB, 2) for one in (need.weights, need.learning, need.drawing))


def test_needs_by_hand() -> None:
    weights = 4 + 8 + 1 + 1  # text encoder, noise predictor, autoencoder, and what is beside them
    assert needed() == (weights, weights + 2 * 8, weights + 4)
    assert needed(gradient_checkpointing=True) == (weights, weights + 2 * 2, weights + 4)
    assert needed(images_at_once=3) == (weights, weights + 16, weights + 12)
    # The noise predictor is the largest part; text encoder and noise predictor learn, one picture is decoded at a time.
    assert needed(in_turn=True, low_memory="on", images_at_once=3) == (8 + 1, 4 + 8 + 2 * 2 + 1, 8 + 3 * 1 + 1)


def test_weights_are_counted_as_they_are(sd15_folder: Path, tmp_path: Path) -> None:
    parts = tiny.tiny_pipeline(version=1, seed=1).components
    expected = {name: sum(one.numel() for one in parts[name].parameters()) for name in ("text_encoder", "unet", "vae")}
    found = weights_in(sd15_folder)
    assert found == expected
    (tmp_path / "cut.safetensors").write_bytes(
        (sd15_folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()[:9]
    )
    assert weights_in(tmp_path / "cut.safetensors", {"": "vae"}) == {}


class TestBeforeARun:
    """A run with the tiny model on a machine with so much memory."""

    @pytest.fixture(autouse=True)
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(StableDiffusion, "measured", Measured(400.0, 100.0, 10.0, 10.0, "made up"))

    def run_settings(self, folder: Path, **backbone) -> Settings:
        return plugins.installed().resolve(Settings(backbone={"model": str(folder), **backbone}))

    def need(self, folder: Path, **more) -> MemoryNeed:
        found = memory_needed(plugins.installed(), self.run_settings(folder, **more), CPU)
        assert found is not None
        return found

    def said(self, folder: Path, free: int, monkeypatch, caplog, **backbone) -> str:
        monkeypatch.setattr("icekit.run.machine.free_memory", lambda device: free)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "icekit"):
            check_memory(plugins.installed(), self.run_settings(folder, **backbone), CPU)
        return caplog.text

    def test_enough(self, sd_folder: Path, monkeypatch, caplog) -> None:
        assert self.said(sd_folder, self.need(sd_folder).learning, monkeypatch, caplog) == ""
        assert free_memory(CPU) > 2**28

    def test_the_quickest_setting_that_fits_is_named(self, sd_folder: Path, monkeypatch, caplog) -> None:
        free = self.need(sd_folder, gradient_checkpointing=True).learning
        said = self.said(sd_folder, free, monkeypatch, caplog)
        assert f"backbone.model = {str(sd_folder)!r}" in said and "cpu has" in said
        assert 'Settings(backbone={"gradient_checkpointing": True}) needs about' in said and "too much" not in said

    def test_nothing_fits(self, sd_folder: Path, monkeypatch, caplog) -> None:
        free = self.need(sd_folder).weights + 1
        said = self.said(sd_folder, free, monkeypatch, caplog)
        assert (
            'Settings(backbone={"low_memory": "on"}, learner={"max_batch": 1}) needs about' in said
            and "too much as well" in said
        )

    def test_weights_that_do_not_fit_are_refused(self, sd_folder: Path, monkeypatch, tmp_path, capsys) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("icekit.run.machine.free_memory", lambda device: 2**20)
        tiny_picture = tmp_path / "photo.png"
        from PIL import Image

        Image.new("RGB", (64, 64), "red").save(tiny_picture)
        with pytest.raises(SystemExit) as end:
            main(["run", "photo.png", "--out", "run", "--model", str(sd_folder), "--device", "cpu"])
        [*_, last] = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and "its weights alone take 1.0 GiB, and cpu has 0.0 GiB free" in last
        assert not (tmp_path / "run").exists()

    def test_drawing_alone_takes_less(self, sd_folder: Path, monkeypatch, caplog) -> None:
        monkeypatch.setattr("icekit.run.machine.free_memory", lambda device: self.need(sd_folder).drawing)
        check_memory(plugins.installed(), self.run_settings(sd_folder), CPU, learns=False)
        assert caplog.text == ""

    def test_of_a_model_that_is_not_there_nothing_is_known(self, tmp_path: Path) -> None:
        for model in ("owner/nothing", str(tmp_path / "nothing")):
            assert StableDiffusion.memory_needed(StableDiffusionSettings(model=model), CPU, 1) is None


def test_one_file_is_counted_by_its_parts(tmp_path: Path) -> None:
    names = {"model.diffusion_model.a": 3, "model.diffusion_model.b": 4, "first_stage_model.a": 5, "alphas": 6}
    save_file({name: torch.zeros(2, count) for name, count in names.items()}, tmp_path / "model.safetensors")
    prefixes = read_layout("package:icekit/backbones/layouts/sd1.json").prefixes
    assert weights_in(tmp_path / "model.safetensors", prefixes) == {"unet": 14, "vae": 10}


def test_the_option_sets_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def asked(name: str):
        def called(*arguments, **named) -> None:
            given[name] = named.get("low_memory", arguments)
            raise InputError("that is all")

        return called

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("a.png")
    monkeypatch.setattr("icekit.run.orchestrator.extract", asked("run"))
    monkeypatch.setattr("icekit.run.compose.compose", asked("compose"))
    for arguments in (["run", "a.png", "--model", "b", "--low-memory"], ["compose", "{a}", "a=b", "--low-memory"]):
        with pytest.raises(SystemExit):
            main(arguments)
    _, _, settings = given["run"]
    assert settings.backbone == {"model": "b", "low_memory": "on"}
    assert given["compose"] is True
