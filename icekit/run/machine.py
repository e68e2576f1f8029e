"""What becomes of a run when the machine's memory is at an end: one line that says in which stage, and the ways out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from icekit.foreign import is_out_of_memory, said
from icekit.plugins import Plugins
from icekit.protocols import InputError, RunError
from icekit.protocols.strict import least_memory
from icekit.settings import ROLES, Settings


class OutOfMemory(RunError):
    """There is not enough memory, the machine's or a device's."""


@contextlib.contextmanager
def enough_memory(stage: str | Callable[[], str], found: Plugins, settings: Callable[[], Settings]) -> Iterator[None]:
    """Name what needed more memory than there is, and the settings with which it needs less.

    stage: what is being done. settings: those that it is done with.

    Raises:
        OutOfMemory: Python, the system or a device has no more of it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = stage if isinstance(stage, str) else stage()
        first = said(error).partition(". ")[0].partition(" (")[0][:160]
        raise OutOfMemory(f"out of memory in stage {where} ({first}): {_ways_out(found, settings())}") from error


def _ways_out(found: Plugins, settings: Settings) -> str:
    """The settings that can be lower, as options to type."""
    ways = []
    for role in ROLES:
        with contextlib.suppress(InputError):  # settings that are not checked yet
            name = settings.name_of(role)
            values = found.component_settings(role, name, settings.values_of(role))
            for key, least in least_memory(type(values)).items():
                if getattr(values, key) != least:
                    ways.append(f"--set {role}.{key}={least} (now {getattr(values, key)})")
    others = "close other programs, or take a smaller model, another --device or a larger machine"
    return f"less is needed with {' or '.join(ways)}; or else {others}" if ways else others
