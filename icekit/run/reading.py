"""Reading a directory that icekit wrote, or that somebody says it wrote: checked, bounded, nothing outside of it."""

from __future__ import annotations

import io
import json
import math
import os
import stat
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypeVar

from PIL import Image
from pydantic import BaseModel, ValidationError

from icekit.files import read_bytes
from icekit.foreign import is_of_the_machine
from icekit.protocols import InputError
from icekit.protocols.errors import printable
from icekit.run.hub import linked_files_of
from icekit.run.records import explain

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file, text file or log: hundreds of thousands of learning steps."""
MAX_DEPTH = 32
"""How deep JSON may nest its values: more than anything that is written, less than makes Python give up."""
MAX_PICTURE_BYTES = 2**28
MAX_PICTURE_PIXELS = 2**26
"""Pictures of a run are as large as its model's: 8192 pixels a side are far above."""

Model = TypeVar("Model", bound=BaseModel)


class DamagedError(InputError):
    """A file that icekit would not have written so, in one line. problem: without the way out."""

    def __init__(self, problem: str, way_out: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}: {way_out}")


class Files:
    """The files of one directory. What is a link that leads out of it, or no plain file, is refused.

    path: the directory; it may itself be reached by a link. whose: ``"the run in runs/photo"``, for messages.
    way_out: what to do about a damaged one.
    """

    def __init__(self, path: Path, whose: str, way_out: Callable[[], str]) -> None:
        self.path = path
        self._whose = whose
        self._way_out = way_out

    def damaged(self, name: str, problem: str) -> DamagedError:
        """The error that says so."""
        return DamagedError(f"{self._whose} is damaged: {printable(name, 200)}: {problem}", self._way_out())

    def find(self, name: str) -> Path | None:
        """Where a file is; None where there is nothing of this name.

        Raises:
            DamagedError: a link that leads out, or nowhere; a folder, pipe or device.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        try:
            real = path.resolve(strict=True)
            mode = real.stat().st_mode
            inside = real.is_relative_to(self.path.resolve())
        except (OSError, RuntimeError) as error:
            self._refuse(name, error)
        if not inside and real.parent != linked_files_of(self.path):
            raise self.damaged(name, "it is a link to something outside, and nothing outside is read")
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise self.damaged(name, f"it is {kind}, and should be a file")
        return real

    def names(self, folder: str, ending: str) -> list[str]:
        """The files of this ending in one of its folders, as ``folder/name``, sorted; none where it is not there.

        Raises:
            DamagedError: the folder is a link that leads out.
        """
        path = self.path / folder
        if not os.path.lexists(path):
            return []
        try:
            inside = path.resolve(strict=True).is_relative_to(self.path.resolve())
            found = sorted(os.listdir(path)) if inside else []
        except (OSError, RuntimeError) as error:
            self._refuse(folder, error)
        if not inside:
            raise self.damaged(folder, "it is a link to something outside, and nothing outside is read")
        return [f"{folder}/{name}" for name in found if name.endswith(ending)]

    def read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes | None:
        """A file's bytes, at most so many; None where it is not there.

        Raises:
            DamagedError: see ``find``; or it cannot be read, or is larger.
        """
        path = self.find(name)
        if path is None:
            return None
        try:
            return read_bytes(path, limit)
        except OSError as error:
            self._refuse(name, error)

    def text(self, name: str) -> str | None:
        """A text file in UTF-8; None where it is not there. Raises DamagedError."""
        data = self.read(name)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(name, f"it is not UTF-8 text (byte {error.start})") from error

    def json(self, name: str) -> Any:
        """A JSON file's content; None where it is not there. Raises DamagedError."""
        data = self.read(name)
        if data is None:
            return None
        try:
            content = parse_json(data)
        except ValueError as error:
            raise self.damaged(name, str(error)) from error
        if content is None:
            raise self.damaged(name, "it is null, and should be a JSON object")
        return content

    def check(self, name: str, model: type[Model], content: Any) -> Model:
        """The content of a JSON file as its model. Raises DamagedError."""
        if not isinstance(content, dict):
            raise self.damaged(name, "it should be a JSON object")
        try:
            return model.model_validate(content)
        except ValidationError as error:
            raise self.damaged(name, explain(error)) from error

    def record(self, name: str, model: type[Model]) -> Model | None:
        """A JSON file as its model; None where it is not there. Raises DamagedError."""
        content = self.json(name)
        return None if content is None else self.check(name, model, content)

    def picture(self, name: str, size: tuple[int, int] | None = None) -> Image.Image | None:
        """A PNG as it is stored, decoded; None where it is not there.

        size: (width, height) that it must have, pixels.

        Raises:
            DamagedError: see ``read``; or no whole PNG, or of another size.
        """
        data = self.read(name, MAX_PICTURE_BYTES)
        if data is None:
            return None
        try:
            return decode_picture(data, size)
        except ValueError as error:
            raise self.damaged(name, str(error)) from error

    def tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """A safetensors file and its metadata; None where it is not there.

        Raises:
            DamagedError: see ``find``; or it is cut, empty or something else.
        """
        return self._tensors(name, "pt")

    def arrays(self, name: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        """As ``tensors``, NumPy arrays: it needs no torch, which takes seconds to import. Raises DamagedError."""
        return self._tensors(name, "np")

    def _tensors(self, name: str, framework: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        from safetensors import safe_open

        path = self.find(name)
        if path is None:
            return None
        try:
            with _named_in_utf8(path) as readable, safe_open(readable, framework=framework) as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
                return tensors, dict(file.metadata() or {})
        except MemoryError:
            raise
        except Exception as error:  # safetensors' own, the file system's
            why = printable(" ".join(str(error).split()), 200)
            raise self.damaged(name, f"it is no whole safetensors file ({why})") from error

    def finite_tensors(self, name: str) -> dict[str, Tensor] | None:
        """As ``tensors``, of floating point numbers all of which are finite. Raises DamagedError."""
        found = self.tensors(name)
        if found is None:
            return None
        for key, value in found[0].items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise self.damaged(name, f"{printable(key, 200)} has numbers that are NaN or infinite")
        return found[0]

    def _refuse(self, name: str, error: Exception) -> Never:
        if is_of_the_machine(error):
            raise error  # which says nothing of the file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, FileNotFoundError):
            reason = "it is a link that leads nowhere"
        raise self.damaged(name, printable(reason[:1].lower() + reason[1:], 200)) from error


@contextmanager
def _named_in_utf8(path: Path) -> Iterator[str]:
    """The name of a file for a library that takes no other than UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        number = os.open(path, os.O_RDONLY)
        try:
            yield f"/dev/fd/{number}"
        finally:
            os.close(number)
    else:
        yield str(path)


def parse_json(data: bytes) -> Any:
    """JSON's values, all numbers finite.

    Raises:
        ValueError: no JSON, nested more than ``MAX_DEPTH`` deep, or with a number that nobody reads. One line.
    """
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"its values are nested more than {MAX_DEPTH} deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not JSON: it is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON, or cut short: {error.msg.lower()} (line {error.lineno})") from None
    except ValueError as error:
        raise ValueError(
            f"a number in it is not finite, or has too many digits ({printable(str(error), 80)})"
        ) from None
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        within = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [value for values in within for value in values]
        if not level:
            return content
    raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")


def _refuse_constant(constant: str) -> Never:
    raise ValueError(constant)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text[:40])
    return value


def decode_picture(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """A PNG's bytes, decoded as they are stored.

    size: (width, height) that it must have, pixels.

    Raises:
        ValueError: no whole PNG, too large, or of another size. One line.
    """
    try:
        with _no_warnings(), Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            width, height = picture.size
            if size is not None and (width, height) != size:
                raise _SizeError(f"it is {width} x {height} pixels large, and should be {size[0]} x {size[1]}")
            if width * height > MAX_PICTURE_PIXELS:
                raise _SizeError(f"it is too large ({width} x {height} pixels)")
            picture.load()
            return picture.copy()
    except MemoryError:
        raise
    except _SizeError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError("it is too large: its header says hundreds of millions of pixels") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise ValueError("it is no PNG, or cut short" if data else "it is empty") from error


class _SizeError(ValueError):
    """A picture of another size than it should have."""


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def listed(names: Collection[str], most: int = 3) -> str:
    """Some of the names, for a message."""
    shown = ", ".join(printable(name, 100) for name in sorted(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
