"""The pictures of a batch: which files they are, and what their run directories are called."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from icekit.files import is_hidden, read_text
from icekit.paths import user_path
from icekit.protocols import InputError
from icekit.protocols.values import bounded
from icekit.run.directory import RunDirectory

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Of the files of a folder that are pictures, in lower case."""
MAX_NAME_BYTES = 120
"""Of a run directory's name."""
DIGITS = 8
"""Hexadecimal digits that tell pictures of one name apart."""
BATCH = "batch.json"


def find_pictures(given: Iterable[str | Path], out: Path) -> list[Path]:
    """The picture files that were asked for, absolute, each once, in the order of what was given.

    A file whose name ends with ``.txt`` is a list: a path a line, from the list's folder; lines that are empty or begin
    with ``#`` are none. Of a folder it is the files with a picture's suffix, in all folders below; ``out``, other runs
    and batches, and what is hidden are not looked into. Whether a file is a picture is seen when it is read.

    Raises:
        InputError: something that was given is not there, or has no picture in it.
    """
    found: dict[Path, None] = {}
    for one in given:
        files = [Path(os.path.abspath(file)) for file in _pictures_in(one, out)]
        if not files:
            raise InputError(f"{one}: there is no picture in it ({', '.join(sorted(SUFFIXES))})")
        found |= dict.fromkeys(files)
    if not found:
        raise InputError("no picture was given: give files, folders, lists or patterns")
    return list(found)


def _pictures_in(given: str | Path, out: Path) -> Iterable[Path]:
    path = user_path(given)
    if path.is_dir():
        return _below(path, Path(os.path.abspath(out)))
    if os.path.lexists(path):
        return _listed(path) if path.suffix.lower() == ".txt" else [path]
    if glob.has_magic(str(path)):
        matching = sorted(map(Path, glob.glob(str(path), recursive=True)), key=_natural)
        files = [one for one in matching if one.is_file()]
        if not files:
            raise InputError(f"{given}: no file matches this pattern")
        return files
    raise InputError(f"{given}: there is no such file or folder, and it is no pattern (as in 'photos/*.jpg')")


def _listed(path: Path) -> list[Path]:
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is no list of pictures: {error}") from error
    return [path.parent / user_path(line) for one in lines if (line := one.strip()) and not line.startswith("#")]


def _below(folder: Path, out: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted((one for one in folders if _is_looked_into(here / one, out)), key=_natural)
        for name in sorted(files, key=_natural):
            if Path(name).suffix.lower() in SUFFIXES and not is_hidden(Path(name)):
                yield here / name


def _is_looked_into(folder: Path, out: Path) -> bool:
    if is_hidden(folder) or Path(os.path.abspath(folder)) == out or (folder / BATCH).is_file():
        return False
    return not RunDirectory(folder).is_ours


def _natural(name: str | Path) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if part.isdecimal() else (-1, part.casefold()) for part in parts]


# --- Their names ------------------------------------------------------------------------------------------------------


def name_pictures(sources: Sequence[Path], known: Mapping[Path, str]) -> dict[Path, str]:
    """A name for the run directory of each picture, whatever order they come in.

    It is the file's, without its suffix; digits of its path tell it from others of this name, also where the file
    system knows no case. known: names that pictures have already, which they keep.
    """
    stems = {source: _stem(source) for source in dict.fromkeys(sources) if source not in known}
    counts = Counter(_spelling(stem) for stem in stems.values())
    taken = {_spelling(name) for name in known.values()}
    names = {source: known[source] for source in sources if source in known}
    for source, stem in stems.items():
        if counts[_spelling(stem)] > 1 or _spelling(stem) in taken:
            digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:DIGITS]
            stem = f"{bounded(stem, MAX_NAME_BYTES - DIGITS - 1)}-{digest}"
        names[source] = stem
    return names


def _stem(source: Path) -> str:
    """A file's name without its suffix, as a folder of any system can be called."""
    name = "".join("-" if one in r'/\:*?"<>|' or unicodedata.category(one)[0] == "C" else one for one in source.stem)
    return bounded(re.sub(r"-{2,}", "-", name).strip(". "), MAX_NAME_BYTES) or "picture"


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
