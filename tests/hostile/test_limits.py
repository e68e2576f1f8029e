"""The system says no: full disks, limits, streams that lead nowhere. What was done stays, and the run goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import torch
from icekit_process import environment, in_this_process
from PIL import Image

from icekit import RunError
from icekit.foreign import is_out_of_memory
from icekit.protocols import ComponentSettings
from icekit.run.atomic import CannotWrite, readable_size, write_atomically, write_json_atomically
from icekit.run.atomic import write_tensors_atomically as write_tensors

Run = Callable[..., tuple[int, str, str]]
ONE = [*plain.OPTIONS, "--set", "samples=1", "--set", "max_concepts=1"]
SAYS_NO = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
    errno.EROFS: "read-only file system",
    errno.EMFILE: "too many open files",
    errno.EACCES: "permission denied",
    errno.EIO: "input/output error",
    errno.ENAMETOOLONG: "file name too long",
}


@pytest.fixture
def icekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    Image.new("RGB", (50, 50), "red").save(tmp_path / "photo.png")
    return in_this_process(tmp_path, monkeypatch, capsys)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def refusing(monkeypatch: pytest.MonkeyPatch, part: str, number: int) -> None:
    """The system refuses to put files in place whose path has this part, as a full disk does."""
    replace = os.replace

    def refuse(source: Any, to: Any) -> None:
        if part in str(to):
            raise OSError(number, os.strerror(number), str(source))
        replace(source, to)

    monkeypatch.setattr(os, "replace", refuse)


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".part")]


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SAYS_NO)
def test_what_could_not_be_written_where_and_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a").write_text("the old one")
    refusing(monkeypatch, "a", number)
    for write in (
        lambda: write_atomically(tmp_path / "a", b"x" * 4200),
        lambda: write_tensors(tmp_path / "a", {"row": torch.zeros(1050)}, {}),
    ):
        with pytest.raises(CannotWrite, match=SAYS_NO[number]) as error:
            write()
        assert str(tmp_path / "a") in str(error.value)
        assert ("4.2 kB needed" in str(error.value)) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        assert isinstance(error.value, RunError)
    assert (tmp_path / "a").read_text() == "the old one"
    assert not left_over(tmp_path)


def test_a_limit_of_the_real_system(tmp_path: Path) -> None:
    """Python's own errors, and safetensors' of another kind."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from icekit.run.atomic import *
from icekit.run.directory import StepLog
from icekit.run.ownership import Written
from icekit.protocols import Step
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
place = Path({str(tmp_path)!r})
written, log = Written(place, "written"), StepLog(place / "log")
for write in (
    lambda: write_atomically(place / "bytes", bytes(3000)),
    lambda: write_tensors_atomically(place / "tensors", {{"a": torch.zeros(5000)}}, {{}}),
    lambda: [written.claim("a" * 100 + str(number)) for number in range(40)],
    lambda: [log.write(Step(number, 99, "walk", {{"total": 1.0}})) for number in range(99)],
):
    try:
        write()
        print("written")
    except CannotWrite as error:
        print(error)
log.close()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = ("bytes", "tensors", "written", "log")
    assert [line.partition(":")[0] for line in lines] == [f"cannot write {tmp_path}/{name}" for name in names]
    assert all("file too large" in line for line in lines)
    assert ["3.0 kB needed" in lines[0], "20.0 kB needed" in lines[1]] == [True, True]
    assert not left_over(tmp_path)


def test_no_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 9, 9, 9, 100, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    refusing(monkeypatch, "a", errno.ENOSPC)
    with pytest.raises(CannotWrite, match="no inodes left on device"):
        write_atomically(tmp_path / "a", b"")


def test_sizes() -> None:
    sizes = (0, 999, 1000, 4_200_000, 1.5e9, 5e15)
    assert [readable_size(size) for size in sizes] == [
        "0 bytes", "999 bytes", "1.0 kB", "4.2 MB", "1.5 GB", "5000000.0 GB",
    ]  # fmt: skip


# --- Runs ------------------------------------------------------------------------------------------------------------

LATE = ["masks/0-cup.png", "learner.safetensors", "/embeddings.safetensors", "samples/0-colour-0.png", "manifest.json"]


@pytest.mark.parametrize("part", [*LATE, "checkpoint/run.json"])
def test_a_run_goes_on_when_there_is_room(icekit: Run, tmp_path: Path, part: str) -> None:
    assert icekit("run", "photo.png", "--out", "whole", *ONE)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        refusing(patch, part, errno.ENOSPC)
        status, out, err = icekit("run", "photo.png", "--out", "run", *ONE)
    last = err.splitlines()[-1]
    assert (status, out) == (1, "")
    assert last.startswith(f"icekit: cannot write run/{part.removeprefix('/')}".removesuffix("learner.safetensors"))
    assert "no space left on device" in last
    assert "Traceback" not in err
    assert not left_over(tmp_path)
    typed = last.partition("`")[2].partition("`")[0]
    assert typed.endswith("--resume")
    if part in LATE:
        assert typed == "icekit run photo.png --out run --resume"
    assert icekit(*typed.split()[1:])[0] == 0
    for name in ("embeddings.safetensors", "samples/0-object-0.png", "log.jsonl", "masks/0-cup.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_old_run_stays_when_the_new_one_has_no_room(icekit: Run, tmp_path: Path) -> None:
    assert icekit("run", "photo.png", "--out", "run", *ONE)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        refusing(patch, "/embeddings.safetensors", errno.ENOSPC)
        assert icekit("run", "photo.png", "--out", "run", *ONE, "--seed", "1", "--overwrite")[0] == 1
    assert all(path.read_bytes() == data for path, data in before.items())
    status, out, _ = icekit("run", "photo.png", "--out", "run", "--resume", "--json")
    assert (status, json.loads(out)["seed"]) == (0, 1)


@pytest.mark.parametrize("command", ["compose", "report", "bench", "render"])
def test_other_commands(icekit: Run, tmp_path: Path, command: str) -> None:
    from icekit_tabletop import plugin

    found = plain.beside_builtins(plain=plain, tabletop=plugin)
    assert icekit("run", "photo.png", "--out", "run", *ONE)[0] == 0
    (tmp_path / "data").mkdir()
    Image.new("RGB", (50, 50), "red").save(tmp_path / "data" / "one.png")
    bench = ["bench", "folder", "--path", "data", "--metric", "looked", "--out", "new", "--set", "bench.images=1"]
    typed, part = {
        "compose": (["compose", "{a}", "a=run", "--n", "1", "--out", "new"], "new/.next/prompt.json"),
        "report": (["report", "run"], "run/report.html"),
        "bench": ([*bench, *plain.OPTIONS], "embeddings.safetensors"),
        "render": (["tabletop", "render", "--out", "new"], "new/image.png"),
    }[command]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icekit.plugins.installed", lambda: found)
        refusing(patch, part, errno.ENOSPC)
        status, out, err = icekit(*typed)
    last = err.splitlines()[-1]
    assert (status, out, "Traceback" in err) == (1, "", False)
    assert "cannot write" in last
    assert part.rpartition("/")[2] in last
    assert not left_over(tmp_path)
    if command == "bench":
        assert "--resume` goes on" in last
        assert not list((tmp_path / "new").glob("values/plain-plain/*"))  # a full disk is no result
        assert icekit(*typed, "--resume")[0] == 0


@pytest.mark.parametrize(("number", "status"), [(errno.EROFS, 2), (errno.EACCES, 2), (errno.ENOSPC, 1)])
def test_a_folder_that_cannot_be_made(icekit: Run, monkeypatch: pytest.MonkeyPatch, number: int, status: int) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    for typed in (["run", "photo.png", "--out", "new", *ONE], ["bench", "folder", "--path", ".", "--out", "new"]):
        found, _, err = icekit(*typed)
        assert (found, SAYS_NO[number] in err, "new" in err, err.count("\n")) == (status, True, True, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(icekit: Run, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    status, _, err = icekit("run", "photo.png", "--out", "locked/run", *ONE)
    assert (status, "permission denied" in err) == (2, True)


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (RunError("the word 'out of memory' has no place"), False),
        (OSError(errno.ENOENT, "No such file"), False),
    ],
)
def test_what_is_no_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize("stage", ["load", "localise", "learn", "generate"])
def test_no_memory_names_the_stage_and_the_way_out(icekit: Run, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a lot to say")

    owner, method = {
        "load": (plain.PlainBackbone, "__init__"),
        "localise": (plain.PlainSegmentor, "segment"),
        "learn": (plain.PlainLearner, "learn"),
        "generate": (plain.PlainBackbone, "generate"),
    }[stage]
    model: type[ComponentSettings] = plain.PlainBackbone.Settings
    field = model.model_fields["images_at_once"]
    monkeypatch.setattr(field, "json_schema_extra", {"least_memory": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, fail)
        status, out, err = icekit("run", "photo.png", "--out", "run", *ONE, "--set", "backbone.images_at_once=4")
    last = err.splitlines()[-1]
    assert (status, out, "Traceback" in err) == (1, "", False)
    assert f"out of memory in stage {stage} (OutOfMemoryError: CUDA out of memory)" in last
    assert "--set backbone.images_at_once=1 (now 4)" in last
    assert "--resume` goes on" in last
    assert icekit("run", "photo.png", "--out", "run", *ONE, "--set", "backbone.images_at_once=4", "--resume")[0] == 0


# --- Streams ---------------------------------------------------------------------------------------------------------


def process(arguments: list[str], cwd: Path, **streams: Any) -> subprocess.CompletedProcess[str]:
    """``icekit`` without any plugins of tests: it needs no torch."""
    command = [sys.executable, "-m", "icekit", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), text=True, timeout=100, **streams)


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = process(["--version"], tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "icekit: the results cannot be written to standard output: no space left on device\n"


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    out, into = os.pipe()
    os.close(out)
    done = process(["plugins", "list"], tmp_path, stdout=into, stderr=subprocess.PIPE)
    os.close(into)
    assert (done.returncode, done.stderr) == (0, "")


def test_messages_that_cannot_be_written(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = process(["report", "nowhere"], tmp_path, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_run_goes_on_without_anybody_to_tell(icekit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        status, out, _ = icekit("run", "photo.png", "--out", "run", *ONE)
        monkeypatch.undo()
    assert status == 0
    assert "<cup-0>" in out


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """A file that is opened later must not get their numbers: what is printed would end up in it."""
    code = """
import os, sys
from icekit.cli.streams import guarded_streams
with guarded_streams():
    file = open("file", "w")
    print("a result")
    print("a message", file=sys.stderr)
    assert file.fileno() > 2
"""
    for number in (0, 1, 2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment(),
            preexec_fn=lambda: os.close(number),  # noqa: B023
        )
        assert (done.returncode, (tmp_path / "file").read_text()) == (0, "")


# --- File handles ----------------------------------------------------------------------------------------------------


def test_no_file_handles(icekit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is not called damaged because the process has too many files open."""
    assert icekit("run", "photo.png", "--out", "run", *ONE)[0] == 0

    def refuse(*arguments: Any) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "run/manifest.json")

    monkeypatch.setattr("icekit.run.reading.read_bytes", refuse)
    status, _, err = icekit("report", "run")
    assert (status, err.count("\n")) == (1, 1)
    assert "run/manifest.json: too many open files (`ulimit -n` shows the limit)" in err
    assert "damaged" not in err


def test_json_of_any_name(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "a", {"source": "caf\udce9.png", "word": "é"})
    assert json.loads((tmp_path / "a").read_bytes().decode("utf-8")) == {"source": "caf\udce9.png", "word": "é"}
