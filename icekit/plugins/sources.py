"""Where plugins come from: icekit itself, and the entry points of what is installed."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

from icekit.plugins.manager import GROUP, Plugins
from icekit.plugins.registered import Origin

BUILTIN = "icekit.builtin"


def own_version() -> str:
    """The version of icekit."""
    try:
        return version("icekit")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


@functools.cache
def installed() -> Plugins:
    """The built-ins and every plugin of the entry-point group ``icekit``, imported once a process."""
    plugins = Plugins()
    plugins.add(Origin("builtin", "icekit", own_version()), lambda: import_module(BUILTIN))
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        plugins.add(_origin_of(entry), entry.load)
    return plugins


def _origin_of(entry: EntryPoint) -> Origin:
    """Where an entry point is from; its distribution's metadata may be damaged."""
    try:
        found = (entry.dist.name, entry.dist.version) if entry.dist else (None, None)
    except Exception:
        found = (None, None)
    return Origin(entry.name, *(one or "unknown" for one in found))
