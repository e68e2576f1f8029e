"""What takes minutes to compute and seconds to read: kept beside the other programs' caches, and never needed.

A cached tensor is found by a digest of all that it follows from, so that nothing has to be said invalid. The folder is
``icekit`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

_NAME = "values"

log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """The folder of icekit's cache, which need not be there; None where no place for it is known."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification passes over others
        return Path(given) / "icekit"
    try:
        return Path.home() / ".cache" / "icekit"
    except RuntimeError:
        return None


def digest_of(values: Iterable[Tensor | str]) -> str:
    """What tells these tensors (their values, shapes and types) and texts from all others: 64 hexadecimal digits."""
    import torch

    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            data, what = value.encode("utf-8", "surrogatepass"), "text"
        else:
            plain = value.detach().cpu().contiguous()
            data, what = plain.reshape(-1).view(torch.uint8).numpy().tobytes(), f"{plain.dtype} {list(plain.shape)}"
        digest.update(f"{what} {len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def cached(kind: str, digest: str, rows: int, compute: Callable[[], Tensor]) -> Tensor:
    """A float32 tensor ``[rows, D]`` from the cache, or computed now and kept.

    Where nothing can be kept it is computed each time. A file that is damaged, or of another shape, is passed over and
    replaced.

    kind: the folder within the cache. digest: of all that the tensor follows from, see ``digest_of``.
    """
    folder = cache_folder()
    if folder is None:
        return compute()
    file = folder / kind / f"{digest}.safetensors"
    found = _read(file, rows)
    if found is None:
        found = compute()
        with contextlib.suppress(OSError):  # a full disk, or a folder of somebody else's: a cache is no one's duty
            _write(file, found)
    return found


def _read(file: Path, rows: int) -> Tensor | None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            if tensors.get_slice(_NAME).get_shape()[:1] != [rows]:
                return None
            values: Tensor = tensors.get_tensor(_NAME)
    except (OSError, SafetensorError):
        return None
    fits = values.ndim == 2 and values.dtype == torch.float32 and bool(values.isfinite().all())
    return values if fits else None


def _write(file: Path, values: Tensor) -> None:
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as half_written:
            half_written.write(save({_NAME: values.contiguous()}))
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    log.info("kept %s", file)
