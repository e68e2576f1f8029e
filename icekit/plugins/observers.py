"""Telling observers what happens in a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pluggy

from icekit.foreign import guarded, said
from icekit.protocols.errors import StopRun

log = logging.getLogger(__name__)

LAST = ("run_finished", "run_failed")
"""The hooks that tell of a run that is over."""


class Observers:
    """Calls observer hooks. An observer that raises or exits is reported once and heard no more: it ends no run, but
    by ``StopRun``.

    whose: plugin's name -> what it is called in a message; others are called by their names.
    """

    def __init__(self, manager: pluggy.PluginManager, whose: Mapping[str, str] | None = None) -> None:
        self._manager, self._whose = manager, whose or {}
        self._callers: dict[str, dict[str, Any]] = {}
        self._silenced: set[str] = set()

    def tell(self, hook: str, **arguments: Any) -> None:
        """Call one hook of every observer."""
        for name, caller in self._callers_of(hook).items():
            if name in self._silenced:
                continue
            try:
                with guarded():
                    caller(**arguments)
            except StopRun:
                if hook in LAST:  # there is nothing left to stop
                    continue
                raise
            except Exception as error:
                self._silenced.add(name)
                whose = self._whose.get(name, f"plugin {name!r}")
                log.warning("%s failed in %s and is ignored from here on: %s", whose, hook, said(error))

    def _callers_of(self, hook: str) -> dict[str, Any]:
        if hook not in self._callers:  # step_done is called very often
            everyone = self._manager.get_plugins()
            self._callers[hook] = {
                implementation.plugin_name: self._manager.subset_hook_caller(
                    hook, [other for other in everyone if other is not implementation.plugin]
                )
                for implementation in getattr(self._manager.hook, hook).get_hookimpls()
            }
        return self._callers[hook]
