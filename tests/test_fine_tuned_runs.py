"""A learner that trained all weights of the noise predictor: what the run keeps of them, and who draws with them."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from icekit import InputError, RunError, extract, hookimpl
from icekit.bench.directory import BenchDirectory
from icekit.bench.outcome import MeasuredOutcome
from icekit.plugins import Origin, Plugins
from icekit.protocols import BenchImage, FineTuning, Learned
from icekit.run.compose import compose
from icekit.run.directory import FileCheckpoint, RunDirectory, write_tensors_atomically
from icekit.settings import Settings, load_settings

CONFIG = {"_class_name": "UNet2DConditionModel", "sample_size": 8}
SEEN: list[tuple[str, float | None]] = []
"""Prompts that were drawn, and the weight they were drawn with."""


class Backbone(plain.PlainBackbone):
    """Says which weights it was given, and where diffusers would find it."""

    pipeline_class, pipeline_source = "StableDiffusionPipeline", "somebody/model"

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        tuning: FineTuning | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        SEEN.extend((prompt, float(tuning.weights["conv.weight"][0]) if tuning else None) for prompt in prompts)
        return super().generate(prompts, seeds=seeds, **options)


class Learner(plain.PlainLearner):
    """One that trains a weight, too."""

    weight = 0.25

    def learn(self, *arguments: Any, **options: Any) -> Learned:
        tokens = super().learn(*arguments, **options).tokens
        weights = {"conv.weight": torch.full((2,), self.weight).half()}
        return Learned(tokens, FineTuning(weights=weights, weights_config=CONFIG))


class Broken(Learner):
    """One whose weights are too large for half precision."""

    weight = 1e6


@pytest.fixture
def plugins() -> Plugins:
    from icekit import builtin

    class Plugin:
        @hookimpl
        def register_backbones(self, register: Any) -> None:
            register("recording", Backbone)

        @hookimpl
        def register_learners(self, register: Any) -> None:
            register("tuning", Learner)
            register("broken", Broken)

    found = Plugins()
    found.add(Origin("plain", "plain-plugin", "1.0"), lambda: plain)
    found.add(Origin("tuning", "tuning-plugin", "1.0"), lambda: Plugin())
    found.add(Origin("builtin", "icekit", "0"), lambda: builtin)
    SEEN.clear()
    return found


def settings(**given: Any) -> Settings:
    names = {"backbone": "recording", "retriever": "plain", "segmentor": "plain", "learner": "tuning"}
    names |= {role: given.pop(role) for role in list(given) if role in names}
    return load_settings(options={"components": names, "samples": 1, "max_concepts": 1} | given)


PICTURE = Image.new("RGB", (50, 50), "red")


def test_samples_are_drawn_with_them_and_words_alone_are_not(plugins: Plugins, tmp_path: Path) -> None:
    run = extract(PICTURE, tmp_path / "run", settings(), installed=plugins)
    assert {weight for prompt, weight in SEEN if "<" in prompt} == {0.25}
    assert {weight for prompt, weight in SEEN if "<" not in prompt} == {None}
    [file, config] = sorted((tmp_path / "run" / "unet").iterdir(), reverse=True)
    assert (file.name, config.name) == ("diffusion_pytorch_model.safetensors", "config.json")
    assert json.loads(config.read_text()) == CONFIG
    assert {name: (value.dtype, value.tolist()) for name, value in load_file(file).items()} == {
        "conv.weight": (torch.float16, [0.25, 0.25])
    }
    assert run.is_fine_tuned and run.tuning().weights["conv.weight"].tolist() == [0.25, 0.25] and not run.tuning().lora
    report = (tmp_path / "run" / "report.html").read_text()
    assert "pipe.unet = UNet2DConditionModel.from_pretrained" in report
    assert run.manifest["backbone"]["pipeline_source"] == "somebody/model"


def test_a_run_that_goes_on_draws_with_what_it_kept(plugins: Plugins, tmp_path: Path) -> None:
    class Observer:
        @hookimpl
        def image_generated(self, done: int, total: int) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        extract(PICTURE, tmp_path / "run", settings(), installed=plugins, observers=[Observer()])
    before = len(SEEN)
    extract(PICTURE, tmp_path / "run", settings(), installed=plugins, resume=True)
    assert len(SEEN) > before
    assert {weight for prompt, weight in SEEN[before:] if "<" in prompt} == {0.25}


def test_overwriting_takes_them_away(plugins: Plugins, tmp_path: Path) -> None:
    extract(PICTURE, tmp_path / "run", settings(), installed=plugins)
    run = extract(PICTURE, tmp_path / "run", settings(learner="plain"), installed=plugins, overwrite=True)
    assert not run.is_fine_tuned and not run.tuning()
    assert not (tmp_path / "run" / "unet").exists()
    assert "UNet2DConditionModel" not in (tmp_path / "run" / "report.html").read_text()


def test_compositions_are_drawn_with_them(plugins: Plugins, tmp_path: Path) -> None:
    for name, learner in (("a", "tuning"), ("b", "plain"), ("c", "tuning")):
        extract(PICTURE, tmp_path / name, settings(learner=learner, samples=0), installed=plugins)
    SEEN.clear()
    compose("{a} {b}", {name: tmp_path / name for name in "ab"}, n=2, out=tmp_path / "made", installed=plugins)
    compose("{b}", {"b": tmp_path / "b"}, n=1, out=tmp_path / "more", installed=plugins)
    assert [weight for _, weight in SEEN] == [0.25, 0.25, None]
    with pytest.raises(InputError, match="several runs have fine-tuned weights of their own"):
        compose("{a} {c}", {name: tmp_path / name for name in "ac"}, installed=plugins)


def test_metrics_see_pictures_drawn_with_them(plugins: Plugins, tmp_path: Path) -> None:
    chosen = settings(samples=0)
    run = extract(PICTURE, tmp_path / "run", chosen, installed=plugins)
    backbone = Backbone(Backbone.Settings(), torch.device("cpu"))
    outcome = MeasuredOutcome(
        BenchImage("one", torch.zeros(3, 32, 32)), [], chosen, backbone, BenchDirectory(tmp_path / "bench"), "tuning",
        run, 2, ("category", "instance"),
    )  # fmt: skip
    SEEN.clear()
    outcome.generate("a photo of <cup-0>")
    outcome.generate("a photo of a cup")
    assert [weight for _, weight in SEEN] == [0.25, 0.25, None, None]


def test_weights_that_are_no_numbers_are_refused(plugins: Plugins, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"learner 'broken' .* returned the weight conv\.weight with numbers that are"):
        extract(PICTURE, tmp_path / "run", settings(learner="broken"), installed=plugins)
    assert not (tmp_path / "run" / "unet").exists()


def test_tensors_of_one_storage_are_kept_as_several(tmp_path: Path) -> None:
    table = torch.arange(6.0).view(3, 2)
    tensors = {"whole": table, "row": table[1], "column": table[:, 1], "half": table.half(), "count": torch.tensor(7)}
    write_tensors_atomically(tmp_path / "sub" / "t.safetensors", tensors, {"a": "b"})
    found = load_file(tmp_path / "sub" / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["t.safetensors"]
    checkpoint = FileCheckpoint(tmp_path / "c.safetensors")
    checkpoint.save(tensors, {"step": 3})
    loaded = checkpoint.load()
    assert loaded is not None and loaded[1] == {"step": 3} and torch.equal(loaded[0]["column"], table[:, 1])


def test_a_kill_while_weights_are_written_leaves_nothing_behind(plugins: Plugins, tmp_path: Path) -> None:
    """Whatever safetensors calls its own temporary file."""
    folder = tmp_path / "run"
    extract(PICTURE, folder, settings(samples=0), installed=plugins)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    for name in ("unet/.diffusion_pytorch_model.safetensors.4711.part", "checkpoint/.learner.safetensors.4711.part"):
        (folder / name).mkdir(parents=True)
        (folder / name / ".tmpAb12Cd").write_bytes(b"half")
    (folder / "unet" / ".notes.4711.part").mkdir()  # somebody else's
    RunDirectory(folder).clear_leftovers()  # as a run that goes on does
    assert {path.name for path in folder.rglob(".*")} == {".notes.4711.part", ".icekit.exports.json"}
    extract(PICTURE, folder, settings(samples=0), installed=plugins, overwrite=True)
    assert (folder / "unet" / ".notes.4711.part").is_dir()
    (folder / "unet" / ".notes.4711.part").rmdir()
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_weights_may_be_read_by_whom_the_image_may(plugins: Plugins, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    extract(PICTURE, folder, settings(samples=0), installed=plugins)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_mode == (folder / "image.png").stat().st_mode
