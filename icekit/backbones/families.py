"""Which family of models a model is of, by what it says of itself; no weights are read for it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from icekit.backbones.file_layouts import PREDICTOR, layout_of, shapes_in
from icekit.model_files import HUB_ID, INDEX, Hub, read_json, ways_out
from icekit.paths import resolved_path
from icekit.protocols import InputError


def pipeline_of(
    model: str, revision: str | None = None, local_files_only: bool = False, layouts: Sequence[str] = ()
) -> str | None:
    """The name of the diffusers pipeline that a model was saved as, ``"StableDiffusionXLPipeline"`` say.

    Args:
        model: a folder, a .safetensors file, or the id of a hub model, whose index is fetched.
        revision: branch, tag or commit of a hub model.
        local_files_only: use the hub's cache alone.
        layouts: those that a file can have, see ``file_layouts``.

    Returns:
        None where there is no such model, or where it does not say so: whoever loads it says what is wrong.

    Raises:
        InputError: its index is damaged or names code; the hub does not give it; a file is no whole model.
    """
    named = f"backbone.model = {model!r}"
    place = resolved_path(model, "backbone.model")
    if place.is_file():
        if place.suffix.lower() != ".safetensors":
            return None
        return _pipeline_of_file(place, layouts, named)
    if place.is_dir():
        index = place / INDEX
        if not index.exists():
            return None
    elif HUB_ID.fullmatch(model) and "/" in model:
        what = f"{named}: there is no such folder or file, and"
        index = Hub(model, INDEX, what, ways_out(), revision=revision, local_files_only=local_files_only).first
    else:
        return None
    kind = read_json(index, named).get("_class_name")
    return kind if isinstance(kind, str) else None


def _pipeline_of_file(file: Path, layouts: Sequence[str], named: str) -> str:
    """By its layout; or, where no backbone here reads such files, by what is known of plugins that do."""
    try:
        return layout_of(file, layouts, named).pipeline
    except InputError:
        names = [name.removeprefix(PREDICTOR) for name in shapes_in(file, named)]
        for families in _known().values():
            for pipeline, marks in families.items():
                if marks and all(any(name.startswith(mark) for name in names) for mark in marks):
                    return pipeline
        raise


def plugin_for(pipeline: str) -> str | None:
    """The distribution to install for models of a diffusers pipeline, where one is known."""
    return next((plugin for plugin, families in _known().items() if pipeline in families), None)


@cache
def _known() -> dict[str, dict[str, list[str]]]:
    """``known_families.toml``."""
    text = files("icekit.backbones").joinpath("known_families.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
