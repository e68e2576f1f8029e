"""The folder of all runs: what is in it, and what of it the page may read.

A name that comes from a browser never becomes a path: it is looked up among the folder's own entries. Symbolic links
are none of them, and a picture is read where nothing on its way is a link.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from icekit import InputError

PICTURES = ".pictures"
"""Folder of the pictures that runs were begun with, as PNG: an interrupted run goes on from there."""
MIXES = "mixes"
"""Folder of the compositions that were made on the page."""
MAX_BYTES = 2**28
MAX_PIXELS = 2**26
MAX_NAME = 40


@dataclass(frozen=True)
class Run:
    """An entry of the folder. changed: seconds, when something of it was last written."""

    name: str
    path: Path
    complete: bool
    changed: float


class Runs:
    """The folder, which is made where it is not there.

    Raises:
        InputError: it cannot be made, or is a file.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder = folder.resolve(strict=True)
        except FileExistsError as error:
            raise InputError(f"--runs {folder} is a file: give a folder") from error
        except OSError as error:
            raise InputError(f"--runs {folder}: {error.strerror or error}") from error

    def all(self) -> list[Run]:
        """Every run, the newest first; what is no run, or a symbolic link, is passed over."""
        found = [run for entry in self._folders(self.folder) if (run := self._as_run(entry))]
        return sorted(found, key=lambda run: (-run.changed, run.name))

    def find(self, name: object) -> Run:
        """A run by its name.

        Raises:
            InputError: there is none of this name.
        """
        for entry in self._folders(self.folder):
            if entry == name and (run := self._as_run(entry)):
                return run
        raise InputError(f"there is no run {str(name)[:80]!r} here")

    def new(self, stem: str, picture: Image.Image) -> Run:
        """A name that is free for a new run, with its picture kept under it."""
        folder = self.folder / PICTURES
        if folder.is_symlink():
            raise InputError(f"{folder} is a symbolic link, and should be a folder")
        folder.mkdir(exist_ok=True)
        for number in itertools.count(1):
            name = slug(stem) if number == 1 else f"{slug(stem)}-{number}"
            path = self.folder / name
            try:
                if os.path.lexists(path):
                    continue
                with (folder / f"{name}.png").open("xb") as file:
                    picture.save(file, "PNG")
            except FileExistsError:
                continue
            return Run(name, path, False, path.parent.stat().st_mtime)
        raise AssertionError("numbers do not end")

    def picture_of(self, name: str) -> Path | None:
        """The picture that a run was begun with on the page; None where it was begun elsewhere."""
        found = self._inside(self.folder, f"{PICTURES}/{name}.png")
        return self.folder / found if found else None

    def new_mix(self, prompt: str) -> Path:
        """Where a composition can be written."""
        folder = self.folder / MIXES
        if folder.is_symlink():
            raise InputError(f"{folder} is a symbolic link, and should be a folder")
        stem = slug(prompt)
        names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
        return next(path for name in names if not os.path.lexists(path := folder / name))

    def read_picture(self, path: Path, name: str) -> Image.Image | None:
        """A PNG in one of a run's folders; None where it is not there or cannot be read.

        path: the run's, from ``find``. name: one that the page knows, relative to it.
        """
        data = self.read(path, name)
        if data is None:
            return None
        import io

        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    return None
                picture.load()
                return picture.copy()
        except Exception:  # decoders raise whatever damaged bytes lead them to
            return None

    def read(self, path: Path, name: str) -> bytes | None:
        """A file's bytes, if it is a plain one below ``path``, no larger than ``MAX_BYTES``, and not behind a link."""
        found = self._inside(path, name)
        if found is None:
            return None
        try:
            number = os.open(path / found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(number, "rb") as file:
                about = os.fstat(number)
                if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
                    return None
                return file.read(MAX_BYTES)
        except OSError:
            return None

    def lines(self, path: Path, name: str) -> list[dict[str, Any]]:
        """The lines of a file of JSON objects; one that is being written is passed over."""
        found = []
        for line in (self.read(path, name) or b"").splitlines():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                found.append(value)
        return found

    def names(self, path: Path, folder: str) -> list[str]:
        """The PNG files in one of a run's folders, ``folder/name``, oldest first."""
        if not path.is_dir() or (path / folder).is_symlink() or not (path / folder).is_dir():
            return []
        found = []
        with os.scandir(path / folder) as entries:
            for entry in entries:
                if entry.name.endswith(".png") and entry.is_file(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, f"{folder}/{entry.name}"))
        return [name for _, name in sorted(found)]

    def _inside(self, path: Path, name: str) -> str | None:
        """The name, if no link is on the way from the folder of runs to it."""
        place = path
        if not path.is_relative_to(self.folder) or path.is_symlink() or Path(name).is_absolute():
            return None
        for part in Path(name).parts:
            place = place / part
            if part == ".." or place.is_symlink():
                return None
        return name if place.is_file() else None

    @staticmethod
    def _folders(folder: Path) -> list[str]:
        with os.scandir(folder) as entries:
            return [one.name for one in entries if not one.name.startswith(".") and one.is_dir(follow_symlinks=False)]

    def _as_run(self, name: str) -> Run | None:
        path = self.folder / name
        complete = self._inside(path, "manifest.json")
        record = complete or self._inside(path, "checkpoint/run.json")
        if record is None:
            return None
        try:
            changed = max(one.stat().st_mtime for one in (path, path / record))
        except OSError:  # it went in between
            return None
        return Run(name, path, complete is not None, changed)


def slug(text: str) -> str:
    """A text as the name of a folder: lower-case letters and digits of ASCII, joined by ``-``."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", plain.lower()))[:MAX_NAME].strip("-") or "picture"
