"""Which plugins a run is made with: kept with it, so that a missing one is named when the run is taken up again."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from icekit.plugins import Plugins
from icekit.protocols import InputError
from icekit.run.records import OriginRecord
from icekit.settings import ROLES, Settings


def origins_of(found: Plugins, settings: Settings) -> list[OriginRecord]:
    """Where the components, attributes and exporters of a run with these settings, complete, come from."""
    names: list[tuple[str, str]] = [(role, settings.name_of(role)) for role in ROLES]
    names += [("attribute", name) for name in settings.attributes if name not in settings.attribute]
    names += [("exporter", name) for name in settings.exporters]
    made = []
    for kind, name in names:
        origin = found.offered(kind)[name].origin
        made.append(OriginRecord(kind=kind, name=name, **vars(origin)))
    return made


def check_origins(found: Plugins, origins: Sequence[OriginRecord], run: str, kinds: Collection[str] = ()) -> None:
    """Whether what a run was made with is here.

    run: what the run is called in a message. kinds: those that are needed; all if there are none.

    Raises:
        InputError: names the component, its plugin, and how it comes back.
    """
    for one in origins:
        if (kinds and one.kind not in kinds) or one.name in found.offered(one.kind):
            continue
        brings = f"`pip install {one.distribution}=={one.version}`"
        if not one.version:  # it is a file
            brings = f"--plugin-file {shlex.quote(one.distribution)}"
        why = f"which is not here: {brings} brings it back"
        if broken := [str(two.reason) for two in found.broken if two.origin.plugin == one.plugin]:
            why = f"which is broken: {broken[0]}"
        whose = f"{one.distribution} {one.version}".strip()
        raise InputError(f"{run} was made with {one.kind} {one.name!r} of plugin {one.plugin!r} ({whose}), {why}")
