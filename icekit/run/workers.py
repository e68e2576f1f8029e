"""A process that works for another one: with the same plugins, threads and messages, and errors that can be sent back.

What executors start (``protocols.Executor``) are bare processes, on this machine or on another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import NoReturn

import torch

from icekit import plugins
from icekit.foreign import aside, is_of_the_machine, is_out_of_memory, said
from icekit.loaded import kept_loaded
from icekit.plugins import Choice, Plugins
from icekit.protocols import InputError, RunError
from icekit.run.atomic import CannotWrite
from icekit.run.models import reproducible
from icekit.run.origins import check_origins
from icekit.run.records import OriginRecord
from icekit.wording import command_line, is_typed

IMPORTS = ("torch", "icekit.run.orchestrator")
"""What every worker imports, for ``protocols.Work``."""
ENDED = 70
"""Exit status of a worker that cannot go on."""


class MachineAtItsEnd(CannotWrite):
    """A worker could not write, and no other one would: the disk is full, say. Work goes on when there is room."""

    def __init__(self, message: str) -> None:
        RunError.__init__(self, message)
        self.passing = True


@dataclass(frozen=True)
class Trouble:
    """What was raised in a worker, as it can be sent.

    message: one line. is_input: whether the user's input is wrong. is_of_the_machine: whether it is no fault of what
    was worked on: the disk is full, say.
    """

    message: str
    is_input: bool = False
    is_of_the_machine: bool = False

    @classmethod
    def of(cls, error: Exception) -> Trouble:
        """What was raised."""
        if isinstance(error, CannotWrite):
            return cls(str(error), is_of_the_machine=error.passing)
        if isinstance(error, InputError | RunError):
            return cls(str(error), is_input=isinstance(error, InputError))
        full = isinstance(error, OSError) and is_of_the_machine(error) and not is_out_of_memory(error)
        return cls(said(error), is_of_the_machine=full)

    def raise_again(self) -> NoReturn:
        """Raise it in the process that it was sent to."""
        if self.is_of_the_machine:
            raise MachineAtItsEnd(self.message)
        raise (InputError if self.is_input else RunError)(self.message)


@contextlib.contextmanager
def sendable() -> Iterator[None]:
    """What leaves the block is an ``InputError`` or a ``RunError`` that another process can be sent."""
    try:
        yield
    except Exception as error:
        trouble = Trouble.of(error)
        raise (InputError if trouble.is_input else RunError)(trouble.message) from error


def versions() -> dict[str, str]:
    """Of what the last bits of a result depend on, beside the plugins."""
    return {"icekit": plugins.own_version(), "torch": version("torch")}


def use_threads(count: int) -> None:
    """Compute with so many threads, whichever library does it; the same number gives the same bits."""
    import threadpoolctl

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(count)  # of libraries that are loaded later
    threadpoolctl.threadpool_limits(count)
    torch.set_num_threads(count)


@dataclass(frozen=True)
class Surroundings:
    """What a worker is to have as the process that started it has it.

    choice, origins, versions: its plugins, and what they are there. threads: that it computes with. typed: whether
    messages are for somebody who typed a command; traceback: and wants to see where errors are from.
    """

    choice: Choice
    origins: tuple[OriginRecord, ...]
    versions: Mapping[str, str]
    threads: int
    typed: bool
    traceback: bool = False

    @classmethod
    def here(cls, origins: Sequence[OriginRecord], threads: int, *, traceback: bool = False) -> Surroundings:
        """As they are in this process."""
        return cls(plugins.chosen(), tuple(origins), versions(), threads, is_typed(), traceback)

    def enter(self) -> tuple[Plugins, contextlib.ExitStack]:
        """Make this process such a worker, until it ends; the plugins, and what must be kept as long.

        Raises:
            InputError: this machine has other versions.
        """
        kept = contextlib.ExitStack()
        use_threads(self.threads)
        for one in (aside(), reproducible(), kept_loaded(), *[command_line()] * self.typed):
            kept.enter_context(one)
        if self.typed and not self.traceback:
            warnings.simplefilter("ignore")
            logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
            logging.getLogger("icekit").setLevel(logging.WARNING)
        for name, wanted in self.versions.items():
            if (found := versions().get(name)) != wanted:
                raise InputError(f"{_where()} has {name} {found}, and {wanted} is where the work was started")
        plugins.choose(self.choice)
        return plugins.installed(), kept

    def check(self, found: Plugins) -> None:
        """Whether the plugins of this process are those of the one that started it, version by version.

        Raises:
            InputError: names what differs, and the machine.
        """
        check_origins(found, self.origins, f"{_where()}: what is worked on")
        for one in self.origins:
            here = found.offered(one.kind)[one.name].origin
            if (here.distribution, here.version) != (one.distribution, one.version):
                raise InputError(
                    f"{_where()}: {one.kind} {one.name!r} is of {here.distribution} {here.version} there, and of "
                    f"{one.distribution} {one.version} where the work was started"
                )

    def note(self, error: Exception, device: torch.device) -> Trouble:
        """What was raised, as it can be sent. A process whose GPU is beyond use ends here: a new one takes its place.

        error: that is being handled.
        """
        if self.traceback:
            traceback.print_exception(error)
        if device.type == "cuda":
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except RuntimeError as broken:  # of a GPU that has met such an error a process gets nothing more
                print(f"a worker ends: {said(error)}; {said(broken)}", file=sys.stderr, flush=True)
                os._exit(ENDED)
        return Trouble.of(error)


def _where() -> str:
    return f"the worker on {platform.node() or 'another machine'}"
