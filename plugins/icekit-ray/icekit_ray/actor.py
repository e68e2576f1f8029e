"""What runs on the machines of the cluster: a worker, and the reader of a dead worker's log."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from icekit.protocols import InputError, RunError

MOST_LINES, MOST_CHARACTERS = 5, 400
"""Of a log's end that a message shows."""
MOST_BYTES = 64 * 1024
"""Of a log's end that is looked at."""


@dataclass(frozen=True)
class Place:
    """Where a worker is: its machine's name, Ray's number of it, the process, and the log there; None: it has none."""

    host: str
    node: str
    process: int
    log: str | None


class Worker:
    """An actor: it is set up once, keeps the models, and does one job after another."""

    def __init__(self) -> None:
        self._do: Callable[[Any], Any] | None = None

    def begin(self, folder: str) -> Place:
        """Work in the folder of the process that started it, where this machine has it; say where this is."""
        os.dup2(2, 1)  # one log, in the order of things
        with contextlib.suppress(OSError):
            os.chdir(folder)
        log = None
        with contextlib.suppress(OSError):  # not on every system
            log = os.readlink(f"/proc/{os.getpid()}/fd/2")
        return Place(platform.node(), ray.get_runtime_context().get_node_id(), os.getpid(), log)

    def set_up(self, set_up: Callable[[], Callable[[Any], Any]]) -> InputError | RunError | None:
        """Load what jobs need; what that raised, for Ray would make a traceback of it."""
        try:
            self._do = set_up()
        except (InputError, RunError) as error:
            return error
        return None

    def do(self, job: Any) -> Any:
        """Do a job."""
        assert self._do is not None, "a worker is set up before it has a job"
        return self._do(job)


def last_words(log: str) -> str:
    """The end of a log, in one line."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith((":job_id:", ":actor_name:", ":task_name:"))]
    return " / ".join(said[-MOST_LINES:])[-MOST_CHARACTERS:]
