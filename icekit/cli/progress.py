"""Progress on stderr: bars on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from icekit.hookspecs import hookimpl
from icekit.waiting import Ticker

if TYPE_CHECKING:
    from icekit.bench import Progress as BenchStep
    from icekit.plugins import BrokenPlugin
    from icekit.protocols import Region, Step
    from icekit.run.extraction import Extraction
    from icekit.settings import Settings

TITLES = {
    "load": "loading the models",
    "localise": "looking for concepts",
    "learn": "learning tokens",
    "generate": "generating samples",
    "export": "writing what is made of the run",
}


class Progress:
    """An observer that shows how far a run is; broken: the plugins that are, by the time when it starts."""

    def __init__(self, broken: Sequence[BrokenPlugin] = ()) -> None:
        self._bar: tqdm[None] | None = None
        self._live = sys.stderr.isatty()
        self._broken = broken
        self._ticker = Ticker("")

    @hookimpl
    def run_started(self, run_dir: Path, settings: Settings) -> None:
        """Say where the results go, and what is wrong with the installed plugins."""
        self._say(f"run directory: {run_dir}")
        for one in self._broken:
            self._say(f"warning: {one.warning}")

    @hookimpl
    def stage_started(self, name: str, total: int | None) -> None:
        """Begin a bar or a line."""
        self._close()
        title = TITLES.get(name, name)
        self._ticker = Ticker(title)
        if self._live:
            self._bar = tqdm(desc=title, total=total, file=sys.stderr, leave=False, dynamic_ncols=True)
        else:
            self._say(title)

    @hookimpl
    def region_found(self, region: Region) -> None:
        """Name the concept."""
        self._say(f"  {region.index}: {region.word}, {float(region.mask.float().mean()):.0%} of the image")
        self._advance()

    @hookimpl
    def step_done(self, step: Step) -> None:
        """Move the bar to the step."""
        if self._bar is None:
            self._ticker.tick(step.step, step.total)
        else:
            self._bar.total = step.total
            self._bar.set_postfix_str(" ".join([step.phase, *(f"{k} {v:.3g}" for k, v in step.losses.items())]), False)
            self._bar.update(step.step - self._bar.n)

    @hookimpl
    def image_generated(self, done: int, total: int) -> None:
        """Move the bar by one."""
        if self._bar is None:
            self._ticker.tick(done, total)
        self._advance()

    @hookimpl
    def run_finished(self, extraction: Extraction) -> None:
        """Close the bar."""
        self._close()

    @hookimpl
    def run_failed(self, error: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


class ImageProgress:
    """How many images are done: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._ticker = Ticker("generating images")

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int) -> None:
        """One more is done."""
        if not sys.stderr.isatty():
            self._ticker.tick(done, total)
            return
        if self._bar is None:
            self._bar = tqdm(desc="generating images", total=total, file=sys.stderr, leave=False, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)


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
