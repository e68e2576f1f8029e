"""What a model will need of a device's memory, before it is loaded: its weights are counted, the rest is known.

Quick to import: without torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from icekit.paths import resolved_path
from icekit.protocols import MemoryNeed

GIB = 2**30
BESIDE = GIB
"""What else is on the device: the retriever's CLIP (0.6 GiB for ViT-B/32 in float32), learned rows, kernels' own."""
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Measured:
    """What a family needs beside its weights, GiB for a million pixels of one picture. See ``docs/memory.md``.

    learning: what a step of learning holds of one picture, its noise predictor in a format of 16 bits; twice that in
        float32. checkpointed: the same with gradient checkpointing.
    drawing: what the noise predictor needs to draw one picture, likewise.
    decoding: what the autoencoder needs, in float32, for one picture.
    source: where and when it was measured, or counted by shapes.
    """

    learning: float
    checkpointed: float
    drawing: float
    decoding: float
    source: str


WEIGHTS_ALONE = Measured(0, 0, 0, 0, "not measured: weights alone are counted")


class MemorySettings(Protocol):
    """The settings of a backbone that memory depends on."""

    @property
    def images_at_once(self) -> int: ...

    @property
    def gradient_checkpointing(self) -> bool: ...

    @property
    def low_memory(self) -> str: ...


def memory_need(
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    predictor: str,
    settings: MemorySettings,
    measured: Measured,
    *,
    pixels: int,
    pictures: int,
    in_turn: bool,
) -> MemoryNeed:
    """What a device must have free for a model.

    Args:
        counts: part of the pipeline -> number of its weights.
        sizes: part -> bytes of one weight.
        predictor: the noise predictor among them; ``vae`` is the autoencoder, all others read prompts.
        settings: of the backbone.
        measured: of its family.
        pixels: of a picture.
        pictures: how many are in one pass of a learning step.
        in_turn: whether the device holds the part in use alone.
    """
    weights = {part: count * sizes[part] for part, count in counts.items()}
    own, autoencoder = weights.get(predictor, 0), weights.get("vae", 0)
    texts = sum(weights.values()) - own - autoencoder
    million = GIB * pixels / 1e6
    wide = sizes.get(predictor, 4) / 2
    twice = settings.gradient_checkpointing or settings.low_memory == "on"
    kept = measured.checkpointed if twice else measured.learning
    step = pictures * million * kept * wide
    drawing, decoding = (
        settings.images_at_once * million * one for one in (measured.drawing * wide, measured.decoding)
    )
    decoding = million * measured.decoding if in_turn else decoding
    if in_turn:
        held = max(texts, own, autoencoder)
        learning = max(texts + own + step, autoencoder + decoding)
        drawn = max(texts, own + drawing, autoencoder + decoding)
    else:
        held = texts + own + autoencoder
        learning, drawn = held + max(step, decoding), held + max(drawing, decoding)
    return MemoryNeed(held + BESIDE, round(learning) + BESIDE, round(drawn) + BESIDE)


# --- Counting --------------------------------------------------------------------------------------------------------


def place_of(model: str, revision: str | None) -> Path | None:
    """Where a model is on this machine, its folder or its file; None where it is not, or not yet.

    Args:
        model: a folder, a file, or the id of a hub model; see ``backbone.model``.
        revision: of a hub model.
    """
    place = resolved_path(model, "backbone.model")
    if place.exists():
        return place
    from huggingface_hub import try_to_load_from_cache

    from icekit.model_files import HUB_ID

    if not HUB_ID.fullmatch(model):
        return None

    index = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def weights_in(place: Path, prefixes: Mapping[str, str] = MappingProxyType({})) -> dict[str, int]:
    """The number of weights of each part of a model, by its files' headers.

    Args:
        place: a folder in diffusers' format, or a .safetensors file.
        prefixes: in a file, how the names of a part's weights begin -> the part; others are passed over.
    """
    counts: dict[str, int] = {}
    if place.is_file():
        for name, count in tensors_of(place).items():
            part = next((part for begins, part in prefixes.items() if name.startswith(begins)), None)
            if part is not None:
                counts[part] = counts.get(part, 0) + count
        return counts
    for folder in sorted(one for one in place.iterdir() if one.is_dir()):
        files = sorted(folder.glob("*.safetensors"))
        plain = [file for file in files if ".fp16" not in file.name and ".bf16" not in file.name] or files
        tensors = [count for file in plain for count in tensors_of(file).values()]
        if tensors:
            counts[folder.name] = sum(tensors)
    return counts


def tensors_of(file: Path) -> dict[str, int]:
    """The tensors of a safetensors file and how many numbers each has; nothing for a damaged one."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: Any = json.loads(stream.read(min(length, LONGEST_HEADER)))
        return {name: math.prod(one["shape"]) for name, one in header.items() if "shape" in one}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}
