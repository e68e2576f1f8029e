"""Run directories that are damaged, or somebody else's: one line that names the file, and nothing outside is read."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plain_components as plain
import pytest
import torch
from icekit_process import in_this_process, write_report
from PIL import Image
from safetensors.torch import load_file, save_file

from icekit import Extraction, InputError, extract
from icekit.plugins import Plugins
from icekit.run.compose import compose
from icekit.settings import load_settings, merge

SECRET = b"outside of the run"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(file)
    return file


def settings(**given: Any) -> Any:
    return load_settings(options=merge({"components": plain.NAMES, "samples": 1, "max_concepts": 2}, given))


@pytest.fixture(scope="module")
def whole(plugins: Plugins, photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    extract(photo, folder, settings(), installed=plugins)
    return folder


@pytest.fixture(scope="module")
def cut(plugins: Plugins, photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted while it learned."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(Exception, match="two"):
        extract(photo, folder, settings(learner={"fail_at": 13}), installed=plugins)
    state = folder / "checkpoint" / "run.json"
    record = json.loads(state.read_text())
    record["settings"]["learner"]["fail_at"] = None
    state.write_text(json.dumps(record))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(SECRET)
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def interrupted(cut: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(SECRET)
    return shutil.copytree(cut, tmp_path / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every plain file that is no link, but for the lock's."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if "icekit.lock" not in path.name}


def refused(act: Callable[[], object], folder: Path, *parts: str) -> None:
    """One line that names the directory and what is wrong with it, soon, and nothing changes on disk."""
    before, begun = files_of(folder), time.monotonic()
    with pytest.raises(InputError) as error:
        act()
    assert time.monotonic() - begun < 3
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1000
    for part in (str(folder), *parts):
        assert part in message
    assert files_of(folder) == before


def refused_by_all(run: Path, plugins: Plugins, photo: Path, *parts: str) -> None:
    """Whoever reads the directory refuses it."""
    refused(lambda: Extraction.open(run), run, *parts)
    refused(lambda: write_report(run), run, *parts)
    refused(lambda: compose("{a}", {"a": run}, out=run.parent / "made", installed=plugins), run, *parts)
    refused(lambda: extract(photo, run, resume=True, installed=plugins), run, *parts)
    assert not (run.parent / "made").exists()


# --- The manifest ----------------------------------------------------------------------------------------------------

GONE = object()
DEEP: Any = "[" * 100_000 + "]" * 100_000

WRONG_VALUES: list[tuple[str, Any]] = [
    ("schema_version", "2"), ("schema_version", True), ("schema_version", None), ("schema_version", 2.5),
    ("icekit_version", 3), ("icekit_version", "\x1b[2J"),
    ("image", GONE), ("image", []), ("image", None), ("image.source", 5), ("image.source", GONE),
    ("image.sha256", None), ("image.width", "32"), ("image.width", 0), ("image.width", -1), ("image.height", 10**12),
    ("image.height", 32.5), ("image.width", GONE),
    ("presets", "plain"), ("presets", [1]), ("components", ["plain"]), ("components", {"backbone": 3}),
    ("backbone", GONE), ("backbone", []), ("backbone", "x"), ("backbone.identity", 5), ("backbone.identity", GONE),
    ("backbone.rows", {}), ("backbone.rows", []), ("backbone.rows", {"clip_l": "8"}), ("backbone.rows", {"clip_l": -8}),
    ("backbone.rows", {"clip_l": 10**9}), ("backbone.rows", GONE), ("backbone.pipeline_class", 5),
    ("attributes", "colour"), ("attributes", [None]), ("seed", "0"), ("seed", -1), ("seed", 2**80), ("seed", 1.5),
    ("concepts", GONE), ("concepts", {}), ("concepts", None), ("concepts", [1]), ("concepts", "cup"),
    ("concepts.0.index", "0"), ("concepts.0.index", -1), ("concepts.0.index", True), ("concepts.0.index", GONE),
    ("concepts.0.index", 1),
    ("concepts.0.label", 5), ("concepts.0.label", "a\nb"), ("concepts.0.label", "\x1b]0;x\x07"),
    ("concepts.0.label", "\u202eabc"), ("concepts.0.label", "\ud800"), ("concepts.0.label", "x" * 5000),
    ("concepts.0.label", GONE),
    ("concepts.0.score", "high"), ("concepts.0.score", None), ("concepts.0.score", True), ("concepts.0.score", 1e300),
    ("concepts.0.area", -0.1), ("concepts.0.area", 7), ("concepts.0.area", "0.1"), ("concepts.0.area", GONE),
    ("concepts.0.mask", "../secret"), ("concepts.0.mask", "/etc/passwd"), ("concepts.0.mask", ""),
    ("concepts.0.mask", "a\0b"), ("concepts.0.mask", None), ("concepts.0.mask", ["x"]), ("concepts.0.mask", GONE),
    ("concepts.0.mask", "masks/../../secret"), ("concepts.0.mask", "."),
    ("concepts.0.tokens", {}), ("concepts.0.tokens", []), ("concepts.0.tokens", GONE),
    ("concepts.0.tokens", {"category": "cup"}), ("concepts.0.tokens", {"category": "<a> <b>"}),
    ("concepts.0.tokens", {"category": "<\x1b[31m>"}), ("concepts.0.tokens", {"category": None}),
    ("concepts.0.tokens", {"\x07": "<cup-0>"}),
    ("concepts.0.words", []), ("concepts.0.words", {"colour": "red"}), ("concepts.0.words", {"colour": [1]}),
    ("concepts.0.words", GONE), ("concepts.0.described", {"colour": "red"}), ("concepts.0.words_alone", {"object": 5}),
    ("learning_steps", "many"), ("learning_steps", -1), ("learning_steps", 1e3),
    ("timings", []), ("timings", {"load_s": "1"}), ("timings", {"load_s": -1}), ("timings", {"load_s": None}),
    ("timings", {"load_s": 1e300}),
]  # fmt: skip


def change(values: Any, place: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    for parent in parents:
        values = values[parent]
    if value is GONE:
        del values[last]
    else:
        values[last] = value


@pytest.fixture(scope="module")
def spoilt(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose manifest each test replaces."""
    return shutil.copytree(whole, tmp_path_factory.mktemp("spoilt") / "run")


@pytest.mark.parametrize(("place", "value"), WRONG_VALUES)
def test_a_manifest_with_a_wrong_value(
    spoilt: Path, whole: Path, plugins: Plugins, photo: Path, place: str, value: Any
) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    change(manifest, place, value)
    (spoilt / "manifest.json").write_text(json.dumps(manifest))
    refused_by_all(spoilt, plugins, photo, "manifest.json", "overwrite=True")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not JSON"), (b"{", "is not JSON"), (b'{"schema_version": 2, "icekit', "is not JSON"),
        (b"\xff\xfe{", "not UTF-8"), (b"\0" * 100, "is not JSON"), (DEEP.encode(), "nested"), (b"null", "null"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, "nested"), (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested"),
        (b'{"schema_version": 2, "icekit_version": "0", "seed": NaN}', "finite"),
        (b'{"schema_version": 2, "icekit_version": "0", "seed": Infinity}', "finite"),
        (b'{"schema_version": 2, "icekit_version": "0", "seed": 1e999}', "finite"),
        (b'{"schema_version": ' + b"1" * 5000 + b', "icekit_version": "0"}', "digits"),
        (b"[]", "not a run directory"), (b"5", "not a run directory"), (b'{"name": "site"}', "not a run directory"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(run: Path, content: bytes, why: str) -> None:
    (run / "manifest.json").write_bytes(content)
    for act in (lambda: Extraction.open(run), lambda: write_report(run)):
        refused(act, run, why)


def test_keys_of_a_later_version_are_passed_over(run: Path, plugins: Plugins) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"quality": {"of": ["a later", 1]}}
    manifest["concepts"][0]["colour_space"] = None
    manifest["image"]["source"] = "name\udcff.png"  # as a file that is not called in UTF-8
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert Extraction.open(run).manifest == manifest
    assert "name\\udcff.png" in write_report(run).read_text()


def test_html_stays_text(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["concepts"][0] |= {"label": "<script>alert(1)</script>", "words": {"colour": ["<img src=x>", "\x1b[2J"]}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    page = write_report(run).read_text()
    assert "<script>alert" not in page and "<img src=x>" not in page


# --- Files -----------------------------------------------------------------------------------------------------------


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def foreign(file: Path) -> None:
    file.write_bytes(b"%PDF-1.4 something else entirely\n" * 20)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_out(file: Path) -> None:
    """To a file of the right kind, which would show in the page."""
    secret = file.parents[len(file.parts) - 1 - file.parts.index("run") - 1].parent / f"secret-{file.name}"
    shutil.move(file, secret)
    file.symlink_to(secret)


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/at/all")


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


ANY_FILE: tuple[Damage, ...] = (pipe, folder, link_out, dangling, loop, device)
BAD_BYTES: tuple[Damage, ...] = (truncated, empty, foreign)


@pytest.mark.parametrize("damage", ANY_FILE)
def test_a_manifest_that_is_no_file(run: Path, plugins: Plugins, photo: Path, damage: Damage) -> None:
    damage(run / "manifest.json")
    refused_by_all(run, plugins, photo)


@pytest.mark.parametrize("damage", (*BAD_BYTES, *ANY_FILE))
@pytest.mark.parametrize("name", ["image.png", "masks/0-cup.png", "samples/0-colour-0.png", "attention/0-colour.png"])
def test_a_damaged_picture(run: Path, name: str, damage: Damage) -> None:
    damage(run / name)
    refused(lambda: write_report(run), run, name)
    if name.startswith("masks"):
        refused(Extraction.open(run).concepts[0].mask, run, name)


@pytest.mark.parametrize("name", ["image.png", "masks/0-cup.png"])
def test_a_picture_of_another_size(run: Path, name: str) -> None:
    Image.new("RGB", (33, 32)).save(run / name)
    refused(lambda: write_report(run), run, name, "33 x 32", "32 x 32")


def test_a_picture_of_another_format_and_a_bomb(run: Path) -> None:
    Image.new("RGB", (32, 32)).save(run / "samples" / "0-colour-0.png", "GIF")
    refused(lambda: write_report(run), run, "samples/0-colour-0.png", "no PNG")
    for size in ((9_000, 9_000), (14_000, 14_000)):  # above our limit, and above Pillow's
        Image.new("1", size).save(run / "samples" / "0-colour-0.png", compress_level=1)
        refused(lambda: write_report(run), run, "samples/0-colour-0.png", "too large")


@pytest.mark.parametrize("name", ["masks", "samples", "attention"])
def test_a_folder_that_leads_out(run: Path, name: str) -> None:
    shutil.move(run / name, run.parent / "elsewhere")
    (run / name).symlink_to(run.parent / "elsewhere")
    refused(lambda: write_report(run), run, name, "outside")


@pytest.mark.parametrize("damage", (*ANY_FILE, lambda file: file.write_bytes(b"\xff\xfea")))
def test_settings_that_cannot_be_read(run: Path, plugins: Plugins, damage: Damage) -> None:
    damage(run / "settings.toml")
    made = run.parent / "made"
    refused(lambda: write_report(run), run, "settings.toml")
    refused(lambda: compose("{a}", {"a": run}, out=made, installed=plugins), run, "settings.toml")
    assert not made.exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed = ", "TOML"), ("seed = 'x'", "'seed'"), ("sed = 1", "'sed'"), ("components = 5", "'components'"),
        ("seed = " + "[" * 10_000 + "]" * 10_000, "nested"), ("samples = 1e999", "samples"),
        ("backbone = 5", "'backbone'"),
        ("seed = " + "9" * 5000, "digits"), ("", ""),
    ],
)  # fmt: skip
def test_settings_that_are_none(run: Path, plugins: Plugins, photo: Path, text: str, why: str) -> None:
    (run / "settings.toml").write_text(text)
    if why:
        refused(lambda: compose("{a}", {"a": run}, out=run.parent / "made", installed=plugins), run, why)
        refused(lambda: extract(photo, run, resume=True, installed=plugins), run, why)
    (run / "settings.toml").unlink()
    refused(lambda: compose("{a}", {"a": run}, out=run.parent / "made", installed=plugins), run, "is missing")


# --- Embeddings ------------------------------------------------------------------------------------------------------


def with_rows(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(file: Path) -> None:
        rows = load_file(file)
        change(rows)
        save_file(rows, file)

    return damage


ROWS: list[tuple[Damage, str]] = [
    *((damage, "embeddings.safetensors") for damage in (*BAD_BYTES, *ANY_FILE)),
    (Path.unlink, "is missing"),
    (with_rows(lambda rows: rows.pop("<cup-0>")), "it lacks <cup-0>"),
    (with_rows(lambda rows: rows.clear()), "it lacks <cup-0"),
    (with_rows(lambda rows: rows.update({"<x>": torch.zeros(8)})), "it has <x>"),
    (with_rows(lambda rows: rows.update({"<cup-0>": torch.zeros(7)})), "float32 [8]"),
    (with_rows(lambda rows: rows.update({"<cup-0>": torch.zeros(8, 8)})), "float32 [8]"),
    (with_rows(lambda rows: rows.update({"<cup-0>": torch.tensor(1.0)})), "float32 [8]"),
    (with_rows(lambda rows: rows.update({"<cup-0>": torch.zeros(8, dtype=torch.int64)})), "int64 [8]"),
    (with_rows(lambda rows: rows.update({"<cup-0>": torch.full((8,), torch.nan)})), "NaN"),
    (with_rows(lambda rows: rows.update({"<cup-0>": torch.full((8,), torch.inf)})), "NaN"),
    (lambda file: file.write_bytes((2**60).to_bytes(8, "little") + b"{}"), "safetensors"),
    (lambda file: file.write_bytes((5).to_bytes(8, "little") + b"[[[[["), "safetensors"),
]


@pytest.mark.parametrize(("damage", "why"), ROWS)
def test_damaged_embeddings(run: Path, plugins: Plugins, photo: Path, damage: Damage, why: str) -> None:
    damage(run / "embeddings.safetensors")
    refused_by_all(run, plugins, photo, "embeddings.safetensors", why)


@pytest.mark.parametrize("name", ["lora.safetensors", "unet/diffusion_pytorch_model.safetensors"])
def test_damaged_weights(run: Path, plugins: Plugins, name: str) -> None:
    def make() -> Path:
        file = run / name
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)
        else:
            file.rmdir()
        file.parent.mkdir(exist_ok=True)
        save_file({"unet.x": torch.ones(2)}, file)
        return file

    for damage in (*BAD_BYTES, *ANY_FILE):
        damage(make())
        refused(lambda: compose("{a}", {"a": run}, out=run.parent / "made", installed=plugins), run, name)
    save_file({"unet.x": torch.full((2,), torch.nan)}, make())
    refused(Extraction.open(run).tuning, run, name, "NaN")
    make()
    (run / "unet").mkdir(exist_ok=True)
    (run / "unet" / "config.json").write_text("[]")
    if name.startswith("unet"):
        refused(Extraction.open(run).tuning, run, "unet/config.json")
    else:
        save_file({"x": torch.ones(2)}, run / name)
        refused(Extraction.open(run).tuning, run, name, "no adapter")


# --- The log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ANY_FILE)
def test_a_log_that_is_no_file(run: Path, damage: Damage) -> None:
    damage(run / "log.jsonl")
    refused(lambda: write_report(run), run, "log.jsonl")


def test_lines_of_a_log_that_are_none(run: Path) -> None:
    bad = [
        "[]", "5", "null", "{", "x", '{"step": "1"}', '{"step": -1}', '{"step": true}', '{"step": 1e99}', '{"a": 1}',
        "[" * 5000, '{"step": 3, "losses": []}', '{"step": 4, "phase": 5}', '{"step": ' + "9" * 5000 + "}",
    ]  # fmt: skip
    good = (run / "log.jsonl").read_text()
    odd = '{"step": 5, "losses": {"a": NaN, "b": "x", "total": 1e400, "c": true}}\n'
    (run / "log.jsonl").write_bytes("\n".join([*bad, ""]).encode() + b"\xff\xfe\n" + good.encode() + odd.encode())
    page = write_report(run).read_text()
    assert f"{len(bad) + 1} lines of log.jsonl cannot be read" in page
    (run / "log.jsonl").write_text(good + '{"step": 3, "to')  # as a killed process leaves it
    assert "cannot be read" not in write_report(run).read_text()
    (run / "log.jsonl").write_text("".join(f'{{"step": 1, "x{n}": {n}}}\n' for n in range(500)))
    assert write_report(run).stat().st_size < 2_000_000


# --- Interrupted runs ------------------------------------------------------------------------------------------------


def with_json(place: str, value: Any) -> Damage:
    def damage(file: Path) -> None:
        content = json.loads(file.read_text())
        change(content, place, value)
        file.write_text(json.dumps(content))

    return damage


def checkpoint_with(tensors: Any = None, state: Any = None) -> Damage:
    def damage(file: Path) -> None:
        save_file(tensors or {"x": torch.zeros(2)}, file, None if state is None else {"state": state})

    return damage


INTERRUPTED: list[tuple[str, Damage, str]] = [
    *(("checkpoint/run.json", damage, "run.json") for damage in BAD_BYTES),
    *(("checkpoint/run.json", damage, "run") for damage in ANY_FILE),
    ("checkpoint/run.json", with_json("ready", "yes"), "ready"),
    ("checkpoint/run.json", with_json("ready", GONE), "ready"),
    ("checkpoint/run.json", with_json("sha256", 5), "sha256"),
    ("checkpoint/run.json", with_json("source", None), "source"),
    ("checkpoint/run.json", with_json("settings", []), "settings"),
    ("checkpoint/run.json", with_json("settings.seed", "x"), "'seed'"),
    ("checkpoint/run.json", with_json("settings.components", 5), "'components'"),
    ("checkpoint/run.json", with_json("schema_version", "2"), "schema_version"),
    *(("checkpoint/regions.json", damage, "regions.json") for damage in (*BAD_BYTES, *ANY_FILE)),
    ("checkpoint/regions.json", with_json("regions", {}), "regions"),
    ("checkpoint/regions.json", with_json("regions", [5]), "regions.0"),
    ("checkpoint/regions.json", with_json("regions.0.index", 4), "numbered"),
    ("checkpoint/regions.json", with_json("regions.0.word", 4), "regions.0.word"),
    ("checkpoint/regions.json", with_json("regions.0.score", "x"), "regions.0.score"),
    ("checkpoint/regions.json", with_json("regions.0.mask", "../../secret"), "regions.0.mask"),
    ("checkpoint/regions.json", with_json("regions.0.hints", {"colour": {"red": "x"}}), "hints.colour.red"),
    ("checkpoint/regions.json", with_json("refused", "ghost"), "refused"),
    ("checkpoint/regions.json", with_json("finished", 1), "finished"),
    ("checkpoint/regions.json", with_json("erased", "not base64!"), "erased"),
    ("checkpoint/regions.json", with_json("erased", "aGVsbG8="), "erased"),
    *(("masks/0-cup.png", damage, "masks/0-cup.png") for damage in (*BAD_BYTES, *ANY_FILE, Path.unlink)),
    ("masks/0-cup.png", lambda file: Image.new("L", (8, 8)).save(file), "8 x 8"),
    *(("image.png", damage, "image.png") for damage in (*BAD_BYTES, *ANY_FILE)),
    ("image.png", lambda file: Image.new("RGB", (64, 64)).save(file), "64 x 64"),
    *(("checkpoint/learner.safetensors", damage, "learner.safetensors") for damage in (*BAD_BYTES, *ANY_FILE)),
    ("checkpoint/learner.safetensors", checkpoint_with(), "state"),
    ("checkpoint/learner.safetensors", checkpoint_with(state="[]"), "JSON object"),
    ("checkpoint/learner.safetensors", checkpoint_with(state="{"), "state"),
    ("checkpoint/learner.safetensors", checkpoint_with(state=DEEP), "nested"),
    ("checkpoint/timings.json", with_json("load_s", "x"), "load_s"),
    *(("checkpoint/timings.json", damage, "timings.json") for damage in (*BAD_BYTES, *ANY_FILE)),
]


@pytest.mark.parametrize(("name", "damage", "why"), INTERRUPTED)
def test_a_damaged_checkpoint_is_refused(
    interrupted: Path, plugins: Plugins, photo: Path, name: str, damage: Damage, why: str
) -> None:
    """And names the file: the run is never begun afresh in silence."""
    damage(interrupted / name)
    with pytest.raises(InputError) as error:
        extract(photo, interrupted, resume=True, installed=plugins)
    message = str(error.value)
    assert "\n" not in message and str(interrupted) in message and why in message
    assert not (interrupted / "manifest.json").exists()
    assert (interrupted.parent / "secret").read_bytes() == SECRET


def claim(run: Path, name: str) -> None:
    """As if icekit had written it."""
    with (run / "checkpoint" / "written.jsonl").open("a") as record:
        record.write(json.dumps(name) + "\n")


def test_what_can_be_made_again_is(
    interrupted: Path, whole: Path, plugins: Plugins, photo: Path, tmp_path: Path
) -> None:
    """A sample that is damaged: the run ends as if it had never been."""
    (interrupted / "samples").mkdir()
    truncated_sample = (whole / "samples" / "0-object-0.png").read_bytes()[:50]
    (interrupted / "samples" / "0-object-0.png").write_bytes(truncated_sample)
    claim(interrupted, "samples/0-object-0.png")
    extract(photo, interrupted, resume=True, installed=plugins)
    same = [name for name in files_of(whole) if name not in ("manifest.json", "report.html", "settings.toml")]
    assert [name for name in same if (whole / name).read_bytes() != (interrupted / name).read_bytes()] == []


def test_embeddings_of_another_run_are_refused_on_resume(interrupted: Path, plugins: Plugins, photo: Path) -> None:
    claim(interrupted, "embeddings.safetensors")
    save_file({"<vase-0>": torch.zeros(8)}, interrupted / "embeddings.safetensors")
    with pytest.raises(InputError, match=r"embeddings\.safetensors: it lacks <cup-0"):
        extract(photo, interrupted, resume=True, installed=plugins)


# --- As a user meets it ----------------------------------------------------------------------------------------------


def test_on_the_command_line(
    run: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    icekit = in_this_process(tmp_path, monkeypatch, capsys)
    os.remove(run / "samples" / "0-colour-0.png")
    (run / "samples" / "0-colour-0.png").symlink_to(photo)
    (run / "report.html").unlink()
    status, out, err = icekit("report", "run")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "run is damaged: samples/0-colour-0.png" in err and "--overwrite" in err
    assert not (run / "report.html").exists()
    (run / "samples" / "0-colour-0.png").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["concepts"][0]["score"] = "\x1b[2Jhigh"
    (run / "manifest.json").write_text(json.dumps(manifest))
    for arguments in (["report", "run"], ["compose", "{a}", "a=run"], ["run", photo, "--out", "run", "--resume"]):
        status, out, err = icekit(*arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert "manifest.json: concepts.0.score: should be" in err and "\x1b" not in err
