"""Where paths lead that people type: into a home directory, or inside an installed package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from icekit.protocols import InputError
from icekit.protocols.strict import at_home

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


def user_path(path: str | Path, what: str = "") -> Path:
    """A path as typed, with ``~`` and ``~name`` replaced by a home directory.

    what: put before the message, a setting's key, say.

    Raises:
        InputError: there is no such user.
    """
    try:
        return at_home(path)
    except ValueError as error:
        raise InputError(f"{what}{': ' if what else ''}{path}: {error}") from error


def setting_path(value: str, setting: str) -> Path:
    """A setting's path, which may be inside a package, or begin with ``~``. It need not exist.

    Raises:
        InputError: see ``package_path`` and ``user_path``.
    """
    return user_path(package_path(value, setting), setting)


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
