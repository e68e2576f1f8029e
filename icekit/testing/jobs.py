"""What workers do when an executor is checked. Quick to import: each worker does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from icekit.protocols import InputError


@dataclass(frozen=True)
class SetUp:
    """What workers of the checks do: each job squares a number, and notes in the folder who did it.

    refuse: the message with which set-up fails. ends: numbers whose worker is killed, how often each.
    """

    folder: str
    refuse: str = ""
    ends: tuple[tuple[int, int], ...] = ()
    pause: float = 0.0

    def __call__(self) -> Callable[[int], tuple[int, int]]:
        """Note that a worker was set up."""
        if self.refuse:
            raise InputError(self.refuse)
        folder, times = Path(self.folder), dict(self.ends)
        (folder / f"worker-{os.getpid()}").write_text("")

        def square(number: int) -> tuple[int, int]:
            tried = len(list(folder.glob(f"tried-{number}-*")))
            (folder / f"tried-{number}-{tried}").write_text("")
            if tried < times.get(number, 0):
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            time.sleep(self.pause)
            return number * number, os.getpid()

        return square

    @property
    def workers(self) -> set[int]:
        """The processes that were set up."""
        return {int(one.name.removeprefix("worker-")) for one in Path(self.folder).glob("worker-*")}
