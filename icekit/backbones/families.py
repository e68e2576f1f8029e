"""Which family of models a model is of, by what it says of itself; no weights are read for it."""

from __future__ import annotations

from icekit.model_files import HUB_ID, Hub, read_json
from icekit.paths import resolved_path

INDEX = "model_index.json"
WAYS_OUT = (
    "give a folder in diffusers' format, a .safetensors file, or the owner/name of a model that was downloaded before "
    "(backbone.local_files_only=true, or HF_HUB_OFFLINE=1 in the environment, then uses the cache alone)"
)


def pipeline_of(model: str, revision: str | None = None, local_files_only: bool = False) -> str | None:
    """The name of the diffusers pipeline that a model was saved as, ``"StableDiffusionXLPipeline"`` say.

    Args:
        model: a folder, a .safetensors file, or the id of a hub model, whose index is fetched.
        revision: branch, tag or commit of a hub model.
        local_files_only: use the hub's cache alone.

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
        from icekit.backbones.single_file import PIPELINES, layout_of

        return PIPELINES[layout_of(place, named)]
    if place.is_dir():
        index = place / INDEX
        if not index.exists():
            return None
    elif HUB_ID.fullmatch(model) and "/" in model:
        what = f"{named}: there is no such folder or file, and"
        index = Hub(model, INDEX, what, WAYS_OUT, revision=revision, local_files_only=local_files_only).first
    else:
        return None
    kind = read_json(index, named).get("_class_name")
    return kind if isinstance(kind, str) else None
