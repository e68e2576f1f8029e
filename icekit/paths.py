"""Where paths lead that people type: into a home directory, or inside an installed package."""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

from icekit.protocols import InputError
from icekit.protocols.strict import Stored, at_home, check_findable

PREFIX = "package:"
LOCAL = "local-dir:"


def package_path(value: str, setting: str) -> str:
    """``package:icekit_tabletop/models/open-clip`` -> where that is on this machine; anything else as it is.

    Args:
        value: of a setting that takes a folder or a file.
        setting: its key, for messages.

    Raises:
        InputError: no such package is installed, or it has no such folder or file.
    """
    if not value.startswith(PREFIX):
        return value
    package, _, inside = value.removeprefix(PREFIX).partition("/")
    if not inside:
        raise InputError(f"{setting}: {value}: say what of the package, as in {PREFIX}{package or 'NAME'}/FOLDER")
    try:
        path = Path(str(files(package).joinpath(inside)))
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"{setting}: {value}: there is no package {package!r} in this Python environment") from error
    if not path.exists():
        raise InputError(f"{setting}: {value}: the package {package!r} has no {inside}")
    return str(path)


def user_path(path: str | Path, what: str = "") -> Path:
    """A path as typed, with ``~`` and ``~name`` replaced by a home directory. It need not exist.

    what: put before the message, a setting's key, say.

    Raises:
        InputError: there is no such user, or no file can be looked for by this name.
    """
    text = str(path)
    shown = f"{what}{': ' if what else ''}{text if len(text) <= 200 else f'{text[:180]}... ({len(text)} characters)'}"
    if not text:
        raise InputError(f"{what}{': ' if what else ''}the path is empty: give one")
    if "\0" in text:
        raise InputError(f"{shown}: no file can have this name")
    try:
        found = at_home(path)
        check_findable(found)
    except ValueError as error:
        raise InputError(f"{shown}: {error}") from error
    return found


def setting_path(value: str, setting: str) -> Path:
    """A setting's path, which may be inside a package, or begin with ``~``. It need not exist.

    Raises:
        InputError: see ``package_path`` and ``user_path``.
    """
    return user_path(package_path(value, setting), setting)


def stored_place(value: str, names: Collection[str] = ()) -> str:
    """A model, folder or file as settings keep it: where it is on this machine, whatever the working directory.

    What is inside a package or on the hub stays as it is, and so does what is not there: its reader says so.

    Args:
        value: as typed; ``local-dir:`` may stand before it.
        names: what it may also be, and then is no path.
    """
    kind = LOCAL if value.startswith(LOCAL) else ""
    place = value.removeprefix(kind)
    if not place or value.startswith(PREFIX) or value in names:
        return value
    try:
        path = at_home(place)
        return kind + str(path.resolve(strict=True)) if os.path.lexists(path) else value
    except (OSError, RuntimeError, ValueError):
        return value


def _each(value: Any) -> Any:
    return [stored_place(one) for one in value] if isinstance(value, list) else _one(value)


def _one(value: Any) -> Any:
    return stored_place(value) if isinstance(value, str) else value


PLACE = Stored(_one)
"""Marks a setting that is a folder or file, or else the name of a model of the hub."""
PLACES = Stored(_each)
"""Marks a setting that lists such."""


def resolved_path(value: str, setting: str) -> Path:
    """Where ``setting_path`` leads, whole: ``./`` and links followed too.

    Args:
        value: of a setting that takes a folder or a file.
        setting: its key, for messages.

    Raises:
        InputError: see ``setting_path``; or what it names cannot be looked at.
    """
    path = setting_path(value, setting)
    try:
        path = path.resolve()
        path.is_dir()  # refused where a folder above it may not be entered, or a name is too long
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{setting}: {value if len(value) < 200 else value[:197] + '...'!r}: {reason}") from error
    return path
