"""A small rendered world of objects on a table, with exact captions and masks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icekit_tabletop.render import Scene, render_scene
    from icekit_tabletop.weights import clip_dir, model_dir
    from icekit_tabletop.world import ObjectSpec

# Imported when first used: the renderer needs torch, and `icekit --help` imports this package for its command.
_HOMES = {
    "ObjectSpec": "world",
    "Scene": "render",
    "clip_dir": "weights",
    "model_dir": "weights",
    "render_scene": "render",
}

__all__ = ["ObjectSpec", "Scene", "clip_dir", "model_dir", "render_scene"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'icekit_tabletop' has no attribute {name!r}")
    return getattr(import_module(f"icekit_tabletop.{_HOMES[name]}"), name)
