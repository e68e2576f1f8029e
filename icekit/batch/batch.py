"""The order of things in a batch: pictures are found and named, done by an executor's workers, and shown on a page.

What is done is on disk at once, picture by picture. A batch that is started again, after whatever ended it, passes over
the pictures that are done and goes on with those that are half done.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icekit import plugins
from icekit.batch.directory import BatchDirectory
from icekit.batch.index import render_index
from icekit.batch.pictures import find_pictures, name_pictures
from icekit.batch.progress import Progress
from icekit.batch.record import BatchRecord, DoneRecord, FailureRecord, PictureRecord, Summary
from icekit.batch.work import PictureJob, PictureResult, SetUp, settings_hash
from icekit.paths import user_path
from icekit.plugins import Plugins
from icekit.protocols import Executor, ExecutorSettings, InputError, JobResult, RunError, Work
from icekit.run.atomic import CannotWrite
from icekit.run.extraction import Extraction
from icekit.run.machine import memory_needed
from icekit.run.models import resolve_device
from icekit.run.origins import origins_of
from icekit.run.ownership import refuse_if_busy
from icekit.run.workers import IMPORTS, Surroundings, Trouble, versions
from icekit.settings import Settings, flatten
from icekit.wording import named, option

PAGE_EVERY_S = 120.0
"""Seconds between two pages of a batch that is under way."""
EXECUTOR = "local"


@dataclass(frozen=True)
class BatchResult:
    """What came of a batch: its folder, what it keeps of each picture that is done, and those that failed."""

    path: Path
    record: BatchRecord
    done: tuple[DoneRecord, ...]
    failures: tuple[FailureRecord, ...]

    def run_dir(self, name: str) -> Path:
        """Where a picture's run is."""
        return self.path / "runs" / name

    def extractions(self) -> Iterator[Extraction]:
        """The runs of this call's pictures, read one after another."""
        return (Extraction.open(self.run_dir(one.name)) for one in self.done)


def extract_batch(
    pictures: str | Path | Iterable[str | Path],
    out: str | Path,
    settings: Settings | None = None,
    *,
    executor: str = EXECUTOR,
    executor_settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    command: str = "",
    traceback: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BatchResult:
    """Extract the concepts of many pictures, a run directory each; models are loaded once a worker.

    A picture that cannot be read, or whose run fails, is among the ``failures`` and stops no other. Pictures of this
    folder that are done already, with these settings, are passed over; half-done ones go on. The tokens of a picture
    are those of ``extract`` with the same settings and the same number of threads, whichever worker makes them.

    Workers are processes: a script calls this below ``if __name__ == "__main__":``. They load the plugins that
    ``plugins.installed`` has here.

    Args:
        pictures: files, folders, patterns (``"photos/*.jpg"``) and lists (``.txt``, a path a line).
        out: the folder of the batch: runs in ``runs/``, a page of all of them, ``index.html``, ``batch.json``,
            ``failures.jsonl``.
        settings: of all runs; the defaults if None.
        executor: the registered name of what does the work.
        executor_settings: its own, as ``{"workers": 2}``.
        overwrite: replace a batch that was made with other settings: each run when its new one is complete.
        command: what was typed, for the record.
        traceback: whether workers print where an error came from.
        on_progress: called at the beginning and after every picture.

    Raises:
        InputError: something that was given is wrong, or no worker could start.
        RunError: the executor failed, or a disk is full; what is done is kept.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(out)):
        raise InputError(
            f"{named('out')} {out}: a batch is written into a folder that all workers see, and this is a URL: mount "
            "the storage, or copy the folder when the batch is done"
        )
    directory = BatchDirectory(user_path(out, "out"))
    refuse_if_busy(directory.path)
    directory.check_usable(overwrite=overwrite)
    sources = find_pictures([pictures] if isinstance(pictures, str | Path) else pictures, directory.path)
    found = plugins.installed()
    work = _Batch(found, directory, settings or Settings(), executor, executor_settings or {}, traceback, on_progress)
    with directory.writing():
        directory.check_usable(overwrite=overwrite)  # another process may have been here
        directory.clear_leftovers()
        work.begin(sources, command, overwrite=overwrite)
        return work.to_the_end()


class _Batch:
    """One batch on its way: settings first, then the pictures."""

    def __init__(
        self,
        found: Plugins,
        directory: BatchDirectory,
        settings: Settings,
        executor: str,
        executor_settings: Mapping[str, Any],
        traceback: bool,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.plugins, self.directory, self.executor_name, self.traceback = found, directory, executor, traceback
        self.on_progress = on_progress
        values = found.component_settings("executor", executor, executor_settings)
        assert isinstance(values, ExecutorSettings), "checked at registration"
        self.threads = values.threads
        one = ("executor", executor)
        with found.naming("load", [one], by=one):
            self.executor: Executor = found.component("executor", executor)(values)
        self.settings = found.resolve(settings)
        self.stored = found.stored(self.settings).model_dump(mode="json")
        self.free = found.changes_no_result(self.settings)
        self.hash = settings_hash(self.stored, self.free)
        self.names: dict[Path, str] = {}
        self.done: dict[str, DoneRecord] = {}
        self.failures: list[FailureRecord] = []
        self.before = 0
        self.jobs: list[PictureJob] = []
        self.begun: float | None = None
        self.ended = 0

    # --- Beginning ---------------------------------------------------------------------------------------------------

    def begin(self, sources: list[Path], command: str, *, overwrite: bool) -> None:
        """Take the directory for these pictures and settings, or go on with the batch that is there.

        Raises:
            InputError: it has other settings.
        """
        old = self.directory.record(overwrite=overwrite)
        if old is not None and not overwrite:
            self._check_same(old)
        before = [] if old is None else old.pictures
        self.names = name_pictures(sources, {Path(one.source): one.name for one in before})
        listed = {one.name: one for one in before} if not overwrite else {}
        listed |= {name: PictureRecord(name=name, source=str(source)) for source, name in self.names.items()}
        leaving = set() if old is None else {*old.leaving, *(one.name for one in before)} - listed.keys()
        self.record = BatchRecord(
            icekit_version=plugins.own_version(),
            command=command,
            settings=self.stored,
            settings_hash=self.hash,
            executor=self.executor_name,
            threads=self.threads,
            versions=versions(),
            plugins=origins_of(self.plugins, self.settings),
            pictures=list(listed.values()),
            leaving=sorted(leaving),
        )
        self.directory.save_record(self.record)
        self.done = {name: one for name, one in self.directory.load_done().items() if name in listed}
        self.directory.save_done(self.done)
        self.directory.begin_failures()
        self.jobs = [
            PictureJob(name, str(source)) for source, name in self.names.items() if not self._is_done(name, source)
        ]
        self.before = len(self.names) - len(self.jobs)

    def _check_same(self, old: BatchRecord) -> None:
        now, then = flatten(self.stored), flatten(old.settings)
        now["executor.threads"], then["executor.threads"] = self.threads, old.threads
        changes = [
            f"{key} was {then.get(key)}, now {now.get(key)}"
            for key in {**then, **now}
            if key not in self.free and now.get(key) != then.get(key)
        ]
        if changes:
            raise InputError(
                f"the batch in {self.directory.path} cannot go on: {'; '.join(changes)} ({option('overwrite')} "
                "replaces its runs one by one)"
            )

    def _is_done(self, name: str, source: Path) -> bool:
        """Whether a picture's run is complete, and the file still what it was then."""
        one = self.done.get(name)
        if one is None or one.settings != self.hash or not self.directory.has_run(name):
            return False
        with contextlib.suppress(OSError):
            facts = os.stat(source)
            return (facts.st_size, facts.st_mtime_ns) == (one.size, one.mtime_ns)
        return False

    # --- On its way --------------------------------------------------------------------------------------------------

    def to_the_end(self) -> BatchResult:
        """Do the pictures that are left; the page and the record come last, however it ends."""
        finished = False
        self.on_progress(self._progress())
        try:
            self._work()
            self.directory.delete_runs(self.record.leaving)
            self.record = self.record.model_copy(update={"leaving": []})
            finished = True
        finally:
            with contextlib.suppress(*[CannotWrite] * (not finished)):  # what it ended for is what is told
                self._save(finished=finished)
        names = list(self.names.values())
        failed = {one.name for one in self.failures}
        done = tuple(one for name in names if name not in failed and (one := self.done.get(name)) is not None)
        return BatchResult(self.directory.path, self.record, done, tuple(self.failures))

    def _work(self) -> None:
        paged, seen = time.monotonic(), False
        try:
            whose = self.plugins.naming("batch", [("executor", self.executor_name)])
            with whose, contextlib.closing(self._results()) as results:
                for result in results:
                    seen = True
                    lost = PictureResult(stage="worker", trouble=Trouble(result.lost or ""))
                    self._keep(result.job, result.value if result.lost is None else lost)
                    self.on_progress(self._progress(result.job.name))
                    if time.monotonic() - paged > PAGE_EVERY_S:
                        self.directory.save_page(self._page())
                        paged = time.monotonic()
        except CannotWrite:
            raise
        except RunError as error:
            if seen:
                raise
            raise InputError(f"no worker could start: {error}") from error

    def _results(self) -> Generator[JobResult, None, None]:
        memory = None
        if self.jobs and (device := resolve_device(self.settings.device)).type == "cpu":
            need = memory_needed(self.plugins, self.settings, device)
            memory = None if need is None else max(need.learning, need.drawing)
        set_up = SetUp(
            out=os.path.abspath(self.directory.path),
            settings=self.stored,
            surroundings=Surroundings.here(self.record.plugins, self.threads, traceback=self.traceback),
        )
        work = Work(set_up, self.settings.device, self.threads, memory, IMPORTS)
        return self.executor.execute(work, self._claimed())

    def _claimed(self) -> Iterator[PictureJob]:
        """The jobs, as they are asked for: each picture's place is icekit's before anything is written there."""
        for job in self.jobs:
            try:
                self.directory.claim(job.name)
            except InputError as error:
                self._keep(job, PictureResult(stage="settings", trouble=Trouble.of(error)))
                self.on_progress(self._progress(job.name))
            else:
                yield job

    def _keep(self, job: PictureJob, result: PictureResult) -> None:
        """Keep what came of a picture."""
        if result.trouble is not None and result.trouble.is_of_the_machine:
            result.trouble.raise_again()
        self.ended += 1
        if self.begun is None:  # workers had to be set up before
            self.begun = time.monotonic() - (result.done.seconds if result.done else 0)
        if result.done is not None:
            self.done[job.name] = result.done
            self.directory.add_done(result.done)
            return
        why = "" if result.trouble is None else result.trouble.message
        failure = FailureRecord(picture=job.file, name=job.name, stage=result.stage, error=why)
        self.failures.append(failure)
        self.directory.add_failure(failure)

    # --- What is told ------------------------------------------------------------------------------------------------

    def _progress(self, name: str | None = None) -> Progress:
        seconds = 0.0 if self.begun is None else time.monotonic() - self.begun
        failed = len(self.failures)
        rate = self.ended / seconds if self.ended > failed and seconds > 0 else None
        error = self.failures[-1].error if failed and self.failures[-1].name == name else None
        return Progress(
            pictures=len(self.names),
            done=self.before + self.ended - failed,
            before=self.before,
            failed=failed,
            per_minute=None if rate is None else rate * 60,
            left_s=None if rate is None else (len(self.jobs) - self.ended) / rate,
            name=name,
            error=error,
        )

    def _save(self, *, finished: bool) -> None:
        now = self._progress()
        seconds = 0.0 if self.begun is None else round(time.monotonic() - self.begun, 3)
        summary = Summary(
            pictures=now.pictures,
            done=now.done,
            before=now.before,
            failed=now.failed,
            seconds=seconds,
            finished=finished,
        )
        self.record = self.record.model_copy(update={"summary": summary})
        self.directory.save_page(self._page())
        self.directory.save_record(self.record)

    def _page(self) -> str:
        shown = [one for one in self.done.values() if one.settings == self.hash]
        return render_index(self.directory.path.resolve().name, shown, self._progress())
