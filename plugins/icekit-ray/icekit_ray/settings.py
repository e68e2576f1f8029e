"""Settings of the executor. Quick to import: Ray is not."""

from __future__ import annotations

from pydantic import Field

from icekit.protocols import CHANGES_NO_RESULT, ExecutorSettings

LOCAL, AUTO = "local", "auto"
"""Addresses that stand for a Ray which icekit starts and ends itself, and for the one that this machine belongs to."""


class RaySettings(ExecutorSettings):
    """Settings of the ``ray`` executor."""

    address: str = Field(
        LOCAL,
        pattern=r"^(local|auto|[^\s/]+:\d+)$",
        description="of the cluster, as in 10.0.0.1:6379; auto: the one that this machine belongs to; local: a Ray of "
        "its own on this machine, which only this machine can reach and which ends with the work",
        json_schema_extra=CHANGES_NO_RESULT,
    )
    gpus: float | None = Field(
        None,
        ge=0,
        le=16,
        description="GPUs that a worker gets of the cluster; below 1 several share one; none: 1 where the cluster has "
        "GPUs and the setting device allows them",
        json_schema_extra=CHANGES_NO_RESULT,
    )
    wait: float = Field(
        300,
        gt=0,
        le=86_400,
        description="seconds to wait until the cluster has room for all workers; then it begins with those that are "
        "there",
        json_schema_extra=CHANGES_NO_RESULT,
    )
