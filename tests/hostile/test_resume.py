"""What may and may not change when a run goes on: other settings, the same model by another name, another device."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
from icekit_process import in_this_process
from PIL import Image
from pydantic import Field

from icekit import Extraction, InputError, extract
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.builtin.retrievers.splice import SpliceRetriever
from icekit.builtin.segmentors.masks import MaskFilesSegmentor
from icekit.cli.program import main
from icekit.learning.training import TrainingSettings
from icekit.paths import stored_place
from icekit.plugins import Plugins
from icekit.protocols import CHANGES_NO_RESULT, ComponentSettings
from icekit.protocols.strict import as_stored, changes_no_result
from icekit.run.compose import compose
from icekit.settings import Settings, load_settings, merge


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.new("RGB", (40, 40), "red").save(file)
    return file


def settings(**given: Any) -> Settings:
    return load_settings(options=merge({"components": plain.NAMES, "samples": 1, "max_concepts": 1}, given))


@pytest.fixture(scope="module")
def started(plugins: Plugins, photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in the middle of learning, its model named by a path."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "plain").mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.raises(Exception, match="two"):
            extract(photo, "run", settings(backbone={"model": "plain/"}, learner={"fail_at": 13}), installed=plugins)
    finally:
        os.chdir(before)
    state = folder / "run" / "checkpoint" / "run.json"
    record = json.loads(state.read_text())
    record["settings"]["learner"]["fail_at"] = None
    state.write_text(json.dumps(record))
    return folder


@pytest.fixture
def run(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(started / "run", tmp_path / "run")


@pytest.mark.parametrize(
    "given",
    [
        {"device": "cpu"}, {"backbone": {"images_at_once": 4}}, {"learner": {"pause": 0.001}},
        {"learner": {"plain": {"pause": 0.001}}}, {"learner": {"steps": "20"}}, {"attributes": ["color", "material"]},
    ],
)  # fmt: skip
def test_what_changes_no_result_may_change(run: Path, plugins: Plugins, photo: Path, given: dict[str, Any]) -> None:
    """The new value is taken, and kept."""
    done = extract(photo, run, settings(**given), resume=True, installed=plugins)
    kept = done.settings()
    if "device" in given:
        assert kept.device == "cpu"
    if "backbone" in given:
        assert kept.backbone["images_at_once"] == 4
        with Image.open(run / "samples" / "0-object-0.png") as picture:
            assert picture.convert("RGB").getpixel((0, 0)) == (4, 4, 4)  # made so many at once
    if "pause" in str(given):
        assert kept.learner["pause"] == 0.001


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"seed": 1}, "seed"), ({"samples": 2}, "samples"), ({"attributes": ["colour"]}, "attributes"),
        ({"max_concepts": 2}, "max_concepts"), ({"preset": "published"}, "preset"), ({"naming": "alone"}, "naming"),
        ({"learner": {"steps": 21}}, "learner.steps"), ({"learner": {"plain": {"steps": 21}}}, "learner.steps"),
        ({"backbone": {"model": "other"}}, "backbone.model"), ({"retriever": {"ghosts": 2}}, "retriever.ghosts"),
        ({"backbone": {"image_size": [64, 64]}}, "backbone.image_size"),
        ({"components": {"learner": "one-token"}}, "components.learner"),
    ],
)  # fmt: skip
def test_what_changes_the_result_may_not(
    run: Path, plugins: Plugins, photo: Path, given: dict[str, Any], key: str
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        extract(photo, run, settings(**given), resume=True, installed=plugins)
    assert f"{key} was " in str(error.value) and "overwrite=True" in str(error.value)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_the_same_model_by_another_name(
    run: Path, started: Path, plugins: Plugins, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a slash, absolute or relative, through a link, from another working directory."""
    (tmp_path / "link").symlink_to(started / "plain")
    record = json.loads((run / "checkpoint" / "run.json").read_text())
    assert record["settings"]["backbone"]["model"] == str((started / "plain").resolve())
    assert str((started / "plain").resolve()) in (run / "settings.toml").read_text()
    names = [
        str(started / "plain"),
        f"{started}/plain//",
        f"{started}/./plain",
        "link",
        os.path.relpath(started / "plain"),
    ]
    for number, name in enumerate(names):
        one = shutil.copytree(run, tmp_path / str(number))
        done = extract(photo, one, settings(backbone={"model": name}), resume=True, installed=plugins)
        assert done.settings().backbone["model"] == str((started / "plain").resolve())
    monkeypatch.chdir("/")
    bindings = {"a": tmp_path / "0", "b": tmp_path / "1"}
    assert compose("{a} {b}", bindings, n=1, out=tmp_path / "made", installed=plugins).images[0].is_file()


def test_runs_of_one_model_mix_however_it_was_run(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    bindings = {}
    for name, given in {"a": {}, "b": {"images_at_once": 8}}.items():
        bindings[name] = extract(photo, tmp_path / name, settings(backbone=given), installed=plugins).run_dir
    assert compose("{a} {b}", bindings, n=1, out=tmp_path / "made", installed=plugins).images[0].is_file()


def test_where_settings_say_that_something_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "photographs", "ViT-B-32"):
        (tmp_path / name).mkdir()
    (tmp_path / "words.txt").write_text("cup\nball")
    there = str((tmp_path / "model").resolve())
    for typed in ("model", "model/", "./model", "~/model", "photographs/../model", there):
        assert stored_place(typed) == there
    assert stored_place("local-dir:model/") == f"local-dir:{there}"
    for typed in ("package:icekit_tabletop/models/open-clip", "owner/name", "none there", "", "a\0b", "~nosuchuser/x"):
        assert stored_place(typed) == typed
    splice = SpliceRetriever.Settings(
        model="ViT-B-32", rerank_model="model", vocabulary="words.txt", image_mean="photographs"
    )
    kept = as_stored(splice)
    assert (kept["model"], kept["image_mean"]) == ("ViT-B-32", "photographs")  # names, though folders are called so
    assert (kept["rerank_model"], kept["vocabulary"]) == (there, str((tmp_path / "words.txt").resolve()))
    assert splice.rerank_model == "model"  # messages name what was typed
    assert as_stored(splice.model_copy(update={"vocabulary": ("words.txt",)}))["vocabulary"] == ["words.txt"]
    assert as_stored(MaskFilesSegmentor.Settings(files=["model"]))["files"] == [there]
    assert as_stored(StableDiffusion.Settings(model="model/"))["model"] == there


def test_which_settings_change_no_result() -> None:
    class Own(ComponentSettings):
        """A plugin's."""

        workers: int = Field(1, json_schema_extra=CHANGES_NO_RESULT)
        rate: float = 1.0

    assert changes_no_result(Own) == {"workers"}
    assert changes_no_result(Settings) == {"device", "exporter", "exporters"}
    saving = {"gradient_checkpointing", "low_memory"}
    assert changes_no_result(StableDiffusion.Settings) == {"images_at_once", "local_files_only"} | saving
    assert changes_no_result(TrainingSettings) == {"max_batch", "checkpoint_every"}


# --- Terminals -------------------------------------------------------------------------------------------------------

WORDS = ("tasse à café", "花瓶")


class Anywhere(plain.PlainSegmentor):
    """Any word has a quadrant."""

    def segment(self, view: Any, word: str, generator: Any) -> Any:
        return plain.quadrant(plain.WORDS[len(word) % 4], view.visible.shape) & view.visible


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_terminal_that_cannot_print_a_label(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """The run is done, and says so."""
    found = plain.beside_builtins()
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    monkeypatch.setattr("icekit.cli.program.quieten", lambda: None)
    monkeypatch.setattr(plain.PlainSegmentor, "segment", Anywhere.segment)
    monkeypatch.chdir(tmp_path)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    words = f"retriever.words={','.join(WORDS)}"
    arguments = ["run", str(photo), *plain.OPTIONS, "--retriever=words", "--set", words, "--set", "samples=0"]
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--out", "run", *options])
    out, err = (_written(stream) for stream in streams)
    assert leaving.value.code == 0, err
    assert "\\u82b1\\u74f6" in err
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert "花瓶" in [concept["label"] for concept in kept["concepts"]]
    assert json.loads(out) == kept if options else "\\u82b1\\u74f6" in out


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode("ascii")


def test_what_a_terminal_would_obey_is_escaped(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    icekit = in_this_process(tmp_path, monkeypatch, capsys)
    status, _, err = icekit("run", photo, *plain.OPTIONS, "--set", "samples=0", "--out", "run")
    assert status == 0, err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["concepts"][0]["words"]["colour"] = ["\x1b[2Jred"]
    manifest["image"] |= {"source": "\x1b]0;title\x07.png", "sha256": "0"}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert Extraction.open(tmp_path / "run").concepts[0].words["colour"] == ["\x1b[2Jred"]
    status, out, err = icekit("run", photo, "--out", "run", "--resume")
    assert status == 2 and "\x1b" not in out + err and "the image was \\x1b]0;title" in err
    manifest["image"]["sha256"] = hashlib.sha256(photo.read_bytes()).hexdigest()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    status, out, err = icekit("run", photo, "--out", "run", "--resume")
    assert status == 0 and "\x1b" not in out + err and "\\x1b[2Jred" in out
