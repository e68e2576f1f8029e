"""Files that users name, read once, with a limit, from pipes as well."""

from __future__ import annotations

import codecs
import errno
import logging
import os
import select
import stat
import time
from pathlib import Path

MAX_TEXT_BYTES = 64 * 2**20
"""Largest text file: a vocabulary of some million words."""
NO_WRITER_S = 5.0
"""Seconds to wait for somebody to write into a pipe that has a name."""
SILENCE_S = 60.0
"""Seconds to wait for more from a pipe that somebody has opened for writing."""
_SAY_AFTER_S = 2.0

log = logging.getLogger(__name__)


def is_hidden(path: Path) -> bool:
    """Whether a folder's entry is the system's rather than the user's: ``.DS_Store``, ``._mask.png``, ``Thumbs.db``."""
    return path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a file, or all that comes through a pipe, read once.

    limit: most bytes.

    Raises:
        OSError: it cannot be read; ``strerror`` says why. It is neither file nor pipe, too large, or nobody writes.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL, or characters that no file system takes
        raise OSError(errno.EINVAL, "no file can have this name") from error
    if stat.S_ISFIFO(mode):
        return _read_pipe(path, limit)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device, not a file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    return _within(data, limit)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark.

    Raises:
        OSError: see ``read_bytes``.
        ValueError: not UTF-8; the message says what it is.
    """
    data = read_bytes(path, MAX_TEXT_BYTES)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16 text: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it is not UTF-8 text (it has NUL characters): save it as UTF-8")
    return text


def _within(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit // 2**20} MiB")
    return data


def _read_pipe(path: Path, limit: int) -> bytes:
    named = Path(os.path.realpath(path)).exists()  # not so /dev/stdin, whose real path is pipe:[12345]
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        data, written, said, last = bytearray(), not named, False, time.monotonic()
        while True:
            try:
                chunk = os.read(pipe, 2**20)
            except BlockingIOError:
                written = True
                select.select([pipe], [], [], 0.2)
            else:
                if chunk:
                    data += chunk
                    if len(data) > limit:
                        break
                    written, last = True, time.monotonic()
                    continue
                if written:
                    break
                time.sleep(0.05)
            waited = time.monotonic() - last
            if waited > (SILENCE_S if written else NO_WRITER_S):
                raise TimeoutError(errno.ETIMEDOUT, f"it is a pipe, and nothing came through it in {waited:.0f} s")
            if waited > _SAY_AFTER_S and not said:
                log.warning("waiting for what comes through the pipe %s", path)
                said = True
    finally:
        os.close(pipe)
    return _within(bytes(data), limit)
