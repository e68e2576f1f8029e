"""One picture in a worker: a run of it, and what the batch is told of that.

A worker loads the plugins that the process has which started it, and the models, once. Whatever happens to a picture
becomes a value: nothing is raised.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from icekit.batch.directory import thumbnail_name
from icekit.batch.record import DoneRecord, SeenRecord
from icekit.hookspecs import hookimpl
from icekit.protocols import Backbone, InputError
from icekit.run.atomic import write_atomically
from icekit.run.directory import RunDirectory
from icekit.run.extraction import Extraction
from icekit.run.images import SourceImage, load_image
from icekit.run.models import load_backbone, resolve_device
from icekit.run.orchestrator import extract
from icekit.run.workers import Surroundings, Trouble, sendable
from icekit.settings import Settings, flatten, validate

THUMBNAIL_SIDE = 256
"""Longest side, pixels."""


@dataclass(frozen=True)
class PictureJob:
    """A picture that is to be done: its name in the batch, and its file, absolute."""

    name: str
    file: str


@dataclass(frozen=True)
class PictureResult:
    """What came of a picture.

    done: what the batch keeps of it, where its run is complete. trouble: why it is not, and in which stage.
    """

    done: DoneRecord | None = None
    stage: str = ""
    trouble: Trouble | None = None


def settings_hash(settings: Mapping[str, Any], free: Collection[str]) -> str:
    """A digest of a run's complete settings, nested. free: those that change no result, by key."""
    flat = {key: value for key, value in flatten(settings).items() if key not in free}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SetUp:
    """What makes a process a worker of a batch.

    out: the batch directory, absolute. settings: of all runs, complete, as files keep them.
    """

    out: str
    settings: Mapping[str, Any]
    surroundings: Surroundings

    def __call__(self) -> Callable[[PictureJob], PictureResult]:
        """Load plugins and models.

        Raises:
            InputError: this machine lacks a plugin, has another version, or the settings are wrong.
            RunError: a model cannot be had.
        """
        with sendable():
            return _Worker(self).do


class _Stage:
    """An observer that notes which stage a run is in."""

    def __init__(self) -> None:
        self.name = "read"

    @hookimpl
    def stage_started(self, name: str) -> None:
        """A stage begins."""
        self.name = name


class _Worker:
    """The plugins and models of a worker, for the rest of its life."""

    def __init__(self, set_up: SetUp) -> None:
        self.out, self.surroundings = Path(set_up.out), set_up.surroundings
        self.plugins, self.kept = self.surroundings.enter()
        self.surroundings.check(self.plugins)
        self.settings = self.plugins.resolve(validate(Settings, set_up.settings))
        self.free = self.plugins.changes_no_result(self.settings)
        self.hash = settings_hash(set_up.settings, self.free)
        self.backbone: Backbone = load_backbone(self.plugins, self.settings, resolve_device(self.settings.device))

    def do(self, job: PictureJob) -> PictureResult:
        """Make the run of a picture, or go on with it; a complete one is kept."""
        stage = _Stage()
        try:
            return PictureResult(self._done(job, stage))
        except Exception as error:
            return PictureResult(stage=stage.name, trouble=self.surroundings.note(error, self.backbone.device))

    def _done(self, job: PictureJob, stage: _Stage) -> DoneRecord:
        begun = time.monotonic()
        file = Path(job.file)
        source = load_image(file)
        facts = file.stat()
        stage.name = "settings"
        run = RunDirectory(self.out / "runs" / job.name)
        resume = self._goes_on(run, source)
        was_complete = resume is True and run.is_complete and not run.next.holds_run
        extraction = extract(
            source,
            run.path,
            self.settings,
            resume=resume is True,
            overwrite=resume is False,
            observers=[stage],
            installed=self.plugins,
            backbone=self.backbone,
        )
        stage.name = "page"
        write_atomically(self.out / thumbnail_name(job.name), thumbnail(extraction))
        return DoneRecord(
            name=job.name,
            sha256=source.sha256,
            settings=self.hash,
            size=facts.st_size,
            mtime_ns=facts.st_mtime_ns,
            seconds=0.0 if was_complete else round(time.monotonic() - begun, 3),
            report=(run.path / "report.html").is_file(),
            concepts=[
                SeenRecord(
                    label=concept.label,
                    score=concept.score,
                    words=[words[0] for words in concept.words.values() if words],
                )
                for concept in extraction.concepts
            ],
        )

    def _goes_on(self, run: RunDirectory, source: SourceImage) -> bool | None:
        """Whether the run that is there is of this picture and these settings; None where there is none.

        What is damaged, or of another picture or other settings, is replaced when the new run is complete.
        """
        for one in (run.next, run):
            if one.holds_run:
                try:
                    return self._key_of(one) == (source.sha256, self.hash)
                except InputError:
                    return False
        return False if run.is_ours else None  # a killed process may have been about to begin it

    def _key_of(self, run: RunDirectory) -> tuple[str, str] | None:
        if run.is_complete:
            extraction = Extraction.open(run.path)
            return extraction.record.image.sha256, self._hash_of(extraction.settings())
        started = run.started()
        return None if started is None else (started.sha256, self._hash_of(validate(Settings, started.settings)))

    def _hash_of(self, settings: Settings) -> str:
        """As ``resolve`` completes them: a settings file says of None otherwise."""
        complete = self.plugins.stored(self.plugins.resolve(settings))
        return settings_hash(complete.model_dump(mode="json"), self.free)


def thumbnail(extraction: Extraction) -> bytes:
    """The run's picture, small, as JPEG."""
    picture = RunDirectory(extraction.run_dir).load_image()
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()
