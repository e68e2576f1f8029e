"""What exporters wrote into a folder, and how new files of theirs come into it.

A record in the folder, ``EXPORTS``, says which file is of which exporter and which run: that alone is replaced and
deleted. Files are made in a subfolder and moved to their place one by one, each as a whole. They are in the record
before they are moved, so that whoever comes after a killed process knows them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from icekit.protocols import InputError
from icekit.run.atomic import write_json_atomically, writing
from icekit.run.ownership import EXPORTS, NEXT, check_way, delete, delete_files, link_to, refuse_links
from icekit.run.reading import DamagedError, Files
from icekit.run.records import ExportRecord, ExportsRecord
from icekit.wording import named

STAGING = f".{EXPORTS}.part"
"""Subfolder in which files are made: what a killed process leaves of it is known as half-written, see ``atomic``."""


class Exports:
    """The files in a folder that exporters wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = Files(folder, f"the record of exports in {folder}", lambda: "delete it, and export anew")

    def entries(self) -> list[ExportRecord]:
        """What each exporter wrote of each run. Raises DamagedError."""
        record = self._files.record(EXPORTS, ExportsRecord)
        return [] if record is None else record.exports

    def names(self) -> set[str]:
        """All files that are in the record, relative to the folder, and its own; none where it cannot be read."""
        if link_to(self.folder, EXPORTS) is not None or not (self.folder / EXPORTS).is_file():
            return set()
        with contextlib.suppress(DamagedError):
            return {EXPORTS} | {name for one in self.entries() for name in one.files}
        return {EXPORTS}

    def check(self, entry: ExportRecord, replaceable: Collection[str] = ()) -> None:
        """Whether an exporter's files can come into the folder.

        replaceable: files that it may replace beside what is in the record as its own of this run.

        Raises:
            InputError: a file that is not its own is in the way, or a symbolic link is.
        """
        for other in self.entries():
            taken = sorted({*other.files} & {*entry.files}) if not other.is_of(entry) else []
            for name in taken:
                if os.path.lexists(self.folder / name):
                    of = f" of the run {other.run}" if other.run else ""
                    raise InputError(
                        f"{self.folder / name} is in the way: exporter {other.exporter!r} wrote it{of}; move it away, "
                        f"or choose another {named('out')}"
                    )
        check_way(self.folder, {*self._earlier(entry), *replaceable}, entry.files)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty subfolder to make the files in; it goes at the end of the block."""
        place = self.folder / STAGING
        refuse_links(self.folder, STAGING)
        try:
            with writing(place):
                if os.path.lexists(place):  # a killed process left it
                    delete(place)
                place.mkdir()
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def take(self, entry: ExportRecord, made: Path, replaceable: Collection[str] = ()) -> None:
        """Move an exporter's files to their place, and delete those that it wrote of this run before and not now.

        made: the folder that they are in.

        Raises:
            InputError: see ``check``; nothing was changed then.
            CannotWrite: the system refuses.
        """
        self.check(entry, replaceable)
        others = [one for one in self.entries() if not one.is_of(entry)]
        earlier = self._earlier(entry)
        self._write([*others, entry.model_copy(update={"files": sorted({*earlier, *entry.files})})])
        for name in entry.files:
            with writing(self.folder / name):
                with (made / name).open("rb") as file:
                    os.fsync(file.fileno())
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(made / name, self.folder / name)
        delete_files(self.folder, earlier - {*entry.files} - {name for one in others for name in one.files})
        self._write([*others, entry])

    def _earlier(self, entry: ExportRecord) -> set[str]:
        return {name for one in self.entries() if one.is_of(entry) for name in one.files}

    def _write(self, entries: list[ExportRecord]) -> None:
        refuse_links(self.folder, EXPORTS)
        record = ExportsRecord(exports=entries)
        write_json_atomically(self.folder / EXPORTS, record.model_dump(mode="json", exclude_none=True), indent=1)


def is_exported(folder: Path, name: str) -> bool:
    """Whether a plan to move or delete files of a folder may name this one: an exporter wrote it, or it is gone.

    name: relative to the folder; the record is beside the file, or in a folder above it.
    """
    path = PurePosixPath(name)
    for base in (folder, folder / NEXT):
        for parent in path.parents:
            if link_to(base, str(parent)) is None:
                within = path.relative_to(parent).as_posix()
                if within in Exports(base / parent).names():
                    return True
    return not os.path.lexists(folder / name) and not os.path.lexists(folder / NEXT / name)
