"""Where plugins come from: icekit itself, the entry points of what is installed, single files, and a folder of files.

An entry point of the group ``icekit`` is a module or object with hooks; one of ``icekit.attributes`` is a TOML file of
attributes (``data``). A file is a plugin without a package: a ``.py`` file with hooks, or such a TOML file; its stem is
the plugin's name. Which of them a process loads is its ``Choice``.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from importlib.resources import as_file, files
from pathlib import Path

from icekit.paths import user_path
from icekit.plugins import tracing
from icekit.plugins.checking import PluginError, check_version, version_in
from icekit.plugins.data import AttributeFile
from icekit.plugins.manager import GROUP, Plugins
from icekit.plugins.registered import Origin
from icekit.protocols import InputError
from icekit.settings import nearest

log = logging.getLogger(__name__)
BUILTIN = "icekit.builtin"
DATA_GROUP = f"{GROUP}.attributes"
SUFFIXES = (".py", ".toml")
"""Of files that are plugins."""
ONLY, FOLDER = "ICEKIT_PLUGINS", "ICEKIT_PLUGINS_DIR"


def own_version() -> str:
    """The version of icekit."""
    try:
        return version("icekit")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


@dataclass(frozen=True)
class Choice:
    """Which plugins a process loads beside the built-ins.

    files: single files; they are loaded whatever ``only`` says.
    without: names of plugins that are left out.
    only: names of those that are taken of what is installed or in ``folder``; None: all.
    folder: whose ``.py`` and ``.toml`` files are plugins.
    """

    files: tuple[Path, ...] = ()
    without: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    folder: Path | None = None

    @classmethod
    def of(
        cls, files: tuple[Path, ...] = (), without: tuple[str, ...] = (), environment: Mapping[str, str] = os.environ
    ) -> Choice:
        """With what the environment says: ``ICEKIT_PLUGINS`` (a list with commas) and ``ICEKIT_PLUGINS_DIR``."""
        only, folder = environment.get(ONLY), environment.get(FOLDER)
        names = None if only is None else tuple(name.strip() for name in only.split(",") if name.strip())
        return cls(files, without, names, user_path(folder, FOLDER) if folder else None)

    def as_options(self) -> list[str]:
        """What of it is said by options of the command line."""
        options = [word for file in self.files for word in ("--plugin-file", str(file))]
        return options + [word for name in self.without for word in ("--no-plugin", name)]


_chosen: Choice | None = None


def choose(choice: Choice) -> None:
    """Say what ``installed`` loads in this process."""
    global _chosen
    if choice != _chosen:
        _chosen = choice
        installed.cache_clear()


def chosen() -> Choice:
    """What ``installed`` loads in this process; another one that is told to ``choose`` it loads the same."""
    return Choice.of() if _chosen is None else _chosen


@functools.cache
def installed() -> Plugins:
    """The built-ins and the plugins of this process, imported once.

    Those are what is installed, as far as ``ICEKIT_PLUGINS`` allows, and what ``choose`` said.

    Raises:
        InputError: see ``load``.
    """
    return load(chosen())


def load(choice: Choice) -> Plugins:
    """The built-ins and the plugins of a choice.

    Raises:
        InputError: a file that is not there, or a name in ``without`` that no plugin has.
    """
    plugins = Plugins()
    if os.environ.get(tracing.VARIABLE, "0") not in ("", "0"):
        plugins.trace()
    plugins.add(Origin("builtin", "icekit", own_version()), lambda: import_module(BUILTIN))
    found = [*_entries(), *_in_folder(choice.folder)]
    given = [_of_file(_checked(file)) for file in choice.files]
    _check_names(choice, [origin.plugin for origin, _ in found], [origin.plugin for origin, _ in given])
    found = [one for one in found if choice.only is None or one[0].plugin in choice.only]
    for origin, bring in (*found, *given):
        if origin.plugin not in choice.without:
            plugins.add(origin, bring)
    return plugins


Source = tuple[Origin, Callable[[], object]]
"""A plugin that is not imported yet, and what imports it."""


def _check_names(choice: Choice, found: list[str], given: list[str]) -> None:
    for name in choice.without:
        if name == "builtin":
            raise InputError("--no-plugin builtin: icekit's own plugin cannot be left out")
        if name not in (*found, *given):
            raise InputError(f"--no-plugin {name}: no plugin is called so: {nearest(name, [*found, *given])}")
    for name in choice.only or ():
        if name not in found:
            log.warning("%s names %r, and no plugin is called so: %s", ONLY, name, nearest(name, found))


# --- What is installed -----------------------------------------------------------------------------------------------


def _entries() -> Iterator[Source]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        yield _origin_of(entry), functools.partial(_import, entry)
    for entry in sorted(entry_points(group=DATA_GROUP), key=lambda entry: entry.name):
        yield _origin_of(entry), functools.partial(_read, entry)


def _origin_of(entry: EntryPoint) -> Origin:
    """Where an entry point is from; its distribution's metadata may be damaged."""
    try:
        found = (entry.dist.name, entry.dist.version) if entry.dist else (None, None)
    except Exception:
        found = (None, None)
    return Origin(entry.name, *(one or "unknown" for one in found))


def _import(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except ImportError:
        spec = importlib.util.find_spec(entry.module)
        if spec is not None and spec.origin is not None:
            check_version(version_in(Path(spec.origin)))  # that may be why
        raise


def _read(entry: EntryPoint) -> object:
    package, colon, name = entry.value.partition(":")
    if not colon or not name.endswith(".toml"):
        raise PluginError(f"it is {entry.value!r} in the group {DATA_GROUP}: it should be package:file.toml")
    try:
        with as_file(files(package.strip()).joinpath(name.strip())) as file:
            return AttributeFile(file)
    except (ImportError, TypeError) as error:
        raise PluginError(f"there is no package {package!r}, of which {entry.value!r} is to be a file") from error


# --- Files -----------------------------------------------------------------------------------------------------------


def _checked(file: Path) -> Path:
    path = user_path(file, "--plugin-file")
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plugin-file {file}: it should be a .py file with hooks, or a .toml file of attributes")
    if not path.is_file():
        raise InputError(f"--plugin-file {file}: no such file")
    return path


def _in_folder(folder: Path | None) -> Iterator[Source]:
    if folder is None:
        return
    try:
        names = sorted(folder.iterdir())
    except OSError as error:
        log.warning("%s: %s: %s", FOLDER, folder, (error.strerror or str(error)).lower())
        return
    for file in names:
        if file.suffix in SUFFIXES and file.is_file() and not file.name.startswith((".", "_")):
            yield _of_file(file)


def _of_file(file: Path) -> Source:
    path = file.absolute()
    return Origin(path.stem, str(path), ""), functools.partial(_bring, path)


def _bring(file: Path) -> object:
    """The plugin that a file is. Its module has a name of its own: the stem may be that of an installed one."""
    if file.suffix == ".toml":
        return AttributeFile(file)
    name = "icekit_file_" + re.sub(r"\W", "_", file.stem)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        check_version(version_in(file))
        raise
    return module
