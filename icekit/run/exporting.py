"""Exporters at work: a complete run is handed to one, and what it wrote is held against what it declared."""

from __future__ import annotations

import contextlib
import os
import stat
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from icekit import plugins
from icekit.foreign import is_of_the_machine
from icekit.paths import user_path
from icekit.plugins import BreachError, Plugins
from icekit.protocols import Exporter, InputError, RunError
from icekit.protocols.errors import printable
from icekit.protocols.values import MAX_LABEL_BYTES
from icekit.run.atomic import CannotWrite
from icekit.run.directory import EXPORTED_BEFORE, RunDirectory, is_own_name
from icekit.run.exports import STAGING, Exports
from icekit.run.extraction import Extraction
from icekit.run.hub import linked_files_of
from icekit.run.ownership import EXPORTS_LOCK, NEXT, check_way, is_inside, refuse_if_busy, writing_into
from icekit.run.reading import listed
from icekit.run.records import ExportRecord
from icekit.settings import merge
from icekit.wording import named, option

MAX_FILES = 100_000
MAX_NAME_BYTES = 255 - MAX_LABEL_BYTES
"""Of each part of a file's name, so that there is room for what a half-written file has put around it."""


class ExportError(RunError):
    """A run is complete, and an exporter of its settings failed.

    extraction: the run.
    """

    def __init__(self, message: object, extraction: Extraction) -> None:
        super().__init__(message)
        self.extraction = extraction


def export(
    run: str | Path | Extraction,
    exporter: str,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    installed: Plugins | None = None,
) -> list[Path]:
    """Write a complete run with an exporter; what it wrote of this run into this folder before is replaced.

    Args:
        run: its directory, or the run itself.
        exporter: its registered name.
        out: the folder to write into, which may hold other files; the run directory if None.
        settings: of the exporter, put over those that the run's settings have for it.
        installed: the plugins to use; those of this Python environment if None.

    Returns:
        The files, in the order in which the exporter declares them.

    Raises:
        InputError: no such run or exporter, a wrong setting, a file in the way, or a run that cannot be written so.
        ComponentError: the exporter failed, or wrote other files than it had declared.
    """
    found = installed or plugins.installed()
    found.component("exporter", exporter)
    extraction = run if isinstance(run, Extraction) else Extraction.open(run)
    if out is None and linked_files_of(extraction.run_dir):
        raise InputError(f"{run} is in the hub's cache, where nothing is written: give {option('out', 'DIR')}")
    folder = extraction.run_dir if out is None else user_path(out, "out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: {named('out')} takes a folder")
    if folder.exists() and folder.samefile(extraction.run_dir):
        folder = extraction.run_dir
    values = merge(_settings_of(extraction).get(exporter, {}), settings or {})
    found.component_settings("exporter", exporter, values)
    refuse_if_busy(folder, EXPORTS_LOCK)
    with writing_into(folder, EXPORTS_LOCK):
        return write_export(found, extraction, exporter, values, folder)


def _settings_of(extraction: Extraction) -> Mapping[str, Any]:
    """What the run's settings say of exporters; nothing in a run that has no settings that can be read."""
    try:
        return extraction.settings().exporter
    except InputError:
        return {}


def write_export(
    found: Plugins, extraction: Extraction, name: str, values: Mapping[str, Any], folder: Path
) -> list[Path]:
    """As ``export``, into a folder that this process is ``writing_into``. values: all settings of the exporter."""
    component = found.component("exporter", name)
    settings = found.component_settings("exporter", name, values)
    exports, into_run = Exports(folder), folder == extraction.run_dir
    within = f"{name}/" if into_run and getattr(component, "own_folder", False) else ""
    with found.naming("export", [("exporter", name)], by=("exporter", name)):
        exporter: Exporter = component(settings)
        declared = exporter.files(extraction)
    with _naming(found, name):
        files = [within + one for one in check_declared(declared)]
    if into_run and (taken := [one for one in files if _is_the_runs(one)]):
        raise InputError(
            f"exporter {name!r} writes {listed(taken)}, and a run directory has such files of its own: choose another "
            f"folder, as in {option('out', 'DIR')}"
        )
    run = None if into_run else os.path.abspath(extraction.home)
    entry, replaceable = ExportRecord(exporter=name, run=run, files=files), set()
    if into_run:
        replaceable = RunDirectory(folder).exported_before()
    exports.check(entry, replaceable)
    if extraction.home != folder and into_run:
        check_way(extraction.home, RunDirectory(extraction.home).own_names(), files)
    with exports.staging() as made:
        try:
            with found.naming("export", [("exporter", name)], by=("exporter", name)):
                (made / within).mkdir(exist_ok=True)
                exporter.export(extraction, made / within)
        except OSError as error:
            raise _cannot_write(folder, files, made, error) from error
        with _naming(found, name):
            check_written(files, made)
        exports.take(entry, made, replaceable)
    return [folder / one for one in files]


def check_declared(files: object) -> list[str]:
    """The files that an exporter declares, if they can be files of a folder.

    Raises:
        ValueError: they cannot; one line says why.
    """
    if isinstance(files, str) or not isinstance(files, Sequence):
        raise ValueError(f"declares {_shown(files)} as its files: it should be a list of names")
    if len(files) > MAX_FILES:
        raise ValueError(f"declares {len(files)} files: it should be {MAX_FILES} at most")
    known: dict[str, str] = {}
    for name in files:
        if not isinstance(name, str):
            raise ValueError(f"declares {_shown(name)} as a file: its name should be text")
        path = PurePosixPath(name)
        if not is_inside(name) or path.as_posix() != name or "\\" in name or ":" in name or not name.isprintable():
            raise ValueError(
                f"declares the file {_shown(name)}: it should be in the folder, its name relative to it, with / "
                "between folders"
            )
        if any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts):
            raise ValueError(f"declares the file {_shown(name)}: a name should have {MAX_NAME_BYTES} bytes at most")
        if path.parts[0] in (STAGING, NEXT) or path.parts[0].startswith(".icekit."):
            raise ValueError(f"declares the file {_shown(name)}, which icekit has for itself")
        if other := known.get(_spelling(name)):
            raise ValueError(f"declares {_shown(name)} and {_shown(other)}: names should differ in more than case")
        known[_spelling(name)] = name
    folders = {_spelling(parent.as_posix()) for name in known.values() for parent in PurePosixPath(name).parents}
    if both := [name for key, name in known.items() if key in folders]:
        raise ValueError(f"declares {_shown(both[0])} as a file and as a folder")
    return list(files)


def check_written(files: Collection[str], folder: Path) -> None:
    """Whether there are these files in a folder, and nothing else but folders.

    Raises:
        ValueError: there are not; one line says which.
    """
    written = set()
    for place, folders, names in os.walk(folder):
        for one in [Path(place) / name for name in (*names, *folders)]:
            name, mode = one.relative_to(folder).as_posix(), one.lstat().st_mode
            if stat.S_ISLNK(mode) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"wrote {_shown(name)} as a link, a pipe or a device: it should be a file")
            if stat.S_ISREG(mode):
                written.add(name)
    if missing := {*files} - written:
        raise ValueError(f"declared {listed(missing)} and did not write it")
    if more := written - {*files}:
        raise ValueError(f"wrote {listed(more)}, which it had not declared")


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _shown(value: object) -> str:
    return printable(repr(value), 100)


def _is_the_runs(name: str) -> bool:
    """Whether a run itself writes a file of such a name, half-written ones too, so that it would be taken for one."""
    first = PurePosixPath(name).parts[0]
    return first == "checkpoint" or (is_own_name(name) and name not in EXPORTED_BEFORE)


@contextlib.contextmanager
def _naming(found: Plugins, name: str) -> Iterator[None]:
    """What is wrong with an exporter's files, as an error that names it. Raises BreachError."""
    try:
        yield
    except ValueError as error:
        raise BreachError("exporter", name, str(error), found.offered("exporter")[name].origin) from None


def _cannot_write(folder: Path, files: Sequence[str], made: Path, error: OSError) -> CannotWrite:
    """What to say of the system's refusal, with the place that the file was to have in the end."""
    if not is_of_the_machine(error):
        raise error
    name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if name is not None and name.is_relative_to(made):
        return CannotWrite(folder / name.relative_to(made), error)
    return CannotWrite(folder / files[0] if len(files) == 1 else folder, error)
