"""Settings of the executors. Quick to import."""

from __future__ import annotations

from icekit.protocols.executing import ExecutorSettings


class LocalSettings(ExecutorSettings):
    """Settings of the ``local`` executor."""
