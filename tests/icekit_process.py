"""The program ``icekit`` in a process of its own, as a user meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from plain_components import write_distribution

ROOT = Path(__file__).resolve().parents[1]


def environment(*folders: Path) -> dict[str, str]:
    """Environment variables with these folders on the module path, before whatever else is on it."""
    path = [*map(str, folders), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def start(arguments: Sequence[str | Path], cwd: Path, *folders: Path) -> subprocess.Popen[str]:
    """Start ``icekit`` in ``cwd``."""
    return subprocess.Popen(
        [sys.executable, "-m", "icekit.cli", *map(str, arguments)],
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


def plain_plugin(folder: Path) -> Path:
    """The plain components as an installed distribution."""
    source = f"import sys; sys.path.append({str(ROOT / 'tests')!r})\nfrom plain_components import *\n"
    return write_distribution(folder, "plain_plugin", source, name="plain-plugin")
