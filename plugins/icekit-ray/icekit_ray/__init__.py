"""The executor ``ray``: ``icekit batch`` and ``icekit bench`` on the machines of a Ray cluster.

What is here is quick to import; Ray is imported when the executor is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from icekit import hookimpl

if TYPE_CHECKING:
    from icekit.hookspecs import Register

icekit_protocol = 1
"""The version of icekit's protocols that this is written for."""


@hookimpl
def register_executors(register: Register) -> None:
    """Actors of a Ray cluster, declared by their place."""
    from icekit_ray.settings import RaySettings

    register(
        "ray",
        "icekit_ray.executor:RayExecutor",
        settings=RaySettings,
        summary="The machines of a Ray cluster: an actor a worker, which keeps the models.",
    )
