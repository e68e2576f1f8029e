"""Which runs there are below the directories that somebody names: runs, folders of runs, batches, runs of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icekit.protocols import InputError
from icekit.run.directory import VECTORS
from icekit.run.extraction import Extraction
from icekit.run.hub import run_path

OF_A_RUN = frozenset({"manifest.json", "image.png", "embeddings.safetensors"})
"""What every complete run has."""


@dataclass(frozen=True)
class Place:
    """A run. path: absolute. shown: as somebody can type it."""

    path: Path
    shown: str


def places_of(run_dirs: Sequence[str | Path]) -> list[Place]:
    """The runs below these directories, in their order, within each by name. A link to a folder is not followed.

    Raises:
        InputError: one is not there, or there is no complete run in it.
    """
    places = []
    for given in run_dirs:
        root = run_path(given)
        found = [_place(str(given), root, path) for path in _runs_below(root)] if root.is_dir() else []
        if not found:
            found = [_place(str(given), root, _only_run(root))]
        places += found
    return places


def stamp_of(path: Path) -> str:
    """What tells a run from what may come to be in its directory."""
    facts = []
    for name in ("manifest.json", VECTORS):
        try:
            found = (path / name).stat()
            facts.append(f"{found.st_mtime_ns} {found.st_size}")
        except OSError:
            facts.append("none")
    return ", ".join(facts)


def _only_run(root: Path) -> Path:
    """The directory itself, which should be a run. Raises InputError, which says what it is instead."""
    try:
        return Extraction.open(root).run_dir
    except InputError as error:
        if root.is_dir() and "it has no manifest.json" in str(error):
            raise InputError(f"{root} is neither a run directory nor a folder with runs in it") from error
        raise


def _place(given: str, root: Path, path: Path) -> Place:
    inside = path.relative_to(root).as_posix()
    return Place(Path(os.path.abspath(path)), given if inside == "." else f"{given.rstrip('/')}/{inside}")


def _runs_below(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        if OF_A_RUN.issubset(files):
            folders.clear()
            yield Path(folder)
