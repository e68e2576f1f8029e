"""A batch directory, read and written.

    batch.json          what is done with which pictures; written first
    runs/<name>/        run directories, as of ``icekit run``
    pictures.jsonl      a line a picture whose run is complete: what the page shows of it, and what it depends on
    failures.jsonl      a line a picture that failed in the last call
    thumbnails/<name>.jpg
    index.html          a page of all runs
    written.jsonl       the names of all that icekit wrote here, and so all that it ever deletes or replaces

One process writes here, whoever does the work; workers write run directories and thumbnails, each its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from icekit.batch.record import BatchRecord, DoneRecord, FailureRecord
from icekit.protocols import InputError
from icekit.run.atomic import write_json_atomically, write_text_atomically, writing
from icekit.run.directory import RunDirectory, check_place
from icekit.run.directory import is_own_name as is_own_name_in_run
from icekit.run.ownership import (
    LOCK,
    Written,
    becomes,
    delete_files,
    delete_half_written,
    link_to,
    refuse_links,
    writing_into,
)
from icekit.run.reading import DamagedError, Files
from icekit.wording import option

RECORD, JOURNAL, FAILURES, PAGE = "batch.json", "pictures.jsonl", "failures.jsonl", "index.html"
_WRITTEN = "written.jsonl"
_FILES = (RECORD, JOURNAL, FAILURES, PAGE, _WRITTEN)
_THUMBNAIL = r"thumbnails/[^/]+\.jpg"
_RUN = r"runs/([^/]+)"
MAX_JOURNAL_BYTES = 2**30
"""Largest ``pictures.jsonl``: a line has some 500 bytes."""


class BatchDirectory:
    """One batch directory: what is in it, and how things get into it."""

    def __init__(self, path: str | Path) -> None:
        """Open it, or say where it is to be."""
        self.path = Path(path)
        self.files = Files(self.path, f"the batch in {self.path}", lambda: f"{option('overwrite')} makes it anew")
        self.written = Written(self.path, _WRITTEN, before=lambda: [RECORD] * (self.path / RECORD).is_file())

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes out. Raises InputError where one is writing here, or nobody can."""
        return writing_into(self.path)

    def check_usable(self, *, overwrite: bool) -> None:
        """Whether a batch may be written here; known before a model takes minutes to load.

        Raises:
            InputError: a file is in the way, the folder is somebody else's, or a link is where icekit writes.
        """
        check_place(self.path, "a batch", resume=False, overwrite=overwrite)
        if self.record(overwrite=overwrite) is not None or self.written.is_there:
            for name in (*_FILES, "runs", "thumbnails"):
                refuse_links(self.path, name)
        elif self.path.is_dir() and any(not _is_of_a_beginning(path) for path in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and no batch of icekit's: choose another folder")

    def record(self, *, overwrite: bool = False) -> BatchRecord | None:
        """What is done here; None where there is no batch.

        overwrite: it is to be replaced, and may be damaged.

        Raises:
            DamagedError: its record is damaged.
        """
        try:
            content = self.files.json(RECORD)
            if not isinstance(content, dict) or not {"icekit_version", "settings_hash"} <= content.keys():
                return None
            return self.files.check(RECORD, BatchRecord, content)
        except DamagedError:
            if overwrite and self.written.is_there:
                return None
            raise

    def save_record(self, record: BatchRecord) -> None:
        """Keep what is done here: from then on the directory is icekit's."""
        refuse_links(self.path, RECORD)
        if self.written.is_there:
            self.written.claim(RECORD)
        write_json_atomically(self.path / RECORD, record.model_dump())
        self.written.claim(RECORD)

    def clear_leftovers(self) -> None:
        """Delete what a killed process had half-written; a run that goes on sees to its own."""
        delete_half_written(self.path, {*_FILES})

    # --- Runs --------------------------------------------------------------------------------------------------------

    def run(self, name: str) -> RunDirectory:
        """A picture's run directory."""
        return RunDirectory(self.path / "runs" / name)

    def claim(self, name: str) -> None:
        """Make sure that a picture's files may be written, and put them into the record.

        Raises:
            InputError: somebody else's is in the way, or a symbolic link is.
        """
        for one in (f"runs/{name}", thumbnail_name(name)):
            refuse_links(self.path, one)
            self.written.claim(one)

    def has_run(self, name: str) -> bool:
        """Whether a picture's run is complete, as far as its manifest's being there says it."""
        file = f"runs/{name}/manifest.json"
        return link_to(self.path, file) is None and (self.path / file).is_file()

    def delete_runs(self, names: Collection[str]) -> None:
        """Delete the runs of pictures that are no more in the batch, and nothing else of what is in their folders."""
        known = self.written.names()
        for name in names:
            if f"runs/{name}" in known and link_to(self.path, f"runs/{name}") is None:
                run = self.run(name)
                run.discard_next()
                delete_files(self.path, [f"runs/{name}/{own}" for own in run.own_names() if is_own_name_in_run(own)])
                with contextlib.suppress(OSError):
                    run.path.rmdir()
            delete_files(self.path, [thumbnail_name(name)])

    # --- What came of pictures ---------------------------------------------------------------------------------------

    def load_done(self) -> dict[str, DoneRecord]:
        """The pictures whose runs are complete, by name. Raises DamagedError where the file cannot be read."""
        done: dict[str, DoneRecord] = {}
        for line in (self.files.read(JOURNAL, MAX_JOURNAL_BYTES) or b"").splitlines():
            with contextlib.suppress(ValueError, ValidationError):  # the line that a killed process was writing
                one = DoneRecord.model_validate_json(line)
                done[one.name] = one
        return done

    def save_done(self, done: Mapping[str, DoneRecord]) -> None:
        """Begin the file of complete pictures anew, a line each."""
        self.written.claim(JOURNAL)
        write_text_atomically(self.path / JOURNAL, "".join(one.model_dump_json() + "\n" for one in done.values()))

    def begin_failures(self) -> None:
        """Begin the file of failures anew: what is tried again may succeed."""
        self.written.claim(FAILURES)
        write_text_atomically(self.path / FAILURES, "")

    def add_done(self, one: DoneRecord) -> None:
        """Keep what came of a picture."""
        self._append(JOURNAL, one.model_dump())

    def add_failure(self, one: FailureRecord) -> None:
        """Keep that a picture failed, and why."""
        self._append(FAILURES, one.model_dump())

    def _append(self, name: str, value: dict[str, Any]) -> None:
        with writing(self.path / name), (self.path / name).open("ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def save_page(self, page: str) -> None:
        """Keep the page of all runs."""
        self.written.claim(PAGE)
        write_text_atomically(self.path / PAGE, page)


def thumbnail_name(name: str) -> str:
    """Where a picture's thumbnail is, relative to the batch directory."""
    return f"thumbnails/{name}.jpg"


def is_own_name(name: str) -> bool:
    """Whether icekit writes files of this name, relative to a batch directory."""
    within = re.fullmatch(rf"{_RUN}/(.*)", name)
    if within:
        return is_own_name_in_run(within[2])
    return name in _FILES or bool(re.fullmatch(_THUMBNAIL, name))


def _is_of_a_beginning(path: Path) -> bool:
    """Whether a process that was killed before it had begun left this."""
    return becomes(path) == RECORD or path.name == LOCK
