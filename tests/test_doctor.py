"""``icekit doctor``: through the real program, on this machine and on one where things are broken."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from icekit_process import icekit
from plain_components import write_distribution

from icekit.cli.doctor import _lines
from icekit.doctor import examine
from icekit.plugins import Plugins
from icekit.testing.tiny import tiny_xl_pipeline


def hub_of(folder: Path, model: Path) -> dict[str, str]:
    """A cache of the hub with one model in it, laid out as huggingface_hub does it."""
    place = folder / "hub" / "models--owner--xl"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(model, place / "snapshots" / "abc")
    return {"HF_HUB_CACHE": str(folder / "hub")}


def test_facts(tmp_path: Path, sdxl_folder: Path, monkeypatch) -> None:
    for name, value in hub_of(tmp_path, sdxl_folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "secret")
    done = icekit(["doctor", "--json"], tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] == version("torch")
    assert facts["devices"][-1]["device"] == "cpu" and facts["machine"]["free_memory"] > 2**28
    [model] = facts["cache"]
    weights = sum(weight.numel() for weight in tiny_xl_pipeline(seed=4).unet.parameters())
    assert model["id"] == "owner/xl" and model["backbone"] == "sdxl" and model["parameters"]["unet"] == weights
    assert {"builtin", "tabletop"} <= {one["plugin"] for one in facts["plugins"]["loaded"]}
    assert model["needs"] > 4 * sum(model["parameters"].values()) and model["needs_low_memory"] <= model["needs"]
    told = "\n".join(_lines(facts))
    assert "; a run needs about 1." in told
    assert "StableDiffusionXLPipeline (backbone sdxl)" in told and "secret" not in told + done.stdout
    assert max(len(line) for line in told.splitlines()) <= 200


def test_a_broken_plugin_and_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    write_distribution(tmp_path / "site", "broken", "raise ImportError('no such thing')", name="icekit-broken")
    (tmp_path / "shadow" / "torch").mkdir(parents=True)
    (tmp_path / "shadow" / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    done = icekit(["doctor"], tmp_path, tmp_path / "shadow", tmp_path / "site")
    assert done.returncode == 1, done.stderr
    assert "torch cannot be used: ImportError: libcudart.so.13: cannot open" in done.stdout
    assert "BROKEN: ImportError: no such thing" in done.stdout


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert examine(Plugins())["cache"] == []
