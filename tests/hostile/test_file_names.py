"""Names of files: those that are no UTF-8, too long, alike, or in somebody's home; and words that become names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plain_components as plain
import pytest
import torch
from icekit_process import environment, in_this_process, write_report
from PIL import Image

from icekit import ConceptLibrary, Extraction, InputError, Settings, extract, load_settings
from icekit.bench import bench
from icekit.builtin.datasets.folder import FolderDataset, safe_names
from icekit.plugins import PluginError, check_attribute
from icekit.protocols import Attribute, Region, token_names
from icekit.protocols.values import MAX_ATTRIBUTE_BYTES, MAX_LABEL_BYTES
from icekit.run.compose import compose
from icekit.run.directory import mask_name, sample_name

Run = Callable[..., tuple[int, str, str]]
ONE = [*plain.OPTIONS, "--set", "samples=1", "--set", "max_concepts=1"]
BENCH = ["bench", "folder", "--metric", "looked", "--set", "bench.images=1", *plain.OPTIONS]
LONGEST = 255
"""Bytes of a file's name."""
PARTIAL = len(".") + len(".4194304.part")
"""What a file's name has more while it is written: see ``run.atomic``."""
NO_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def icekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    picture(tmp_path / "photo.png")
    return in_this_process(tmp_path, monkeypatch, capsys)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (50, 50), "red").save(path, "PNG")
    return path


def region(word: str, index: int = 0) -> Region:
    return Region(index, word, 1.0, torch.ones(2, 2, dtype=torch.bool))


# --- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["cup" * 500, "é" * 200, "杯" * 100, "🫖" * 300, "red " * 99, "a-" * 300, "𝒳" * 200])
def test_names_made_of_any_word_fit(word: str) -> None:
    longest = [Attribute("a" * MAX_ATTRIBUTE_BYTES, "a", ("b",))]
    one = region(word, 99_999)
    assert len(one.label.encode()) <= MAX_LABEL_BYTES
    tokens = token_names(one, longest)
    names = [mask_name(one), *(f"embeddings/{token.strip('<>')}.safetensors" for token in tokens.values())]
    names += [sample_name(99_999, longest[0].name, 9_999, words_alone=True)]
    assert max(len(name.rpartition("/")[2].encode()) for name in names) + PARTIAL <= 143  # some file systems' longest
    assert all("/" not in token and " " not in token for token in tokens.values())


def test_long_words_stay_apart() -> None:
    words = [f"{'very ' * 40}{end}" for end in ("red", "blue", "reds", "r e d")]
    labels = {region(word).label for word in words}
    assert len(labels) == len(words)
    assert region(words[0]).label == region(words[0], 1).label  # the index tells concepts of one word apart
    assert region("red bowl").label == "red-bowl"
    assert region("a" * MAX_LABEL_BYTES).label == "a" * MAX_LABEL_BYTES


def test_words_that_are_one_label() -> None:
    """The index keeps tokens and files apart, whatever the words become."""
    words = [
        "red bowl",
        "red_bowl",
        "Red Bowl!",
        "red-bowl",
        "cup-0",
        "cup",
        "cup-0-colour",
        "!",
        "?",
        "words",
        "x-words",
    ]
    attributes = [Attribute(name, name, ("a",)) for name in ("colour", "words", "plain", "x_words")]
    regions = [region(word, index) for index, word in enumerate(words)]
    tokens = [token for one in regions for token in token_names(one, attributes).values()]
    assert len({token.casefold() for token in tokens}) == len(words) * 6
    masks = {mask_name(one).casefold() for one in regions}
    parts = ["object", *(one.name for one in attributes)]
    cases = [(i, part, n, alone) for i in (0, 1, 10) for part in parts for n in (0, 10) for alone in (False, True)]
    samples = {sample_name(index, part, number, words_alone=alone) for index, part, number, alone in cases}
    assert (len(masks), len(samples)) == (len(words), len(cases))


def test_a_long_word_from_start_to_end(icekit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = "杯" * 120
    monkeypatch.setattr(plain, "WORDS", (word, *plain.WORDS[1:]))
    status, out, err = icekit("run", "photo.png", "--out", "run", *ONE, "--json")
    assert status == 0, err
    concept = json.loads(out)["concepts"][0]
    assert concept["label"].startswith("杯" * 15)
    assert (tmp_path / "run" / concept["mask"]).is_file()
    assert icekit("compose", "{a.colour}", f"a=run:{concept['label']}", "--n", "1", "--out", "new")[0] == 0
    assert icekit("report", "run")[0] == 0


def test_a_word_too_long_to_draw_is_said_before_learning(icekit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: plain.PlainBackbone, prompt: str, words: object, tokens: object = None) -> list[list[int]]:
        if len(prompt) > 60:
            raise InputError(f"prompt too long: {prompt!r}")
        return []

    monkeypatch.setattr(plain, "WORDS", ("cup " * 30, *plain.WORDS[1:]))
    monkeypatch.setattr(plain.PlainBackbone, "token_positions", refuse)
    for resume in ([], ["--resume"]):
        status, _, err = icekit("run", "photo.png", "--out", "run", *ONE, *resume)
        assert status == 2
        assert "concept 0 ('cup cup" in err.splitlines()[-1]
        assert "a shorter word" in err.splitlines()[-1]
        assert "learning tokens" not in err


# --- Attributes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a" * (MAX_ATTRIBUTE_BYTES + 1), "too long a name"),
        ("é" * MAX_ATTRIBUTE_BYTES, "too long a name"),
        ("ｏｂｊｅｃｔ", "cannot be an attribute's name"),
        ("INSTANCE", "cannot be an attribute's name"),
        ("x-words", "cannot be an attribute's name"),
        ("a/b", "cannot be an attribute's name"),
        ("", "cannot be an attribute's name"),
        ("\udce9", "cannot be an attribute's name"),
    ],
)
def test_names_that_an_attribute_cannot_have(name: str, problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        check_attribute(Attribute(name, "thing", ("red",)))


@pytest.mark.parametrize(
    "other",
    [Attribute("Colour", "x", ("a",)), Attribute("hue", "x", ("a",), ("COLOR",)), Attribute("color", "x", ("a",))],
)
def test_attributes_that_would_be_called_alike(other: Attribute) -> None:
    class Second:
        @plain.hookimpl
        def register_attributes(self, register: Callable[[Attribute], None]) -> None:
            register(other)

    found = plain.beside_builtins(second=Second())
    found.offered("attribute")
    assert [broken.reason for broken in found.broken if "must differ in more than case" in broken.reason]


# --- Paths -----------------------------------------------------------------------------------------------------------


def test_home_in_every_path(icekit: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    picture(home / "photo.png")
    picture(home / "data" / "one.png")
    (home / "a.toml").write_text("max_concepts = 1\n")
    status, out, err = icekit("run", "~/photo.png", "--out", "~/runs/a", "--config", "~/a.toml", *ONE)
    assert status == 0, err
    assert str(home / "runs" / "a") in out
    assert icekit("report", "~/runs/a")[:2] == (0, f"{home}/runs/a/report.html\n")
    for reference in ("~/runs/a:cup", "~/runs/a"):
        typed = ["compose", "{a}", f"a={reference}", "--n", "1", "--out", "~/new", "--overwrite"]
        assert icekit(*typed)[:2] == (0, f"{home}/new/0.png\n")
    status, _, err = icekit(*BENCH, "--path", "~/data", "--out", "~/bench", "--config", "~/a.toml")
    assert (status, (home / "bench" / "results.json").is_file()) == (0, True), err
    assert not list(tmp_path.glob("~*"))


def test_home_in_the_python_api(icekit: Run, tmp_path: Path) -> None:
    found = plain.beside_builtins()
    chosen = {"components": {role: "plain" for role in ("backbone", "retriever", "segmentor", "learner")}}
    (tmp_path / "home" / "a.toml").write_text("seed = 3\n")
    assert load_settings(Path("~/a.toml")).seed == 3
    settings = Settings.model_validate({**chosen, "samples": 0, "max_concepts": 1})
    picture(tmp_path / "home" / "data" / "one.png")
    for path in ("~/run", Path("~/run")):
        extract("photo.png", path, settings, installed=found, overwrite=True)
        assert Extraction.open(path).run_dir == tmp_path / "home" / "run"
        assert write_report(Path(path)) == tmp_path / "home" / "run" / "report.html"
        assert len(ConceptLibrary(path)) == 1
        made = compose("{a}", {"a": path}, n=1, out="~/new", overwrite=True, installed=found)
        assert made.out == tmp_path / "home" / "new"
    values = {"dataset": {"path": "~/data"}, "bench": {"images": 1}}
    parts = {role: [name] for role, name in chosen["components"].items()}
    bench("folder", "~/bench", settings=values, components=parts, metrics=["looked"], installed=found)
    assert (tmp_path / "home" / "bench" / "results.json").is_file()


def test_home_in_tabletop(tmp_path: Path, icekit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from icekit_tabletop import plugin

    found = plain.beside_builtins(tabletop=plugin)
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    assert icekit("tabletop", "render", "--out", "~/scene")[:2] == (0, f"{tmp_path}/home/scene/image.png\n")


def test_a_folder_that_is_called_as_a_home(icekit: Run, tmp_path: Path) -> None:
    """``./~x`` is here, wherever it goes."""
    assert icekit("run", "photo.png", "--out", "./~x", *ONE)[0] == 0
    assert (tmp_path / "~x" / "manifest.json").is_file()
    assert icekit("report", "./~x")[0] == 0
    assert icekit("compose", "{a}", "a=./~x:cup", "--n", "1", "--out", "./~x-new")[0] == 0


PATHS = {
    "an image": ["run", "{}"],
    "a run": ["run", "photo.png", "--out", "{}", *ONE],
    "settings": ["run", "photo.png", "--config", "{}", *ONE],
    "a mask": ["run", "photo.png", *ONE[:2], *ONE[3:], "--segmentor", "masks", "--set", "segmentor.files={}"],
    "a bound run": ["compose", "{{a}}", "a={}:cup"],
    "a composition": ["compose", "{{a}}", "a=run", "--out", "{}"],
    "a report": ["report", "{}"],
    "a bench": [*BENCH, "--path", "data", "--out", "{}"],
    "a bench's settings": [*BENCH, "--path", "data", "--out", "x", "--config", "{}"],
    "pictures": [*BENCH, "--path", "{}", "--out", "x"],
}
BAD = {
    "~nosuchuser/x": "no user's home directory",
    "a" * 300: "file name too long",
    "a/" * 3000 + "b": "file name too long",
    "": "",
    "photo.png/x": "",
}


@pytest.mark.parametrize("bad", BAD, ids=["no user", "long", "deep", "empty", "in a file"])
@pytest.mark.parametrize("what", PATHS)
def test_paths_that_cannot_be(icekit: Run, tmp_path: Path, what: str, bad: str) -> None:
    picture(tmp_path / "data" / "one.png")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = icekit(*(part.format(bad) for part in PATHS[what]))
    assert (status, out, err.count("\n"), "Traceback" in err) == (2, "", 1, False), err
    assert BAD[bad] in err.lower()
    assert len(err) < 700
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_utf8(icekit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such names work wherever a file is meant; what is printed and kept is UTF-8."""
    picture(tmp_path / f"{NO_UTF8}.png")
    status, out, err = icekit("run", f"{NO_UTF8}.png", "--out", NO_UTF8, *ONE, "--json")
    assert status == 0, err
    assert json.loads(out)["image"]["source"] == f"{NO_UTF8}.png"
    for file in (tmp_path / NO_UTF8).rglob("*.[jht][sto]*"):
        file.read_bytes().decode("utf-8")
    assert "caf\\udce9" in (tmp_path / NO_UTF8 / "report.html").read_text()
    assert json.loads((tmp_path / NO_UTF8 / "manifest.json").read_bytes())["image"]["source"] == f"{NO_UTF8}.png"
    assert icekit("compose", "{a}", f"a={NO_UTF8}", "--n", "1", "--out", f"{NO_UTF8}-new")[0] == 0
    assert icekit("report", NO_UTF8)[0] == 0
    picture(tmp_path / "data" / f"{NO_UTF8}.png")
    status, _, err = icekit(*BENCH, "--path", "data", "--out", "bench")
    assert status == 0, err
    status, _, err = icekit(*BENCH, "--path", "data", "--out", f"{NO_UTF8}-bench")
    assert (status, "give one in UTF-8" in err, err.count("\n")) == (2, True, 1)
    status, _, err = icekit("run", f"{NO_UTF8}-nowhere.png")
    assert (status, err) == (2, "icekit: no such file: caf\\udce9-nowhere.png\n")


# --- Pictures of a bench ---------------------------------------------------------------------------------------------


def test_pictures_whose_names_become_alike(tmp_path: Path) -> None:
    names = ["a b", "a-b", "a+b", "A-b", "photo", "p" * 251, "p" * 250 + "q", "é" * 120]
    safe = safe_names(names)
    assert len({name.casefold() for name in safe}) == len(names)
    assert safe[4] == "photo"
    assert safe == [*safe_names(names[:4]), *safe_names(names[4:])]  # a name depends on those like it alone
    assert max(len(name.encode()) for name in safe) + len(".json") + PARTIAL < LONGEST
    for name in names[:3]:
        picture(tmp_path / f"{name}.png")
    pictures = FolderDataset(FolderDataset.Settings(path=tmp_path)).pictures(None, 0, (32, 32))
    assert len({one.name for one in pictures}) == 3


def test_a_bench_of_long_names(icekit: Run, tmp_path: Path) -> None:
    picture(tmp_path / "data" / f"{'p' * 251}.png")
    word = tmp_path / "data" / "masks" / ("p" * 251) / f"0-{'w' * 240}.png"
    word.parent.mkdir(parents=True)
    Image.fromarray(plain.quadrant("cup").numpy().astype(np.uint8) * 255).save(word)
    status, _, err = icekit(*BENCH, "--metric", "miou", "--path", "data", "--out", "bench")
    assert status == 0, err
    rows = f"[rows.{'r' * 200}]\nlearner.steps = 3\n"
    (tmp_path / "a.toml").write_text(rows)
    status, _, err = icekit(*BENCH, "--path", "data", "--out", "other", "--config", "a.toml")
    assert (status, "cannot have this name" in err, err.count("\n")) == (2, True, 1)


# --- A working directory that is gone --------------------------------------------------------------------------------


def test_a_working_directory_that_was_deleted(tmp_path: Path) -> None:
    code = f"""
import os, sys
os.mkdir({str(tmp_path / "gone")!r})
os.chdir({str(tmp_path / "gone")!r})
os.rmdir({str(tmp_path / "gone")!r})
from icekit.cli.program import main
main(["report", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "icekit: the working directory is not there any more: change to another one, as in `cd`\n"
