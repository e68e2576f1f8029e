"""Code of other people, called by ours: what it prints, what it raises, and how it tries to end the program.

Only ``os._exit`` and a crash cannot be caught: they end the process at once.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from icekit.protocols.errors import RunError

MAX_SAID = 400
"""Most characters of what an exception says that a message shows."""
OF_THE_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE})
"""System errors that whoever writes a file may meet: no code is to blame for them."""
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "ALLOC_FAILED",
)
"""What a RuntimeError of torch says when there is not enough memory."""


class Ended(Exception):
    """Foreign code raised what is no ``Exception``: SystemExit, GeneratorExit or KeyboardInterrupt without a Ctrl-C."""


def said(error: BaseException) -> str:
    """What an exception is and says, as one line of bounded length; its own ``__str__`` may fail as well."""
    if isinstance(error, Ended) and error.__cause__ is not None:
        error = error.__cause__
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    text = text if len(text) <= MAX_SAID else f"{text[: MAX_SAID - 3]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_of_the_machine(error: BaseException) -> bool:
    """Whether memory, disk or file handles are at an end: that can meet any code."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in OF_THE_MACHINE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is at an end: Python's, the system's or a device's. Torch has no type of its own for all of it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError):  # of a library that the system could not map
        return "failed to map segment" in str(error) and "not permitted" not in str(error)
    torchs = isinstance(error, RuntimeError) and not isinstance(error, RunError)
    return torchs and any(sign in str(error) for sign in OUT_OF_MEMORY)


@contextlib.contextmanager
def watched_interrupts() -> Iterator[Callable[[], bool]]:
    """Tell a Ctrl-C from a KeyboardInterrupt that somebody raised: whether SIGINT arrived within the block."""
    arrived: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False  # it cannot arrive here
        return

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(arrived)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What leaves the block is an ``Exception``, or a real Ctrl-C, which goes on whatever the code made of it.

    Raises:
        KeyboardInterrupt: SIGINT arrived.
        Ended: another exception that is no ``Exception``.
    """
    with watched_interrupts() as interrupted:
        try:
            yield
        except BaseException as error:
            if interrupted():
                raise KeyboardInterrupt from None
            if isinstance(error, Exception):
                raise
            raise Ended(said(error)) from error
        if interrupted():
            raise KeyboardInterrupt


# --- Standard output -------------------------------------------------------------------------------------------------


class _StandardError:
    """Stands for ``sys.stdout`` where nothing may be printed on it: writes to ``sys.stderr``, and closes nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def close(self) -> None:
        """Stays open."""


_is_aside = False


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What is printed on standard output within the block goes to standard error; stdout is for results alone.

    Both Python's ``sys.stdout`` and file descriptor 1, where C libraries and other processes print.
    """
    global _is_aside
    if _is_aside:
        yield
        return
    out, kept = sys.stdout, None
    _flush()
    with contextlib.suppress(OSError):  # closed
        kept = os.dup(1)
        os.dup2(2, 1)
    sys.stdout, _is_aside = _StandardError(), True
    try:
        yield
    finally:
        _flush()
        sys.stdout, _is_aside = out, False
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def nothing_after_results() -> None:
    """What is printed on standard output when the process ends goes to standard error, as in ``aside``."""
    atexit.unregister(_aside_for_good)
    atexit.register(_aside_for_good)  # the last one that is registered is called first


def _aside_for_good() -> None:
    whole = _flush()
    with contextlib.suppress(OSError):  # what could not be written, to a closed pipe, say, is no message either
        os.dup2(2 if whole else os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = _StandardError()


def _flush() -> bool:
    """Whether all that was printed is written."""
    whole = True
    for stream in (sys.stdout, sys.__stdout__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except (AttributeError, OSError, ValueError):  # there is none, it is full, or closed
            whole = False
    if _is_aside:
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).fflush(None)  # what C libraries printed waits in a buffer of theirs
    return whole
