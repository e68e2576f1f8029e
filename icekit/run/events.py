"""What happens in a run, told to a function: the simple form of an observer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icekit.foreign import said
from icekit.hookspecs import hookimpl
from icekit.protocols import Region, Step, StopRun
from icekit.settings import Settings

if TYPE_CHECKING:
    from icekit.run.extraction import Extraction


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    name: the observer hook that tells of it, see ``icekit.hookspecs``; what it is called with is in the other fields.

    - ``run_started``: run_dir, settings
    - ``stage_started``: stage (``load``, ``localise``, ``learn``, ``generate`` or ``export``), total where it is known
    - ``region_found``: region
    - ``step_done``: step
    - ``image_generated``: done, total
    - ``run_finished``: extraction
    - ``run_failed``: error
    """

    name: str
    run_dir: Path | None = None
    settings: Settings | None = field(default=None, repr=False)
    stage: str | None = None
    total: int | None = None
    region: Region | None = None
    step: Step | None = None
    done: int | None = None
    extraction: Extraction | None = None
    error: BaseException | None = None


class CallbackError(StopRun):
    """The function that was handed to a run failed; its own exception is the ``__cause__``."""


class Told:
    """An observer that hands everything to one function. What that raises ends the run, which can go on later."""

    def __init__(self, callback: Callable[[Event], object]) -> None:
        self._callback = callback
        name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
        self.__name__ = f"callback {name}"

    @hookimpl
    def run_started(self, run_dir: Path, settings: Settings) -> None:
        """Told on."""
        self._tell(Event("run_started", run_dir=run_dir, settings=settings))

    @hookimpl
    def stage_started(self, name: str, total: int | None) -> None:
        """Told on."""
        self._tell(Event("stage_started", stage=name, total=total))

    @hookimpl
    def region_found(self, region: Region) -> None:
        """Told on."""
        self._tell(Event("region_found", region=region))

    @hookimpl
    def step_done(self, step: Step) -> None:
        """Told on."""
        self._tell(Event("step_done", step=step))

    @hookimpl
    def image_generated(self, done: int, total: int) -> None:
        """Told on."""
        self._tell(Event("image_generated", done=done, total=total))

    @hookimpl
    def run_finished(self, extraction: Extraction) -> None:
        """Told on. What it raises now is reported: the run is complete."""
        self._callback(Event("run_finished", extraction=extraction))

    @hookimpl
    def run_failed(self, error: BaseException) -> None:
        """Told on, but for its own failure."""
        if not isinstance(error, CallbackError):
            self._callback(Event("run_failed", error=error))

    def _tell(self, event: Event) -> None:
        try:
            self._callback(event)
        except StopRun:
            raise
        except Exception as error:
            raise CallbackError(f"{self.__name__} failed in {event.name}: {said(error)}") from error
