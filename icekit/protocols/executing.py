"""What an executor must offer: workers that are set up once, and jobs that they do one after another.

``icekit batch`` and ``icekit bench`` say what is to be done, and keep what comes of it on disk; an executor says where:
in processes of this machine, or on the machines of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from icekit.protocols.components import ComponentSettings
from icekit.protocols.strict import CHANGES_NO_RESULT

MOST_TRIES = 2
"""How often a job is tried whose worker dies."""


class ExecutorSettings(ComponentSettings):
    """What every executor can be told; its own ``Settings`` are a subclass."""

    workers: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="workers, each with the models loaded; none: as many as there are devices",
        json_schema_extra=CHANGES_NO_RESULT,
    )
    threads: int = Field(
        1,
        ge=1,
        le=1024,
        description="threads that each worker computes with on the CPU, however many workers there are; numbers "
        "depend on it in their last bits",
    )


@dataclass(frozen=True)
class Work:
    """What is done in workers, and what a worker needs for it.

    set_up: called once in each worker; gives the function that does a job. Both can be sent to another
        process (module-level classes and functions of plain values), whatever comes back
        too. Set-up may take minutes (models are loaded) and raises an ``InputError`` or a ``RunError``; doing a job
        raises nothing.
    device: where the models run, as in the setting of this name: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``. A worker
        that is to compute on one of several GPUs sees that one alone.
    threads: cores that a worker computes on.
    memory: bytes of the machine's memory that a worker needs where it computes on the CPU; None: not known.
    imports: modules that every worker imports, which takes seconds: an executor may do it once for several.
    """

    set_up: Callable[[], Callable[[Any], Any]]
    device: str = "auto"
    threads: int = 1
    memory: int | None = None
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobResult:
    """A job, and what came of it.

    value: what doing it returned. lost: why there is nothing, in a sentence: its workers died; None where it was done.
    """

    job: Any
    value: Any = None
    lost: str | None = None


class Executor(Protocol):
    """Workers for jobs. Built as ``Executor(settings)``."""

    def execute(self, work: Work, jobs: Iterable[Any]) -> Generator[JobResult, None, None]:
        """Do all jobs; each result as soon as it is there, in whatever order.

        Every worker is set up before the first job is done. Jobs are taken from the iterable as workers become free:
        there may be a million of them. A job whose worker dies is tried once more by another one (``MOST_TRIES``), and
        then is lost; the others go on, with a new worker in the place of the dead one. Whoever closes the generator, or
        is interrupted in it, leaves no worker behind; neither does one that is killed.

        Raises:
            InputError: a worker's set-up raised it, or the executor's settings are wrong.
            RunError: likewise; or there is no worker left.
        """
        ...
