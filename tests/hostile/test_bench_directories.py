"""Bench directories that are damaged, or somebody else's: one line that names the file and the way out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
from icekit_process import in_this_process
from PIL import Image

Run = Callable[..., tuple[int, str, str]]
ARGUMENTS = [
    "bench", "folder", "--path", "data", "--backbone=plain", "--retriever=plain", "--segmentor=plain",
    "--learner=plain", "--metric", "miou", "--metric", "looked", "--set", "bench.images=2", "--set",
    "learner.plain.steps=3", "--out", "bench",
]  # fmt: skip
VALUES = "values/plain-plain/one.json"
LOCATED = "located/plain-plain/one"
RUN = "runs/plain-plain/one"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of one picture, and a bench of it."""
    place = tmp_path_factory.mktemp("bench")
    plain.write_data_set(place / "data", ("cup", "vase"))
    return place


@pytest.fixture
def bench(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, Run]:
    """A copy of the bench, and the program beside it."""
    if not (made / "bench").exists():
        status, _, err = in_this_process(made, monkeypatch, capsys)(*ARGUMENTS)
        assert status == 0, err
    place = tmp_path / "place"
    shutil.copytree(made / "bench", place / "bench")
    program = in_this_process(place, monkeypatch, capsys)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        return program(*(made / "data" if one == "data" else one for one in arguments))

    return place / "bench", run


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link_out(file: Path) -> None:
    shutil.move(file, file.anchor and Path(str(file).partition("/bench/")[0]) / f"secret-{file.name}")
    file.symlink_to(Path(str(file).partition("/bench/")[0]) / f"secret-{file.name}")


def with_json(place: str, value: Any) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = json.loads(file.read_text())
        *parents, last = place.split(".")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        file.write_text(json.dumps(content))

    return damage


DEEP = "[" * 50_000 + "]" * 50_000
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    *(("bench.json", damage, "bench") for damage in (cut, pipe, link_out)),
    ("bench.json", lambda file: file.write_text(""), "bench.json"),
    ("bench.json", lambda file: file.write_text(DEEP), "nested"),
    ("bench.json", lambda file: file.write_text('{"icekit_version": "0", "settings": []}'), "settings"),
    ("bench.json", lambda file: file.write_text('{"icekit_version": 5, "settings": {}}'), "icekit_version"),
    ("bench.json", lambda file: file.write_text("[]"), "no bench of icekit's"),
    ("bench.json", with_json("settings.bench", 5), "bench"),
    *((VALUES, damage, VALUES) for damage in (cut, pipe, link_out)),
    (VALUES, lambda file: file.write_text(DEEP), "nested"),
    (VALUES, lambda file: file.write_text("[]"), VALUES),
    (VALUES, lambda file: file.write_text('{"metrics": {"miou": {"miou": {"value": NaN}}}}'), "finite"),
    (VALUES, with_json("metrics", []), "metrics"),
    (VALUES, with_json("metrics.miou", 5), "metrics.miou"),
    (VALUES, with_json("metrics.miou.miou", {}), "value is missing"),
    (VALUES, with_json("metrics.miou.miou.value", "high"), "value"),
    (VALUES, with_json("metrics.miou.miou.value", True), "value"),
    (VALUES, with_json("metrics.looked.looked.strips", ["../../secret.png"]), "strips"),
    (VALUES, with_json("metrics.looked.looked.strips", []), "strips"),
    (VALUES, with_json("error", 5), "error"),
    (VALUES, with_json("seconds", {"learn_s": "x"}), "seconds"),
]
AGAIN: list[tuple[str, Callable[[Path], object], str]] = [
    *((f"{RUN}/manifest.json", damage, "manifest.json") for damage in (cut, link_out)),
    (f"{RUN}/manifest.json", with_json("concepts", 5), "concepts"),
    (f"{RUN}/embeddings.safetensors", cut, "embeddings.safetensors"),
    (f"{RUN}/masks/0-cup.png", cut, "0-cup.png"),
    *((f"{LOCATED}/checkpoint/regions.json", damage, "regions.json") for damage in (cut, link_out)),
    (f"{LOCATED}/checkpoint/regions.json", with_json("regions", 5), "regions"),
    (f"{LOCATED}/masks/0-cup.png", cut, "0-cup.png"),
    (f"{LOCATED}/masks/0-cup.png", lambda file: Image.new("L", (8, 8)).save(file), "8 x 8"),
]
"""What is read when a metric is to be measured again."""


@pytest.mark.parametrize(("name", "damage", "why"), [*DAMAGES, *AGAIN])
def test_a_damaged_file(bench: tuple[Path, Run], name: str, damage: Callable[[Path], object], why: str) -> None:
    folder, icekit = bench
    assert (folder / name).exists()
    damage(folder / name)
    if (name, damage, why) in AGAIN:
        (folder / VALUES).unlink()
    status, out, err = icekit(*ARGUMENTS, "--resume")
    lines = [line for line in err.splitlines() if line.startswith("icekit:")]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert "bench" in lines[0] and why in lines[0] and "Traceback" not in err
    assert "delete" in lines[0] or "--overwrite" in lines[0] or "--out" in lines[0] or "symbolic link" in lines[0]


def test_a_damaged_picture_is_made_again(bench: tuple[Path, Run]) -> None:
    folder, icekit = bench
    [strip] = (folder / "images" / "plain").rglob("*.png")
    before = strip.read_bytes()
    cut(strip)
    (folder / VALUES).unlink()
    status, _, err = icekit(*ARGUMENTS, "--resume")
    assert status == 0, err
    assert strip.read_bytes() == before


def test_a_damaged_record_can_be_overwritten(bench: tuple[Path, Run]) -> None:
    folder, icekit = bench
    (folder / "bench.json").write_text("{")
    status, _, err = icekit(*ARGUMENTS)
    assert status == 2 and "bench.json" in err and "--overwrite makes the bench anew" in err
    status, _, err = icekit(*ARGUMENTS, "--overwrite")
    assert status == 0, err
    assert json.loads((folder / "bench.json").read_text())["settings"]


def test_what_changes_no_number_may_change(made: Path, bench: tuple[Path, Run]) -> None:
    folder, icekit = bench
    changed = ["--set", "backbone.images_at_once=2", "--set", "bench.against=plain-plain", "--device", "cpu"]
    status, out, err = icekit(*ARGUMENTS, *changed, "--resume")
    assert status == 0, err
    assert "against plain-plain" in out
    status, out, err = icekit(*ARGUMENTS, "--set", "learner.plain.rate=0.9", "--resume")
    assert (status, out) == (2, "") and "learner.plain.rate was" in err
    (folder.parent / "link").symlink_to(made / "data")
    status, out, err = icekit(*["link/" if one == "data" else one for one in ARGUMENTS], "--resume")
    assert status == 0, err  # the same folder, by another name
