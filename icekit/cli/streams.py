"""The streams of the program: results on stdout, messages on stderr, wherever these lead."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class ResultsLost(OSError):
    """The results cannot be written to stdout."""


class _Stream:
    """Stands for a stream of text; what it does not do itself, that one does."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with self._guarded():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand it to the system."""
        with self._guarded():
            self._stream.flush()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        yield


class Results(_Stream):
    """Standard output. Where its reader has gone it has all that it wanted: what is left is not written.

    Raises:
        ResultsLost: the disk is full, say.
    """

    lost: ResultsLost | None = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        if self.lost is not None:  # somebody took no notice
            raise self.lost
        try:
            yield
        except OSError as error:
            discard(self._stream)
            if error.errno != errno.EPIPE:
                self.lost = ResultsLost(error.errno, error.strerror)
                raise self.lost from error


class Messages(_Stream):
    """Standard error. No work ends because a message cannot be written."""

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield


def discard(stream: Any) -> None:
    """Lead a stream nowhere from here on, with what waits in its buffer: Python would try again when it ends."""
    with contextlib.suppress(OSError, AttributeError, ValueError):  # none of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
        stream.flush()


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """The program's streams as above for the length of the block.

    What a terminal cannot print is printed as an escape: it must not end a run that is done.
    """
    _open_closed()
    out, err = sys.stdout, sys.stderr
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Results(out), Messages(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        try:
            err.flush()
        except OSError:
            discard(err)


def _open_closed() -> None:
    """Open what was closed when the program began: a file that is opened later would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
                setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
