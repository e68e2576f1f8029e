"""What is on disk stays until something whole is in its place, and what is not icekit's stays for good."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
from click.testing import CliRunner
from icekit_process import in_this_process
from icekit_tabletop.plugin import tabletop
from PIL import Image

from icekit import Extraction, InputError
from icekit.report import page
from icekit.run import ownership
from icekit.run.directory import RunDirectory
from icekit.run.ownership import LOCK, NEXT, Busy, exchange, finish_exchange, writing_into

RENDER_REPORT = page.render_report
Run = Callable[..., tuple[int, str, str]]
ONE = ["--set", "samples=1", "--set", "max_concepts=1"]
BENCH = [
    "bench", "folder", "--path", "data", "--backbone=plain", "--retriever=plain", "--segmentor=plain",
    "--learner=plain", "--metric=miou", "--metric=looked", "--set", "bench.images=1", "--set", "learner.plain.steps=3",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A photo, and a data set of it."""
    Image.new("RGB", (50, 50), "red").save(tmp_path / "photo.png")
    plain.write_data_set(tmp_path / "data")
    return tmp_path


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and one looks at a report."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(page, "render_report", lambda run_dir, manifest, *_: f"the report of {run_dir}")


@pytest.fixture
def icekit(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_this_process(place, monkeypatch, capsys)


@pytest.fixture
def run(icekit: Run) -> Run:
    """``icekit run photo.png --out run``."""

    def call(*arguments: str) -> tuple[int, str, str]:
        return icekit("run", "photo.png", *plain.OPTIONS, *ONE, "--out", "run", *arguments)

    return call


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder, links as where they lead; without what is built to replace it."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if NEXT not in path.relative_to(folder).parts:
            found[name] = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
    return found


def refused(result: tuple[int, str, str], *hints: str) -> None:
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert all(hint in err for hint in hints), err
    assert len(err.splitlines()) == 1, err


# --- The old goes when the new is whole ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "status", "hint"),
    [
        (["--set", "retriever.ghosts=9"], 1, "no concept found"),
        (["--set", "learner.fail_at=7"], 1, "two lines"),
        (["--set", "min_area=0.9"], 1, "no concept found"),
        (["--segmentor=masks"], 2, "has no files"),
        (["--segmentor=masks", "--set", "segmentor.files=nowhere.png"], 2, "nowhere.png"),
        (["--learner=plane"], 2, "plane"),
        (["--set", "backbone.image_size=[0,0]"], None, ""),
    ],
)
def test_a_failed_overwrite_keeps_the_old_run(
    icekit: Run, run: Run, place: Path, wrong: list[str], status: int | None, hint: str
) -> None:
    assert run()[0] == 0
    before = tree(place / "run")
    got, _, err = run("--overwrite", "--seed", "5", *wrong)
    assert got == status or (status is None and got in (1, 2)), err
    assert hint in err
    assert tree(place / "run") == before
    assert Extraction.open(place / "run").manifest["seed"] == 0
    assert icekit("compose", "{a}", "a=run", "--n", "1", "--out", "made")[0] == 0
    # Once it is right, nothing is left of either.
    status, _, err = run("--overwrite", "--seed", "5")
    assert status == 0, err
    assert Extraction.open(place / "run").manifest["seed"] == 5
    assert tree(place / "run").keys() == before.keys()
    assert not (place / "run" / NEXT).exists()


def test_an_overwrite_that_failed_goes_on_with_resume(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render_report", RENDER_REPORT)
    assert run()[0] == 0
    before = tree(place / "run")
    assert run("--overwrite", "--seed", "5", "--set", "learner.fail_at=12")[0] == 1
    refused(run(), "already holds a complete run and one that was interrupted", "--resume")
    state = place / "run" / NEXT / "checkpoint" / "run.json"
    record = json.loads(state.read_text())
    record["settings"]["learner"]["fail_at"] = None
    state.write_text(json.dumps(record))
    assert tree(place / "run") == before
    status, _, err = run("--resume", "--seed", "5")
    assert status == 0, err
    assert Extraction.open(place / "run").manifest["seed"] == 5
    assert not (place / "run" / NEXT).exists()
    assert f"{NEXT}/" not in (place / "run" / "report.html").read_text()


def test_a_run_has_a_record_of_its_files(run: Run, place: Path) -> None:
    assert run()[0] == 0
    files = json.loads((place / "run" / "manifest.json").read_text())["files"]
    assert files == sorted(name for name, content in tree(place / "run").items() if content != "folder")


def test_a_failed_bench_keeps_the_old_one(icekit: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert icekit(*BENCH, "--out", "bench")[0] == 0
    before = tree(place / "bench")

    def fail(*arguments: object) -> None:
        raise InputError("too late")

    with monkeypatch.context() as patched:
        patched.setattr(plain.Looked, "measure", fail)
        for _ in range(3):  # what one failed attempt leaves is in no other's way
            status, _, err = icekit(*BENCH, "--seed", "2", "--out", "bench", "--overwrite")
            assert status != 0 and "too late" in err
            assert tree(place / "bench") == before
    status, _, err = icekit(*BENCH, "--seed", "2", "--out", "bench", "--resume")
    assert status == 0, err
    assert json.loads((place / "bench" / "results.json").read_text())["seed"] == 2
    assert not (place / "bench" / NEXT).exists()
    assert tree(place / "bench").keys() == before.keys()
    assert NEXT not in (place / "bench" / "runs" / "ceiling" / "one" / "settings.toml").read_text()


def test_a_failed_composition_keeps_the_old_one(
    icekit: Run, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run()[0] == 0
    assert icekit("compose", "{a}", "a=run", "--n", "3", "--out", "made")[0] == 0
    before = tree(place / "made")
    generate = plain.PlainBackbone.generate

    def fail(self: plain.PlainBackbone, prompts: Any, **options: Any) -> Any:
        generate(self, prompts[:1], **options | {"seeds": options["seeds"][:1]})
        raise InputError("too late")

    with monkeypatch.context() as patched:
        patched.setattr(plain.PlainBackbone, "generate", fail)
        refused(icekit("compose", "a {a}", "a=run", "--n", "2", "--out", "made", "--overwrite"), "too late")
        refused(icekit("compose", "a {a}", "a=run", "--n", "2", "--out", "other"), "too late")
    assert tree(place / "made") == before
    assert tree(place / "other") == {}
    for out, options in (("made", ["--overwrite"]), ("other", [])):
        assert icekit("compose", "a {a}", "a=run", "--n", "2", "--out", out, *options)[0] == 0
        assert tree(place / out).keys() == {"0.png", "1.png", "prompt.json", "sheet.png"}
        assert not (place / out / NEXT).exists()


# --- What is not icekit's stays --------------------------------------------------------------------------------------


def test_an_overwritten_run_leaves_what_others_put_there(run: Run, place: Path) -> None:
    assert run("--set", "max_concepts=2")[0] == 0
    mine = ["notes.txt", "masks/9-mine.png", "samples/7-object-3.png", "masks/raw/a.txt", "lora.safetensors"]
    for name in mine:
        (place / "run" / name).parent.mkdir(exist_ok=True)
        (place / "run" / name).write_bytes(b"mine")
    status, _, err = run("--overwrite")
    assert status == 0, err
    assert [(place / "run" / name).read_bytes() for name in mine] == [b"mine"] * len(mine)
    assert not (place / "run" / "masks" / "1-red-bowl.png").exists()


def test_somebody_elses_file_is_never_replaced(run: Run, place: Path) -> None:
    """It has the name of one of the new run's: refused before anything was changed, and finished when it is away."""
    assert run()[0] == 0
    (place / "run" / "masks" / "1-red-bowl.png").write_bytes(b"mine")
    before = tree(place / "run")
    status, _, err = run("--set", "max_concepts=2", "--overwrite")
    assert status == 2 and "run/masks/1-red-bowl.png is in the way: icekit did not write it" in err.splitlines()[-1]
    assert tree(place / "run") == before
    (place / "run" / "masks" / "1-red-bowl.png").rename(place / "mine.png")
    assert run("--set", "max_concepts=2", "--resume")[0] == 0
    assert len(Extraction.open(place / "run").concepts) == 2


def test_somebody_elses_file_in_an_interrupted_run(icekit: Run, run: Run, place: Path) -> None:
    assert run("--set", "learner.fail_at=3")[0] == 1
    manifest, report = place / "run" / "manifest.json", place / "run" / "report.html"
    manifest.write_bytes(b"{}")
    for flag in ("--resume", "--overwrite"):
        refused(run(flag), "run/manifest.json is in the way: icekit did not write it")
    assert manifest.read_bytes() == b"{}"
    manifest.unlink()
    # An exporter's file is in the way of that exporter alone.
    report.write_bytes(b"mine")
    status, out, err = run("--overwrite")
    assert (status, "cup" in out) == (1, True)
    last = err.splitlines()[-1]
    assert "exporter 'report' of plugin 'builtin' (icekit 0): run/report.html is in the way: icekit did not" in last
    assert "the run is complete; `icekit export run --format report` writes what is missing" in last
    assert report.read_bytes() == b"mine" and len(Extraction.open(place / "run").concepts) == 1
    assert "report.html" not in Extraction.open(place / "run").manifest["files"]
    refused(icekit("report", "run"), "run/report.html is in the way: icekit did not write it")
    report.rename(place / "mine.html")
    assert icekit("export", "run", "--format", "report")[:2] == (0, "run/report.html\n")
    assert run("--overwrite")[0] == 0


@pytest.mark.parametrize("record", [True, False])
def test_an_overwritten_bench_leaves_what_others_put_there(icekit: Run, place: Path, record: bool) -> None:
    assert icekit(*BENCH, "--out", "bench")[0] == 0
    names = tree(place / "bench").keys()
    mine = ["data/notes.txt", "notes.txt", "runs/mine.txt", "runs/plain-plain/one/notes.txt", "values/a/b/c.json"]
    mine += ["data/one/masks/9-mine.png"] if record else []
    if not record:  # as a version wrote it that had none
        (place / "bench" / "written.jsonl").unlink()
        (place / "bench" / "located" / "plain-plain" / "one" / "checkpoint" / "written.jsonl").unlink()
    for name in mine:
        (place / "bench" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "bench" / name).write_bytes(b"mine")
    status, _, err = icekit(*BENCH, "--learner=random", "--out", "bench", "--overwrite")
    assert status == 0, err
    assert [(place / "bench" / name).read_bytes() for name in mine] == [b"mine"] * len(mine)
    assert names <= tree(place / "bench").keys()
    status, _, err = icekit(*BENCH[:-4], "--out", "bench", "--overwrite", "--seed", "3")
    assert status == 0, err
    assert not (place / "bench" / "runs" / "plain-random").exists()


def test_a_composition_replaces_no_picture_of_others(icekit: Run, run: Run, place: Path) -> None:
    assert run()[0] == 0
    assert icekit("compose", "{a}", "a=run", "--n", "2", "--out", "made")[0] == 0
    (place / "made" / "2.png").write_bytes(b"mine")
    arguments = ["compose", "a {a}", "a=run", "--out", "made", "--overwrite"]
    refused(icekit(*arguments, "--n", "3"), "made/2.png is in the way")
    assert icekit(*arguments, "--n", "1")[0] == 0
    assert tree(place / "made").keys() == {"0.png", "2.png", "prompt.json"}
    assert (place / "made" / "2.png").read_bytes() == b"mine"


def test_render_replaces_its_own_scene_alone(tmp_path: Path) -> None:
    def render(*arguments: str) -> Any:
        return CliRunner().invoke(tabletop, ["render", "--out", str(tmp_path / "scene"), *arguments])

    (tmp_path / "scene").mkdir()
    for name in ("image.png", "scene.json"):
        (tmp_path / "scene" / name).write_bytes(b"mine")
        result = render()
        assert isinstance(result.exception, InputError) and f"scene/{name} is in the way" in str(result.exception)
        assert tree(tmp_path / "scene") == {name: b"mine"}
        (tmp_path / "scene" / name).unlink()
    assert render("--n-objects", "4", "--seed", "1").exit_code == 0
    (tmp_path / "scene" / "masks" / "0-mine.png").write_bytes(b"mine")
    assert render("--n-objects", "1", "--seed", "2").exit_code == 0
    [thing] = json.loads((tmp_path / "scene" / "scene.json").read_text())["objects"]
    assert tree(tmp_path / "scene").keys() == {
        "image.png", "scene.json", "masks", "masks/0-mine.png", thing["mask"]
    }  # fmt: skip
    (tmp_path / "scene" / "masks").rename(tmp_path / "elsewhere")
    (tmp_path / "scene" / "masks").symlink_to(tmp_path / "elsewhere")
    assert "masks is a symbolic link" in str(render().exception)


# --- Links -----------------------------------------------------------------------------------------------------------


def led_away(place: Path, path: Path) -> None:
    """Put a symbolic link into the place of a file or folder, to where that is now."""
    path.rename(place / "elsewhere")
    path.symlink_to(place / "elsewhere")


@pytest.mark.parametrize("name", ["masks", "samples", "checkpoint", NEXT, "image.png", "log.jsonl", "manifest.json"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_no_link_in_a_run_is_followed(run: Run, place: Path, name: str, interrupted: bool) -> None:
    assert run(*(["--set", "learner.fail_at=7"] if interrupted else []))[0] == int(interrupted)
    target = place / "run" / name
    if not target.exists():
        target.touch() if "." in name[1:] else target.mkdir()
    led_away(place, target)
    before = tree(place)
    refused(run("--overwrite"), "run")
    assert tree(place) == before


@pytest.mark.parametrize("name", ["data", "data/one/masks", "runs", "runs/plain-plain/one/masks", "values"])
def test_no_link_in_a_bench_is_followed(icekit: Run, place: Path, name: str) -> None:
    assert icekit(*BENCH, "--out", "bench")[0] == 0
    led_away(place, place / "bench" / name)
    before = tree(place)
    for flag in ("--overwrite", "--resume"):
        refused(icekit(*BENCH, "--out", "bench", flag), f"bench/{name} is a symbolic link")
    assert tree(place) == before


def test_no_link_in_a_composition_is_followed(icekit: Run, run: Run, place: Path) -> None:
    assert run()[0] == 0
    assert icekit("compose", "{a}", "a=run", "--n", "1", "--out", "made")[0] == 0
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "0.png").write_bytes(b"mine")
    (place / "made" / NEXT).symlink_to(place / "elsewhere")
    refused(icekit("compose", "{a}", "a=run", "--n", "1", "--out", "made", "--overwrite"), "is a symbolic link")
    assert (place / "elsewhere" / "0.png").read_bytes() == b"mine"


def test_a_run_directory_may_itself_be_a_link(run: Run, place: Path) -> None:
    (place / "large disk").mkdir()
    (place / "run").symlink_to(place / "large disk")
    assert run()[0] == run("--overwrite")[0] == 0
    assert (place / "large disk" / "manifest.json").is_file()


# --- One process at a time -------------------------------------------------------------------------------------------


@pytest.fixture
def holder() -> Iterator[Callable[..., int]]:
    """Processes that are writing into folders: starts one, and says which it is."""
    started: list[int] = []

    def hold(folder: Path, *names: str) -> int:
        ready, told = os.pipe()
        process = os.fork()
        if process == 0:
            with writing_into(folder, *names):
                os.write(told, b"1")
                signal.pause()
            os._exit(0)
        started.append(process)
        os.read(ready, 1)
        return process

    yield hold
    for process in started:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_the_second_process_is_refused_by_name(icekit: Run, run: Run, place: Path, holder: Callable[..., int]) -> None:
    assert run()[0] == icekit("compose", "{a}", "a=run", "--n", "1", "--out", "made")[0] == 0
    assert icekit(*BENCH, "--out", "bench")[0] == 0
    for folder, command in {
        "run": ["run", "photo.png", *plain.OPTIONS, *ONE],
        "bench": BENCH,
        "made": ["compose", "{a}", "a=run", "--n", "1"],
    }.items():
        process = holder(place / folder)
        for options in ([], ["--overwrite"], *([["--resume"]] if folder != "made" else [])):
            refused(
                icekit(*command, "--out", folder, *options),
                f"another icekit (process {process}) is writing into {folder}",
            )
    # They can be read meanwhile, and a composition of another folder made.
    assert icekit("report", "run")[0] == icekit("compose", "{a}", "a=run", "--n", "1", "--out", "more")[0] == 0


def test_a_lock_goes_with_its_process(run: Run, place: Path, holder: Callable[..., int]) -> None:
    process = holder(place / "run")
    refused(run(), f"process {process}")
    os.kill(process, signal.SIGKILL)
    assert os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert (place / "run" / LOCK).is_file()
    assert run()[0] == 0
    assert not (place / "run" / LOCK).exists()
    assert run("--set", "learner.fail_at=1", "--overwrite")[0] == 1
    assert not (place / "run" / LOCK).exists()


def test_a_bench_has_one_process(icekit: Run, place: Path, holder: Callable[..., int]) -> None:
    process = holder(place / "bench", LOCK)
    refused(icekit(*BENCH, "--out", "bench"), f"process {process}")
    refused(icekit(*BENCH, "--out", "bench", "--resume"), f"process {process}")
    refused(icekit(*BENCH, "--out", "bench", "--overwrite"), f"process {process}")


def test_what_stays_empty_goes_again(run: Run, place: Path) -> None:
    refused(run("--learner=plane"), "plane")
    assert not (place / "run").exists()
    with pytest.raises(KeyError), writing_into(place / "deep" / "folder"):
        raise KeyError
    assert not (place / "deep").exists()
    with writing_into(place), pytest.raises(Busy, match=f"process {os.getpid()}"), writing_into(place):
        pass


# --- What killed processes leave -------------------------------------------------------------------------------------


def test_half_written_files_go_at_the_next_start(icekit: Run, run: Run, place: Path) -> None:
    assert run("--set", "learner.fail_at=7")[0] == 1
    assert icekit(*BENCH, "--out", "bench")[0] == 0
    (place / "bench" / "results.json").unlink()
    (place / "made" / NEXT).mkdir(parents=True)
    left = [
        "run/masks/.0-cup.png.17.part", "run/.manifest.json.17.part", "bench/data/one/.image.png.17.part",
        "bench/data/one/masks/.0-cup.png.17.part", "bench/.bench.json.17.part", "bench/.results.json.17.part",
        "bench/values/plain-plain/.one.json.17.part", "bench/runs/plain-plain/one/.manifest.json.17.part",
        "bench/located/plain-plain/one/checkpoint/.regions.json.17.part", f"made/{NEXT}/.0.png.17.part",
        f"made/{NEXT}/3.png",
    ]  # fmt: skip
    for name in left:
        (place / name).write_bytes(b"ha")
    (place / "run" / "checkpoint" / ".learner.safetensors.17.part").mkdir()
    (place / "run" / "checkpoint" / ".learner.safetensors.17.part" / "x").write_bytes(b"ha")
    strip = next((place / "bench" / "images").rglob("*.png"))
    strip.with_name(f".{strip.name}.17.part").write_bytes(b"ha")
    assert run("--resume")[0] == 1  # it fails at the same step
    assert icekit(*BENCH, "--out", "bench", "--resume")[0] == 0
    assert run("--overwrite")[0] == 0
    assert icekit("compose", "{a}", "a=run", "--n", "1", "--out", "made")[0] == 0
    assert [str(path) for path in place.rglob("*") if ".part" in path.name] == []
    assert tree(place / "made").keys() == {"0.png", "prompt.json"}
    assert not (place / "run" / "checkpoint").exists()


class Killed(BaseException):
    """Nothing more happens."""


@pytest.mark.parametrize("call", ["replace", "unlink", "rmdir", "fsync", "mkdir"])
def test_an_exchange_is_ended_from_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Before the plan is there the old files stay, and after it the next process ends it."""
    old = {"manifest.json": b"old", "a/x": b"old x", "a/gone": b"old", "b/gone": b"old"}
    new = {"manifest.json": b"new", "a/x": b"new x", "c/d": b"new d"}
    mine = {"a/mine": b"mine", "notes.txt": b"mine"}
    steps = 0
    for step in range(100):
        folder = tmp_path / str(step)
        for name, content in {**old, **mine, **{f"{NEXT}/{name}": content for name, content in new.items()}}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        left, original = step, getattr(os, call)

        def counted(*arguments: Any, original: Any = original, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return original(*arguments, **options)

        killed = False
        with monkeypatch.context() as patched:
            patched.setattr(os, call, counted)
            try:
                exchange(folder, old=old, new=new, last="manifest.json")
            except Killed:
                killed = True
        planned = ownership.is_pending(folder)
        finish_exchange(folder, lambda name: True)
        found = {name: content for name, content in tree(folder).items() if content != "folder"}
        found = {name: content for name, content in found.items() if not name.endswith(".part")}
        if killed and not planned and (folder / NEXT / "manifest.json").is_file():
            assert found == old | mine
        else:
            assert found == new | mine
            assert not (folder / "b").exists()
            assert not (folder / NEXT).exists() or call in ("rmdir", "unlink")
        steps += 1
        if not killed:
            break
    assert not killed and steps > (1 if call != "fsync" else 0)


def test_a_reader_ends_an_exchange(run: Run, icekit: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, reader in enumerate(
        (["report", "run"], ["compose", "{a}", "a=run", "--n", "1"], ["run", "photo.png", "--out", "run", "--resume"])
    ):
        assert run("--overwrite", "--seed", "1")[0] == 0
        moved = 0

        def replace(*arguments: Any, original: Any = os.replace, stop: int = 3 + number) -> None:
            nonlocal moved
            if f"/{NEXT}/" in f"/{arguments[0]}" and f"/{NEXT}/" not in f"/{arguments[1]}":
                moved += 1
                if moved > stop:
                    raise Killed
            original(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            with pytest.raises(Killed):
                run("--overwrite", "--seed", "2")
        assert not (place / "run" / "manifest.json").exists()  # it says that all files are there
        status, _, err = icekit(*reader)
        assert status == 0, err
        assert Extraction.open(place / "run").manifest["seed"] == 2
        assert not (place / "run" / NEXT).exists()


@pytest.mark.parametrize(
    "plan",
    [
        {"old": ["../photo.png"], "new": ["manifest.json"], "last": "manifest.json"},
        {"old": ["notes.txt"], "new": ["manifest.json"], "last": "manifest.json"},
        {"old": [], "new": ["/tmp/x", "manifest.json"], "last": "manifest.json"},
        {"old": [1], "new": [], "last": None},
        [],
    ],
)
def test_a_plan_of_somebody_else_is_not_carried_out(run: Run, icekit: Run, place: Path, plan: Any) -> None:
    assert run()[0] == 0
    (place / "run" / "notes.txt").write_bytes(b"mine")
    (place / "run" / NEXT).mkdir()
    (place / "run" / NEXT / "manifest.json").write_bytes((place / "run" / "manifest.json").read_bytes())
    (place / "run" / NEXT / "exchange.json").write_text(json.dumps(plan))
    before = tree(place)
    refused(icekit("report", "run"), "run/.next/exchange.json")
    assert tree(place) == before


def test_a_record_of_somebody_else_deletes_nothing_of_others(run: Run, place: Path) -> None:
    assert run()[0] == 0
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    manifest["files"] += ["../photo.png", "notes.txt", "/tmp/x", 3, None, "masks/../../photo.png"]
    (place / "run" / "manifest.json").write_text(json.dumps(manifest))
    (place / "run" / "notes.txt").write_bytes(b"mine")
    assert RunDirectory(place / "run").own_names() <= set(tree(place / "run"))
    assert run("--overwrite")[0] == 0
    assert (place / "photo.png").is_file() and (place / "run" / "notes.txt").is_file()
