"""Runs that an observer stops, read and corrected between the stages, and one model for many calls."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import plain_components as plain
import pytest
import torch
from icekit_process import in_this_process
from PIL import Image

from icekit import InputError, StopRun, Unfinished, compose, extract, hookimpl, load_model, load_settings
from icekit.plugins import Plugins
from icekit.settings import Settings, merge


@pytest.fixture
def plugins() -> Plugins:
    return plain.beside_builtins()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def plain_settings(**given: Any) -> Settings:
    return load_settings(
        options=merge({"components": plain.NAMES, "samples": 1, "max_concepts": 2, "exporters": []}, given)
    )


class Stopper:
    """Stops before a stage, or after a learning step, a region or a sample."""

    def __init__(self, stage: str = "", step: int = 0, region: int = -1, sample: int = 0) -> None:
        self.at = {"stage": stage, "step": step, "region": region, "sample": sample}
        self.told: list[str] = []

    def _stop_if(self, what: str, where: object) -> None:
        if self.at[what] == where:
            raise StopRun(f"stopped at {what} {where}")

    @hookimpl
    def stage_started(self, name: str) -> None:
        self._stop_if("stage", name)

    @hookimpl
    def region_found(self, region: Any) -> None:
        self._stop_if("region", region.index)

    @hookimpl
    def step_done(self, step: Any) -> None:
        self._stop_if("step", step.step)

    @hookimpl
    def image_generated(self, done: int) -> None:
        self._stop_if("sample", done)

    @hookimpl
    def run_failed(self, error: BaseException) -> None:
        self.told.append(str(error))
        raise StopRun("too late")  # it changes nothing of what is told


def tokens_of(folder: Path) -> bytes:
    return (folder / "embeddings.safetensors").read_bytes()


@pytest.mark.parametrize("where", [{"region": 0}, {"stage": "learn"}, {"step": 3}, {"sample": 2}], ids=str)
def test_an_observer_stops_a_run_which_goes_on_bit_for_bit(
    plugins: Plugins, photo: Path, tmp_path: Path, where: dict[str, Any]
) -> None:
    extract(photo, tmp_path / "whole", plain_settings(), installed=plugins)
    stopper = Stopper(**where)
    with pytest.raises(StopRun, match="stopped at") as stopped:
        extract(photo, tmp_path / "run", plain_settings(), installed=plugins, observers=[stopper])
    assert stopper.told == [str(stopped.value)]
    assert not (tmp_path / "run" / "manifest.json").exists()
    extract(photo, tmp_path / "run", resume=True, installed=plugins)
    assert tokens_of(tmp_path / "run") == tokens_of(tmp_path / "whole")


def test_what_a_stopped_run_has_found_is_read(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(StopRun):
        extract(photo, run, plain_settings(), installed=plugins, observers=[Stopper(region=0)])
    begun = Unfinished.open(run)
    assert [one.word for one in begun.located.regions] == ["cup"]
    assert (begun.located.finished, begun.learning, begun.picture.size) == (False, False, (32, 32))
    with pytest.raises(StopRun):
        extract(photo, run, resume=True, installed=plugins, observers=[Stopper(step=2)])
    begun = Unfinished.open(run)
    assert [one.word for one in begun.located.regions] == ["cup", "red bowl"]
    assert (begun.located.finished, begun.learning, begun.settings.max_concepts) == (True, True, 2)
    extract(photo, run, resume=True, installed=plugins)
    with pytest.raises(InputError, match=r"is complete: icekit\.Extraction\.open reads it"):
        Unfinished.open(run)
    with pytest.raises(InputError, match="there is no run under way in"):
        Unfinished.open(tmp_path)


def test_corrected_regions_are_learned_in_the_place_of_those_that_were_found(
    plugins: Plugins, photo: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(StopRun):
        extract(photo, run, plain_settings(), installed=plugins, observers=[Stopper(step=3)])
    located = Unfinished.open(run).located
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:4] = True
    first, second = located.regions
    corrected = dataclasses.replace(located, regions=(dataclasses.replace(first, word="mug", mask=mask), second))
    done = extract(photo, run, resume=True, located=corrected, installed=plugins)
    assert [one.label for one in done.concepts] == ["mug", "red-bowl"]
    assert done.concepts[0].mask().sum() == 4 * 32
    afresh = extract(photo, tmp_path / "afresh", plain_settings(), located=corrected, installed=plugins)
    assert tokens_of(run) == tokens_of(afresh.run_dir)
    names = {path.name for path in run.rglob("*")}
    assert "cup-0.safetensors" not in names
    assert "0-cup.png" not in names
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_the_same_regions_are_no_correction(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(StopRun):
        extract(photo, run, plain_settings(), installed=plugins, observers=[Stopper(step=7)])
    steps: list[int] = []

    class Steps:
        @hookimpl
        def step_done(self, step: Any) -> None:
            steps.append(step.step)

    located = Unfinished.open(run).located
    extract(photo, run, resume=True, located=located, installed=plugins, observers=[Steps()])
    assert steps[0] == 6, "learning did not go on from its checkpoint"


def test_one_model_for_several_calls(
    plugins: Plugins, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(plain_settings(), plugins)
    monkeypatch.setattr(plain.PlainBackbone, "__init__", lambda *_: pytest.fail("a model was loaded"))
    run = extract(photo, tmp_path / "run", plain_settings(), installed=plugins, backbone=model)
    made = compose("a {a}", {"a": run}, n=1, out=tmp_path / "mix", installed=plugins, backbone=model)
    assert [path.name for path in made.images] == ["0.png"]


def test_the_command_says_how_a_stopped_run_goes_on(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    icekit = in_this_process(tmp_path, monkeypatch, capsys)
    found = plain.beside_builtins(plain=plain, stops=Stopper(step=2))
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    status, _, said = icekit("run", photo, "--out", "run", *(f"--{role}=plain" for role in plain.NAMES))
    assert status == 1
    assert f"icekit: stopped at step 2: `icekit run {photo} --out run --resume` goes on\n" in said
