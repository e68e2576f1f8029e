"""Killed at any moment: the old result or the new one is whole, and what goes on ends as if nothing had happened.

A child of this process does the work and gets SIGKILL, by itself before one of its changes on disk, or from here after
a random time. Then the command is given again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_components as plain
import pytest
from PIL import Image

from icekit import Extraction, InputError, extract
from icekit.bench import bench
from icekit.plugins import Plugins
from icekit.report import page
from icekit.run.compose import compose
from icekit.run.ownership import LOCK
from icekit.settings import load_settings

CHANGES = ("replace", "unlink", "rmdir", "mkdir", "fsync")
"""What changes something on disk, or comes between two changes."""
PLAIN = {role: "plain" for role in ("backbone", "retriever", "segmentor", "learner")}
Tree = dict[str, bytes]


@pytest.fixture(scope="module")
def found() -> Plugins:
    return plain.beside_builtins()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where all is done, in a world in which no time passes: what is made twice is the same bit for bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(page, "render_report", lambda run_dir, manifest, *_: f"{manifest.concepts}")
    for module in ("icekit.run.orchestrator", "icekit.bench.benchmark"):
        monkeypatch.setattr(sys.modules[module], "time", SimpleNamespace(monotonic=lambda: 0.0))
    Image.new("RGB", (50, 50), "red").save(tmp_path / "photo.png")
    plain.write_data_set(tmp_path / "data")
    yield tmp_path


class Work:
    """A command, and what is to be of it.

    do: the command, with these options. old: the folder as it was before, empty for nothing. new: as it is in the end.
    whole: whether what is in the folder can be used, raises if not.
    """

    def __init__(
        self, do: Callable[..., Any], again: dict[str, bool], whole: Callable[[Path], Any], **first: Any
    ) -> None:
        self.do, self.again, self.whole, self.first = do, again, whole, first

    def go_on(self, out: Path) -> None:
        """What people do after a kill."""
        try:
            self.do(out, **self.again)
        except InputError as error:  # the old one is there, and nothing has been begun that could go on
            assert "cannot go on" in str(error)
            self.do(out, **self.first)


def works(found: Plugins, place: Path, slow: float = 0.0) -> dict[str, tuple[Work, Callable[[Path], Any] | None]]:
    """Command -> its work, and what makes the old result that it replaces."""

    def run(out: Path, seed: int = 1, concepts: int = 2, **options: bool) -> None:
        settings = load_settings(
            options={
                "components": PLAIN, "samples": 1, "max_concepts": concepts, "seed": seed,
                "learner": {"pause": slow}, "segmentor": {"pause": slow}, "exporters": ["plain", "report"],
            }
        )  # fmt: skip
        extract("photo.png", out, settings, installed=found, **options)

    def measure(out: Path, seed: int = 1, **options: bool) -> None:
        bench(
            "folder",
            out,
            seed=seed,
            components={role: [name] for role, name in PLAIN.items()},
            metrics=["miou", "looked"],
            settings={
                "attributes": ["colour"],
                "max_concepts": 1,
                "dataset": {"path": "data"},
                "bench": {"images": 1},
                "exporters": ["plain"],
                "learner": {"plain": {"steps": 6, "pause": slow}},
            },
            installed=found,
            **options,
        )

    def mix(out: Path, prompt: str = "a {a}", n: int = 3, **options: bool) -> None:
        compose(prompt, {"a": "source"}, n=n, out=out, installed=found, **options)

    run(place / "source")
    read, resume, overwrite = Extraction.open, {"resume": True}, {"overwrite": True}

    def measured(out: Path) -> None:
        if not (out / ".next").exists():
            assert (out / "results.json").is_file()

    def mixed(out: Path) -> None:
        assert (out / "prompt.json").is_file() or (out / ".next" / "exchange.json").is_file()

    return {
        "run": (Work(run, resume, read), None),
        "run --overwrite": (Work(run, resume, read, overwrite=True), lambda out: run(out, seed=2, concepts=3)),
        "bench": (Work(measure, resume, measured), None),
        "bench --overwrite": (Work(measure, resume, measured, overwrite=True), lambda out: measure(out, seed=2)),
        "compose": (Work(mix, overwrite, mixed), None),
        "compose --overwrite": (Work(mix, overwrite, mixed, overwrite=True), lambda out: mix(out, "{a}", 4)),
    }


def child(action: Callable[[], Any], *, die_at: int | None = None, told: int | None = None) -> int:
    """Do something in a process of its own; its id.

    die_at: the change on disk before which it kills itself. told: a pipe for their number in the end.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    with contextlib.suppress(BaseException):
        changes = 0

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def change(*arguments: Any, **options: Any) -> Any:
                nonlocal changes
                if changes == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes += 1
                return original(*arguments, **options)

            return change

        for name in CHANGES:
            setattr(os, name, counting(getattr(os, name)))
        action()
        if told is not None:
            os.write(told, str(changes).encode())
        status = 0
    os._exit(status)


def tree(folder: Path) -> Tree:
    """All that is in a folder; a lock that nobody holds is as good as none."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.name != LOCK}
    return {name: b"a folder" if path.is_dir() else path.read_bytes() for name, path in paths.items()}


def without_next(files: Tree) -> Tree:
    return {name: content for name, content in files.items() if name.partition("/")[0] != ".next"}


def prepared(place: Path, old: Callable[[Path], Any] | None) -> Path:
    """The folder that all commands write into, with the old result in it and a file that is not icekit's."""
    out = place / "out"
    if old is not None and not (place / "old").exists():
        old(Path("old"))
        (place / "old" / "notes.txt").write_bytes(b"mine")
    shutil.rmtree(out, ignore_errors=True)
    if old is not None:
        shutil.copytree(place / "old", out)
    return out


def check(work: Work, out: Path, old: Tree, new: Tree, when: str) -> None:
    """After a kill: the old is whole or the new will be; then it goes on to the same end."""
    left = tree(out)
    if old and ".next/exchange.json" not in left and without_next(left) != new:
        assert without_next(left) == old, when
    if old or left.keys() >= new.keys():
        work.whole(Path("out"))
    work.go_on(Path("out"))
    ended = tree(out)
    assert ended.keys() == new.keys(), when
    assert [name for name in new if ended[name] != new[name]] == [], when
    assert not list(out.rglob(LOCK)), when


@pytest.mark.parametrize(
    ("command", "moments"),
    [
        ("run", 9),
        ("run --overwrite", 12),
        ("bench", 6),
        ("bench --overwrite", 6),
        ("compose", 4),
        ("compose --overwrite", 8),
    ],
)
def test_killed_before_a_change_on_disk(found: Plugins, place: Path, command: str, moments: int) -> None:
    work, make_old = works(found, place)[command]
    out = prepared(place, make_old)
    old = tree(out) if make_old else {}
    ready, told = os.pipe()
    process = child(lambda: work.do(Path("out"), **work.first), told=told)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    changes = int(os.read(ready, 20))
    new = tree(out)
    assert new != old and changes > moments
    # One from each stretch of the way, and those at its end, where the new takes the old one's place.
    chance = random.Random(command)
    stretch = changes / moments
    chosen = {int((number + chance.random()) * stretch) for number in range(moments - 2)}
    chosen |= {changes - 1 - chance.randrange(20 if changes > 60 else 5) for _ in range(moments - len(chosen))}
    for moment in sorted(chosen):
        out = prepared(place, make_old)
        process = child(lambda: work.do(Path("out"), **work.first), die_at=moment)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        check(work, out, old, new, f"{command} was killed before change {moment} of {changes}")


@pytest.mark.parametrize("command", ["run --overwrite", "bench"])
def test_killed_after_a_random_time(found: Plugins, place: Path, command: str) -> None:
    """Killed again and again on its way."""
    work, make_old = works(found, place, slow=0.01)[command]
    out = prepared(place, make_old)
    old, begun = tree(out) if make_old else {}, time.monotonic()
    work.do(Path("out"), **work.first)
    new, needed = tree(out), time.monotonic() - begun
    out = prepared(place, make_old)
    chance, kills, options = random.Random(command), 0, work.first
    for _ in range(4):
        process = child(lambda options=options: work.do(Path("out"), **options))  # type: ignore[misc]
        time.sleep(chance.uniform(0.1, 0.6) * needed)
        os.kill(process, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        if any(name.startswith(".next/") or name.startswith("checkpoint/run.json") for name in tree(out)) or not old:
            options = work.again
    assert kills > 0
    check(work, out, old, new, f"{command} was killed {kills} times")
