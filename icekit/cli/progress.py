"""Progress of a bench on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from icekit.batch import Progress as BatchStep
    from icekit.bench import Progress as BenchStep


class BenchProgress:
    """How far a bench is: a bar on a terminal, a line for every image of every combination elsewhere."""

    def __init__(self, warnings: Sequence[str] = ()) -> None:
        self._bar: tqdm[None] | None = None
        self._warnings = warnings

    def __enter__(self) -> BenchProgress:
        for warning in self._warnings:
            tqdm.write(f"warning: {warning}", file=sys.stderr)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: BenchStep) -> None:
        """One more is measured."""
        what = f"{progress.image}: {progress.combination}"
        if progress.error:
            tqdm.write(f"{what}: {progress.error}", file=sys.stderr)
        if not sys.stderr.isatty():
            tqdm.write(f"{progress.done}/{progress.total} {what}", file=sys.stderr)
            return
        if self._bar is None:
            self._bar = tqdm(desc="bench", total=progress.total, file=sys.stderr, leave=False, dynamic_ncols=True)
        self._bar.set_postfix_str(what, False)
        self._bar.update(progress.done - self._bar.n)


class BatchProgress:
    """How far a batch is: a bar on a terminal, a line for every picture elsewhere."""

    def __init__(self, warnings: Sequence[str] = ()) -> None:
        self._bar: tqdm[None] | None = None
        self._warnings = warnings

    def __enter__(self) -> BatchProgress:
        for warning in self._warnings:
            tqdm.write(f"warning: {warning}", file=sys.stderr)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: BatchStep) -> None:
        """It has begun, or one more picture has ended."""
        if progress.error is not None:
            tqdm.write(f"{progress.name} failed: {progress.error}", file=sys.stderr)
        ended = progress.done + progress.failed
        facts = [f"{progress.done} done", f"{progress.failed} failed", f"{progress.left} left"]
        if progress.per_minute is not None and progress.left_s is not None:
            facts += [f"{progress.per_minute:.1f} pictures a minute", f"{duration(progress.left_s)} to go"]
        if not sys.stderr.isatty():
            before = f" ({progress.before} before)" if progress.before and progress.name is None else ""
            whose = "" if progress.name is None else f"{progress.name}: "
            tqdm.write(f"{ended}/{progress.pictures} {whose}{', '.join(facts)}{before}", file=sys.stderr)
            return
        if self._bar is None:
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                desc="batch",
                total=progress.pictures,
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
                bar_format=form,
            )
        self._bar.set_postfix_str(", ".join(facts), False)
        self._bar.update(ended - self._bar.n)


def duration(seconds: float) -> str:
    """Seconds for people: ``40 s``, ``6 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
