"""Files that are whole or not there: written under a temporary name first, then renamed."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either there as a whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_tensors_atomically(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file as ``write_atomically`` does, tensor by tensor: its bytes are never all in memory."""
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
    folder.mkdir(parents=True, exist_ok=True)
    try:
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
    """Write JSON as ``write_atomically`` does.

    Raises:
        ValueError: a number in it is NaN or infinite: JSON has no word for these.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _temporary(path: Path) -> Path:
    """Where a file is written first: a name of this process's, for two may write the same file."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")
