"""Paths in settings: inside an installed package (``package:NAME/FOLDER``), of the home folder, relative ones."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from icekit.protocols import InputError

PREFIX = "package:"


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


def resolved_path(value: str, setting: str) -> Path:
    """Where a setting's path leads, whole: inside a package, ``~``, ``./`` and links followed. It need not exist.

    Args:
        value: of a setting that takes a folder or a file.
        setting: its key, for messages.

    Raises:
        InputError: it is no path, a package or a home folder that is not there, or what it names cannot be looked at.
    """
    try:
        path = Path(package_path(value, setting)).expanduser().resolve()
        path.is_dir()  # refused where a folder above it may not be entered, or a name is too long
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{setting}: {value if len(value) < 200 else value[:197] + '...'!r}: {reason}") from error
    return path
