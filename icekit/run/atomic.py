"""Files that are whole or not there: written under a temporary name first, then renamed.

Here alone files are written. What the system refuses becomes a ``CannotWrite`` that names the file, and nothing
half-written stays.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from icekit.protocols import RunError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

NEED_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""System errors that a smaller file would not have met: a message says how much was needed."""
PASSING = NEED_ROOM | {errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EACCES, errno.EPERM}
"""System errors that a person can mend without changing the run, which then goes on."""
_LIMITS = {errno.EFBIG: " (`ulimit -f` shows the limit)", errno.EMFILE: " (`ulimit -n` shows the limit)"}


class CannotWrite(RunError):
    """The system does not let a file be written. passing: whether the same may succeed later."""

    def __init__(self, path: Path, error: OSError, size: int | None = None) -> None:
        """path: what was to be written. size: bytes of it, where they are known."""
        self.passing = error.errno in PASSING
        needed = f" ({readable_size(size)} needed)" if size is not None and error.errno in NEED_ROOM else ""
        super().__init__(f"cannot write {path}: {why(error, path)}{needed}")


def why(error: OSError, path: Path | None = None) -> str:
    """What the system says, as the middle of a sentence. path: tells a full disk from one that has no inodes."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC and path is not None and _has_no_inodes(path):
        return "no inodes left on device"
    return reason[:1].lower() + reason[1:] + _LIMITS.get(error.errno or 0, "")


def readable_size(size: float) -> str:
    """Bytes for people: ``312 bytes``, ``4.2 MB``."""
    if size < 1000:
        return f"{size:.0f} bytes"
    power = min(3, int(math.log10(size)) // 3)
    return f"{size / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


@contextlib.contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """What the system refuses within the block is about this file.

    size: its bytes, where they are known.

    Raises:
        CannotWrite: names it, and why.
    """
    try:
        yield
    except OSError as error:
        raise CannotWrite(path, error, size) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either there as a whole or not at all; makes its folder.

    Raises:
        CannotWrite: the system refuses.
    """
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 as ``write_atomically`` does. What no UTF-8 holds, of file names say, is written as an escape."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_tensors_atomically(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file as ``write_atomically`` does, tensor by tensor: its bytes are never all in memory.

    Raises:
        CannotWrite: the system refuses.
    """
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        kept[key] = plain.clone() if place in places else plain  # safetensors refuses two tensors in one storage
        places.add(place)
    # safetensors has a temporary file of its own, private and of any name: it gets a folder that is known as ours.
    folder = _temporary(path)
    with writing(path, sum(one.nbytes for one in kept.values())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _system_errors():
                save_file(kept, folder / path.name, metadata)
            with (folder / path.name).open("rb+") as file:
                os.chmod(file.fileno(), folder.stat().st_mode & 0o666)  # as open to others as any file of the run
                os.fsync(file.fileno())
            os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_image_atomically(path: Path, image: Image.Image) -> None:
    """Write a PNG as ``write_atomically`` does."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def write_json_atomically(path: Path, value: object, indent: int | None = 1) -> None:
    """Write JSON as ``write_text_atomically`` does: an escape of that kind is one of JSON's, and is read as it was.

    Raises:
        ValueError: a number in it is NaN or infinite: JSON has no word for these.
        CannotWrite: the system refuses.
    """
    write_text_atomically(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def _temporary(path: Path) -> Path:
    """Where a file is written first: a name of this process's, for two may write the same file."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Give back the system's errors that safetensors puts into its own: ``I/O error: ... (os error 28)``."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _has_no_inodes(path: Path) -> bool:
    for folder in path.parents:
        with contextlib.suppress(OSError, AttributeError):  # not made yet; a system that cannot say
            room = os.statvfs(folder)
            return room.f_files > 0 and room.f_favail == 0
    return False
