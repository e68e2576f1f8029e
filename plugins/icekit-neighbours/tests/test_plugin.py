"""The plugin as icekit finds it: by its entry point, and through the program in a process of its own."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from icekit.plugins import installed


def test_entry_point() -> None:
    [entry] = entry_points(group="icekit", name="neighbours")
    assert entry.dist is not None and entry.dist.name == "icekit-neighbours"
    plugins = installed()
    assert [str(broken) for broken in plugins.broken if broken.origin.plugin == "neighbours"] == []
    for name in ("textual-inversion", "dreambooth", "break-a-scene", "conceptexpress"):
        assert plugins.offered("learner")[name].origin.distribution == "icekit-neighbours"
    assert plugins.offered("segmentor")["conceptexpress"].origin.distribution == "icekit-neighbours"


def test_every_setting_says_what_it_is() -> None:
    plugins = installed()
    for role, name in [
        ("segmentor", "conceptexpress"),
        *(("learner", name) for name in ("textual-inversion", "dreambooth", "break-a-scene", "conceptexpress")),
    ]:
        for setting, field in plugins.component(role, name).Settings.model_fields.items():  # type: ignore[arg-type,attr-defined]
            assert field.description, f"{name}.{setting}"


@pytest.mark.slow
def test_a_run_from_end_to_end(sd_folder: Path, tmp_path: Path) -> None:
    from icekit_process import icekit

    picture = Image.new("RGB", (128, 128), "tan")
    picture.paste("red", (20, 30, 60, 90))
    picture.save(tmp_path / "picture.png")
    done = icekit(
        [
            "run", "picture.png", "--out", "run", "--json", "--device", "cpu", "--attribute", "colour",
            "--backbone", "sd21", "--set", f"backbone.model={sd_folder}",
            "--retriever", "words", "--set", "retriever.words=cup,ball,bowl",
            "--segmentor", "conceptexpress", "--set", "segmentor.draws=1", "--max-concepts", "2",
            "--learner", "conceptexpress", "--set", "learner.steps=2",
            "--set", "samples=1", "--set", "sample_steps=1",
        ],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["components"]["segmentor"] == manifest["components"]["learner"] == "conceptexpress"
    assert manifest["concepts"]
    assert (tmp_path / "run" / "report.html").is_file()
