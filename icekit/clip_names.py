"""How a setting names a CLIP model and its weights. Quick to import, unlike ``icekit.clip``, which loads them."""

from __future__ import annotations

from typing import Annotated

from icekit.paths import stored_place
from icekit.protocols.strict import Stored


def _stored_model(model: str) -> str:
    place = stored_place(model)
    if place == model or model.startswith("local-dir:") or "/" in model:
        return place
    import open_clip  # here, for it takes seconds: a folder of this name is here, and it may be an architecture's

    return model if model in open_clip.list_models() else place


def _stored_weights(pretrained: str) -> str:
    return stored_place(pretrained) if pretrained.endswith(".safetensors") else pretrained


ClipName = Annotated[str, Stored(_stored_model)]
"""The type of a setting that ``load_clip`` takes as its model: a folder is kept as where it is on this machine."""
ClipWeights = Annotated[str, Stored(_stored_weights)]
"""The type of a setting that ``load_clip`` takes as its weights: likewise a file."""
