"""The cells of a bench, measured by workers: each has the models, and measures one image of one row at a time.

What is measured is in the bench directory, which all workers see.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icekit.bench.directory import BenchDirectory
from icekit.protocols import Executor, RunError, Work
from icekit.run.machine import memory_needed
from icekit.run.models import resolve_device
from icekit.run.workers import IMPORTS, Surroundings, Trouble, sendable

if TYPE_CHECKING:
    from icekit.bench.benchmark import Bench, Question


@dataclass(frozen=True)
class Cell:
    """One image of one row."""

    row: str
    image: str


@dataclass(frozen=True)
class SetUp:
    """What makes a process a worker of a bench.

    place, home: the bench directory, and where its files will be in the end, absolute.
    """

    question: Question
    place: str
    home: str
    surroundings: Surroundings

    def __call__(self) -> Callable[[Cell], dict[str, Any] | Trouble]:
        """Load plugins, models and metrics.

        Raises:
            InputError: this machine lacks a plugin, or has another version.
            RunError: a model cannot be had.
        """
        from icekit.bench.benchmark import Bench

        with sendable():
            found, kept = self.surroundings.enter()
            self.surroundings.check(found)
            work = Bench(found, self.question, BenchDirectory(self.place, BenchDirectory(self.home).path))
            work.build_metrics()
            work.prepare()

        def measure(cell: Cell, kept: contextlib.ExitStack = kept) -> dict[str, Any] | Trouble:
            try:
                return work.measure(cell)
            except Exception as error:
                return self.surroundings.note(error, work.backbone.device)

        return measure


def measured_by(
    work: Bench, executor: Executor, threads: int, cells: Sequence[Cell]
) -> Generator[tuple[Cell, dict[str, Any]], None, None]:
    """The values of these cells, as they are there.

    Raises:
        InputError: a worker raised it; likewise RunError.
    """
    directory = work.directory
    set_up = SetUp(
        question=work.question,
        place=os.path.abspath(directory.path),
        home=os.path.abspath(directory.home),
        surroundings=Surroundings.here(work.origins(), threads),
    )
    device, memory = resolve_device(work.plain.device), None
    if device.type == "cpu" and (need := memory_needed(work.plugins, work.plain, device)) is not None:
        memory = max(need.learning, need.drawing)
    task = Work(set_up, work.plain.device, threads, memory, IMPORTS)
    with contextlib.closing(executor.execute(task, cells)) as results:
        for result in results:
            if result.lost is not None:
                raise RunError(f"{result.job.image}: {result.job.row}: {result.lost}")
            if isinstance(result.value, Trouble):
                result.value.raise_again()
            yield result.job, result.value
