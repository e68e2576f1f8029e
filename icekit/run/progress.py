"""How far a run is, or the making of pictures: bars on a terminal, a line now and then elsewhere, HTML in notebooks."""

from __future__ import annotations

import html
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from icekit.hookspecs import hookimpl
from icekit.waiting import Ticker

if TYPE_CHECKING:
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
IMAGES = "generating images"
EVERY_S = 0.25
"""Seconds between two updates in a notebook: each is sent to a browser."""


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _no_advice_on_widgets() -> None:
    """Import what warns in a notebook that ipywidgets are not installed: libraries do, and nothing here needs them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401


def observers_of(progress: bool | None) -> list[object]:
    """The observers that show how far a run is. progress: None: in notebooks alone."""
    if in_notebook():
        _no_advice_on_widgets()
    if progress is False or (progress is None and not in_notebook()):
        return []
    return [NotebookProgress() if in_notebook() else Progress()]


def told_of_images(
    progress: bool | None, on_image: Callable[[int, int], None] | None
) -> Callable[[int, int], None] | None:
    """What is to be called after every image: ``on_image``, and what shows how far it is, as above."""
    if in_notebook():
        _no_advice_on_widgets()
    if progress is False or (progress is None and not in_notebook()):
        return on_image
    line, images = NotebookLine(), ImageProgress()

    def tell(done: int, total: int) -> None:
        if in_notebook():
            line.show(IMAGES if done < total else "images", done, total, last=done == total)
        else:
            images.show(done, total)
        if on_image is not None:
            on_image(done, total)

    return tell


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
        self._ticker = Ticker(IMAGES)

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def show(self, done: int, total: int) -> None:
        """One more is done."""
        if not sys.stderr.isatty():
            self._ticker.tick(done, total)
            return
        if self._bar is None:
            self._bar = tqdm(desc=IMAGES, total=total, file=sys.stderr, leave=False, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# --- Notebooks -------------------------------------------------------------------------------------------------------


class NotebookLine:
    """One line of a cell's output with a bar, which is replaced by the next; plain HTML, which needs no widgets."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._title, self._begun, self._next = "", 0.0, 0.0

    def show(self, title: str, done: int = 0, total: int | None = None, note: str = "", last: bool = False) -> None:
        """Show how far something is; at most every ``EVERY_S``, but for what is new or the last word."""
        from IPython.display import HTML, display

        now = time.monotonic()
        if title != self._title and not last:
            self._title, self._begun, self._next = title, now, now
        if now < self._next and not last:
            return
        self._next = now + EVERY_S
        plain = self._said(title, done, total, note, now - self._begun, last)
        shown = _Both(plain, HTML(_line(plain, None if last else (done, total))).data)
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)

    def _said(self, title: str, done: int, total: int | None, note: str, elapsed: float, last: bool) -> str:
        words = [title] + ([f"{done} of {total}"] if total else [])
        if total and 0 < done < total and not last:
            words.append(f"{_clock(elapsed / done * (total - done))} left")
        return " · ".join([*words, *([note] if note else [])])


class NotebookProgress:
    """An observer that shows how far a run is in the output of a notebook's cell."""

    def __init__(self) -> None:
        self._line = NotebookLine()
        self._begun = time.monotonic()
        self._title, self._total = "", 0
        self._found: dict[int, str] = {}

    @hookimpl
    def stage_started(self, name: str, total: int | None) -> None:
        """Begin anew."""
        self._title = TITLES.get(name, name)
        self._total = (total or 0) if name == "generate" else 0
        self._line.show(self._title, 0, self._total or None, self._note())

    @hookimpl
    def region_found(self, region: Region) -> None:
        """Name the concepts found so far."""
        self._found[region.index] = region.word
        self._line.show(self._title, note=self._note())

    @hookimpl
    def step_done(self, step: Step) -> None:
        """Move the bar to the step."""
        self._line.show(self._title, step.step, step.total, step.phase)

    @hookimpl
    def image_generated(self, done: int, total: int) -> None:
        """Move the bar."""
        self._line.show(self._title, done, total)

    @hookimpl
    def run_finished(self, extraction: Extraction) -> None:
        """The last word."""
        taken = _clock(time.monotonic() - self._begun)
        count = len(extraction.concepts)
        self._line.show(f"{extraction.run_dir}: {count} concept{'s' * (count != 1)} in {taken}", last=True)

    @hookimpl
    def run_failed(self, error: BaseException) -> None:
        """The last word; the error itself is shown below the cell."""
        self._line.show(f"ended while {self._title}", last=True)

    def _note(self) -> str:
        return ", ".join(self._found.values())


class _Both:
    """Something to display: as HTML, and as text where none is shown."""

    def __init__(self, plain: str, markup: str) -> None:
        self._plain, self._markup = plain, markup

    def __repr__(self) -> str:
        return self._plain

    def _repr_html_(self) -> str:
        return self._markup


def _line(plain: str, bar: tuple[int, int | None] | None) -> str:
    text = f'<span style="font:13px system-ui,sans-serif">{html.escape(plain)}</span>'
    if bar is None:
        return text
    done, total = bar
    place = f' value="{done}" max="{total}"' if total else ""
    return f'<progress style="width:12em;vertical-align:middle;margin-right:.7em"{place}></progress>{text}'


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d} min" if whole >= 60 else f"{whole} s"
