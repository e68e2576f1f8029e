"""The program ``icekit`` with the plain components: in a process of its own, as a user meets it, or in this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import plain_components as plain
import pytest

from icekit import export
from icekit.cli.program import cli, main

ROOT = Path(__file__).resolve().parents[1]


def environment(*folders: Path) -> dict[str, str]:
    """Environment variables with these folders on the module path, before whatever else is on it."""
    path = [*map(str, folders), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def start(arguments: Sequence[str | Path], cwd: Path, *folders: Path) -> subprocess.Popen[str]:
    """Start ``icekit`` in ``cwd``."""
    return subprocess.Popen(
        [sys.executable, "-m", "icekit", *map(str, arguments)],
        cwd=cwd,
        env=environment(*folders),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Started from a background job it would ignore Ctrl-C, as its parent does.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def icekit(arguments: Sequence[str | Path], cwd: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run ``icekit`` in ``cwd`` to its end."""
    process = start(arguments, cwd, *folders)
    out, err = process.communicate(timeout=280)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def write_report(run_dir: Path) -> Path:
    """What ``icekit report`` writes into a run directory."""
    [path] = export(run_dir, "report")
    return path


def plain_plugin(folder: Path) -> Path:
    """The plain components as an installed distribution."""
    source = f"import sys; sys.path.append({str(ROOT / 'tests')!r})\nfrom plain_components import *\n"
    return plain.write_distribution(folder, "plain_plugin", source, name="plain-plugin")


Call = Callable[..., tuple[int, str, str]]
"""``icekit``: arguments -> exit status, what it printed on stdout and on stderr."""


def in_this_process(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``icekit`` in ``place`` with the plain components, without a new process, which would import torch again."""
    found = plain.beside_builtins()
    monkeypatch.setattr("icekit.plugins.installed", lambda: found)
    return with_what_is_installed(place, monkeypatch, capsys)


def with_what_is_installed(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The same with what is installed and with the plugins that arguments and environment choose."""
    monkeypatch.setattr("icekit.cli.program.quieten", lambda: None)
    # What plugins have added so far are other tests' plugins.
    own = {name: command for name, command in cli.commands.items() if name not in cli.of_plugins}
    monkeypatch.setattr(cli, "commands", own)
    monkeypatch.setattr(cli, "_origins", {})
    monkeypatch.chdir(place)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        typed = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["icekit", *typed])
        with pytest.raises(SystemExit) as leaving:
            main(typed)
        captured = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, captured.out, captured.err

    return call
