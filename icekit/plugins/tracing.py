"""``ICEKIT_TRACE=1``: every call of a hook, with the plugin that it was made to and its time, a line each on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pluggy

from icekit.plugins.registered import Origin

VARIABLE = "ICEKIT_TRACE"


def trace(manager: pluggy.PluginManager, origins: dict[object, Origin]) -> None:
    """Tell of every call from now on; origins: the plugins, which may come in later."""
    begun: list[float] = []

    def before(hook: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        begun.append(time.perf_counter())

    def after(
        outcome: pluggy.Result[Any], hook: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]
    ) -> None:
        milliseconds = (time.perf_counter() - begun.pop()) * 1000
        whose = [str(origins.get(one.plugin, type(one.plugin).__name__)) for one in implementations]
        if whose:  # icekit asks each plugin by itself, whether or not it has the hook
            failed = "" if outcome.exception is None else f", and raised {type(outcome.exception).__name__}"
            print(f"trace: {hook} of {' and '.join(whose)}: {milliseconds:.2f} ms{failed}", file=sys.stderr)

    manager.add_hookcall_monitoring(before, after)
