"""Nothing hangs in silence: what would take for ever is refused, and what takes long says how far it is."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import plain_components as plain
import pytest
from icekit_process import in_this_process
from PIL import Image

from icekit import InputError, files, waiting
from icekit.builtin.datasets.folder import FolderDataset
from icekit.protocols import Step
from icekit.run.compose import compose
from icekit.run.progress import ImageProgress, Progress
from icekit.words import MAX_WORD, MAX_WORDS, read_vocabulary

Run = Callable[..., tuple[int, str, str]]
ONE = [*plain.OPTIONS, "--set", "samples=1", "--set", "max_concepts=1"]
BENCH = ["bench", "folder", "--path", "data", "--out", "new", "--metric", "looked"]
ENDLESS = "1" * 5000


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "NO_WRITER_S", 0.1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def icekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    from icekit_tabletop import plugin

    Image.new("RGB", (50, 50), "red").save(tmp_path / "photo.png")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (50, 50), "red").save(tmp_path / "data" / "one.png")
    run = in_this_process(tmp_path, monkeypatch, capsys)
    found = plain.beside_builtins(plain=plain, tabletop=plugin)
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    return run


# --- Numbers ---------------------------------------------------------------------------------------------------------

RUN = ["run", "photo.png", "--out", "new", *ONE]
NUMBERS = {
    "--seed": [RUN, ["compose", "{a}", "a=x"], [*BENCH, *plain.OPTIONS], ["tabletop", "render", "--out", "new"]],
    "--n": [["compose", "{a}", "a=x"], [*BENCH, *plain.OPTIONS], ["bench", "tabletop", "--out", "new"]],
    "--max-concepts": [RUN],
    "--size": [["tabletop", "render", "--out", "new"]],
    "--n-objects": [["tabletop", "render", "--out", "new"]],
    "--part": [BENCH],
}


@pytest.mark.parametrize("value", [ENDLESS, "-1", "1.5", "10" * 10, "x" * 5000, "", "1e9", "inf"])
@pytest.mark.parametrize("option", NUMBERS)
def test_options_that_are_no_number_of_things(icekit: Run, tmp_path: Path, option: str, value: str) -> None:
    for command in NUMBERS[option]:
        status, out, err = icekit(*command, option, value)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert option in err
        assert len(err) < 300
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "samples=1000000000", "max_concepts=1000000000", "learner.steps=1000000000000", "sample_steps=1000000000",
        "seed=" + ENDLESS, "learner.steps=" + ENDLESS,
    ],
)  # fmt: skip
def test_settings_that_would_take_for_ever(icekit: Run, tmp_path: Path, setting: str) -> None:
    status, out, err = icekit(*RUN, "--set", setting)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert setting.partition("=")[0] in err
    assert not (tmp_path / "new").exists()


def test_a_bench_that_would_take_for_ever(icekit: Run, tmp_path: Path) -> None:
    for setting in ("bench.images=1000000000", "learner.ice.steps=1000000000"):
        status, _, err = icekit(*BENCH, *plain.OPTIONS[:3], "--learner", "ice", "--set", setting)
        assert (status, err.count("\n"), setting.partition("=")[0].rpartition(".")[2] in err) == (2, 1, True), err
    status, _, err = icekit(*BENCH, *plain.OPTIONS, "--n", "10000")
    assert (status, "data has 1 pictures" in err) == (2, True)
    assert not (tmp_path / "new").exists()


def test_the_python_api_has_the_same_bounds() -> None:
    for n in (0, 10**9):
        with pytest.raises(InputError, match=f"cannot be {n}"):
            compose("{a}", {"a": "nowhere"}, n=n)


# --- Vocabularies ----------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_a_million_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"word{number}\n" for number in range(1_000_000)))
    begun = time.monotonic()
    with pytest.raises(InputError, match=f"has 1000000 words, and can have {MAX_WORDS}"):
        read_vocabulary(str(tmp_path / "a.txt"))
    assert time.monotonic() - begun < 10
    (tmp_path / "a.txt").write_text("cup\n" * 1_000_000)
    assert read_vocabulary(str(tmp_path / "a.txt")) == ["cup"]


def test_a_vocabulary_of_one_long_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cup, ball, " * 100_000)
    with pytest.raises(InputError, match="give one word a line") as error:
        read_vocabulary(str(tmp_path / "a.txt"))
    assert len(str(error.value)) < 300
    assert read_vocabulary(["a" * MAX_WORD]) == ["a" * MAX_WORD]


# --- Pipes and sockets -----------------------------------------------------------------------------------------------

NEW = ["run", "photo.png", "--out", "new", *plain.OPTIONS[:1]]
WHERE = {
    "an image": (["run", "there", "--out", "new", *ONE], "there"),
    "settings": ([*RUN, "--config", "there"], "there"),
    "a vocabulary": (
        [*NEW, "--retriever", "clip", "--set", "retriever.vocabulary=there"],
        "there",
    ),
    "a mask": (
        [*NEW, "--retriever", "plain", "--segmentor", "masks", "--set", "segmentor.files=there"],
        "there",
    ),
    "a picture of a bench": ([*BENCH, *plain.OPTIONS], "data/two.png"),
    "a mask of a bench": ([*BENCH, *plain.OPTIONS], "data/masks/one/0-cup.png"),
    "a bench's settings": ([*BENCH, *plain.OPTIONS, "--config", "there"], "there"),
    "pictures": (["bench", "folder", "--path", "there", "--out", "new", *plain.OPTIONS], "there"),
    "a run": (["report", "there"], "there"),
    "a bound run": (["compose", "{a}", "a=there"], "there"),
    "a new run": (["run", "photo.png", "--out", "there", *ONE], "there"),
    "a composition": (["compose", "{a}", "a=run", "--out", "there"], "there"),
    "a new bench": (["bench", "folder", "--path", "data", "--out", "there", *plain.OPTIONS], "there"),
    "a manifest": (["report", "new"], "new/manifest.json"),
    "a bench's record": ([*BENCH, *plain.OPTIONS, "--resume"], "new/bench.json"),
    "a scene": (["tabletop", "render", "--out", "new"], "new/image.png"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("what", WHERE)
def test_what_is_no_file(icekit: Run, tmp_path: Path, what: str, kind: str) -> None:
    typed, name = WHERE[what]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        here = os.getcwd()
        os.chdir((tmp_path / name).parent)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind(Path(name).name)
        os.chdir(here)
    begun = time.monotonic()
    status, out, err = icekit(*typed)
    last = err.splitlines()[-1]
    assert (status, out, "Traceback" in err) == (2, "", False), err
    assert Path(name).name in last or Path(name).parent.name in last
    assert time.monotonic() - begun < 5
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["log.jsonl", ".icekit.lock", "checkpoint/regions.json", "checkpoint/written.jsonl"])
def test_what_is_no_file_in_a_run_that_goes_on(icekit: Run, tmp_path: Path, name: str) -> None:
    assert icekit(*RUN, "--set", "learner.fail_at=3")[0] == 1
    (tmp_path / "new" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "new" / name)
    begun = time.monotonic()
    status, _, err = icekit("run", "photo.png", "--out", "new", "--resume")
    assert time.monotonic() - begun < 5
    assert status in (1, 2)
    assert "Traceback" not in err


# --- Progress --------------------------------------------------------------------------------------------------------


def test_what_takes_long_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter(range(0, 100_000, 7))
    monkeypatch.setattr(waiting.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.WARNING):
        assert list(waiting.told(range(20), "counting")) == list(range(20))
    assert caplog.messages == ["counting: 1 of 20", "counting: 6 of 20", "counting: 11 of 20", "counting: 16 of 20"]


def test_long_work_off_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 0.0)
    Image.new("RGB", (50, 50), "red").save(tmp_path / "one.png")
    with caplog.at_level(logging.WARNING):
        progress = Progress()
        progress.stage_started("learn", None)
        progress.step_done(Step(3, 400, "walk", {}))
        progress.stage_started("generate", 9)
        progress.image_generated(2, 9)
        with ImageProgress() as images:
            images.show(4, 5)
        FolderDataset(FolderDataset.Settings(path=tmp_path)).pictures(None, 0, (32, 32))
    assert caplog.messages == [
        "learning tokens: 3 of 400",
        "generating samples: 2 of 9",
        "generating images: 4 of 5",
        f"reading the pictures of {tmp_path}: 0 of 1",
    ]
