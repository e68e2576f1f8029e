"""Models beside the backbone that a process needs again and again: loaded once where somebody says so.

A run lets go of CLIP when its words are found, for learning needs the memory. A worker of a batch, which has the next
picture to look at, keeps it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

Model = TypeVar("Model")
_kept: dict[Hashable, Any] | None = None


@contextlib.contextmanager
def kept_loaded() -> Iterator[None]:
    """Within the block what was loaded by ``loaded`` is kept."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def loaded(key: Hashable, load: Callable[[], Model]) -> Model:
    """A frozen model: the one that was loaded before with this key, where it was kept, or else a new one.

    key: all that the model depends on, its device among it, and what kind of model it is.
    """
    if _kept is None:
        return load()
    if key not in _kept:
        _kept[key] = load()
    model: Model = _kept[key]
    return model
