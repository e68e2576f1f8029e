"""What a model in one file looks like: the names of its tensors, and all that belongs to it and is no weight.

A layout is a JSON file that ships with a family's backbone: its settings name it, as a place inside a package. So a
plugin brings those of its families. Quick to import: without torch.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icekit.model_files import one_line
from icekit.paths import package_path
from icekit.protocols import InputError

PREDICTOR = "model.diffusion_model."
"""How the names of a noise predictor's weights begin, where other parts are in the file, too."""
ADAPTERS = ("lora_unet_", "lora_te", ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")
QUANTISED = (".scale_weight", ".weight_scale", "scaled_fp8", ".comfy_quant", ".absmax", ".quant_map", "bitsandbytes__")
"""Parts of the names of what belongs to quantised weights."""


@dataclass(frozen=True)
class Layout:
    """One kind of file.

    model: what people call its models.
    input: name, axis and size of the tensor whose size there is the channels that the noise predictor takes.
    marks: beginnings of names, for each of which a file of this kind has a tensor.
    parts: part of the pipeline -> how the names of its weights begin; the first as diffusers reads it, others as it is
        written, too. "" is a noise predictor that is alone in its file.
    files: configurations by their path in diffusers' format.
    padding: tokenizer of CLIP -> the token that it pads with.
    packed: path in diffusers' format -> a gzipped file of this content.
    filled: part -> its weights that need not be in the file, because diffusers knows them.
    tells_prediction: whether the configurations say what the noise predictor returns.
    """

    model: str
    input: tuple[str, int, int]
    marks: tuple[str, ...]
    parts: Mapping[str, Sequence[str]]
    files: Mapping[str, Mapping[str, Any]]
    padding: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, Path] = field(default_factory=dict)
    filled: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tells_prediction: bool = True

    @property
    def index(self) -> Mapping[str, Any]:
        """Its ``model_index.json``."""
        return self.files["model_index.json"]

    @property
    def pipeline(self) -> str:
        """The pipeline in diffusers that its models are of."""
        name: str = self.index["_class_name"]
        return name

    @property
    def prefixes(self) -> dict[str, str]:
        """How names begin -> the part, the longest first."""
        pairs = [(begins, part) for part, all_ in self.parts.items() for begins in all_]
        return dict(sorted(pairs, key=lambda pair: -len(pair[0])))

    def place_of(self, name: str) -> tuple[str, str] | None:
        """The part that a tensor belongs to, and its name as diffusers reads it; None for what belongs to none."""
        for begins, part in self.prefixes.items():
            if name.startswith(begins):
                return part, self.parts[part][0] + name.removeprefix(begins)
        return None

    def names_in(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Part -> the names of its tensors, as diffusers reads them -> as they are in the file."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            place = self.place_of(name)
            if place is not None:
                part, read = place
                found.setdefault(part, {})[read] = name
        return found


def read_layout(place: str) -> Layout:
    """A layout.

    place: ``package:NAME/FILE.json``. With ``"like": "OTHER.json"`` it says what differs from another beside it.

    Raises:
        InputError: there is no such file.
    """
    file = Path(package_path(place, "layouts"))
    raw = _read(file)
    return Layout(
        raw["model"],
        (raw["input"]["tensor"], raw["input"]["axis"], raw["input"]["channels"]),
        tuple(raw["marks"]),
        raw["parts"],
        raw["files"],
        raw.get("padding", {}),
        {path: file.with_name(name) for path, name in raw.get("packed", {}).items()},
        raw.get("filled", {}),
        raw.get("tells_prediction", True),
    )


def _read(file: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "like" not in raw:
        return raw
    base = _read(file.with_name(raw.pop("like")))
    changed = {path: {**base["files"].get(path, {}), **content} for path, content in raw.pop("files", {}).items()}
    return {**base, **raw, "files": {**base["files"], **changed}}


def shapes_in(file: Path, named: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a safetensors file, by its header.

    Raises:
        InputError: it cannot be read as one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in list(tensors.keys())}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{named}: it cannot be read as a safetensors file: {one_line(error)}") from error


def layout_of(file: Path, places: Sequence[str], named: str) -> Layout:
    """The layout that a file has; of several that fit, the one with the most marks.

    Args:
        file: a safetensors file.
        places: of layouts, see ``read_layout``.
        named: how messages begin.

    Raises:
        InputError: it is no whole text-to-image model in one of these layouts.
    """
    shapes = shapes_in(file, named)
    if not places:
        raise InputError(
            f"{named}: models in one file are not read for this family: give a folder in diffusers' format, or an id "
            "of the hub"
        )
    layouts = sorted((read_layout(place) for place in places), key=lambda one: -len(one.marks))
    known = list(dict.fromkeys(one.model for one in sorted(layouts, key=lambda one: one.model)))
    whole = f"a whole model of {' or '.join((', '.join(known[:-1]), known[-1])) if known[1:] else ''.join(known)}"
    if any(part in name for name in shapes for part in ADAPTERS):
        raise InputError(f"{named}: the file is a LoRA adapter, not {whole} in one file")
    if any(part in name for name in shapes for part in QUANTISED):
        raise InputError(
            f"{named}: its weights are quantised, which is not supported; take the model with plain ones (float32, "
            "float16, bfloat16 or float8)"
        )
    alone = ""
    for layout in layouts:
        names = {read: name for part in layout.names_in(shapes).values() for read, name in part.items()}
        tensor, axis, channels = layout.input
        missing = [mark for mark in layout.marks if not any(name.startswith(mark) for name in names)]
        there = tensor in names or tensor.removeprefix(PREDICTOR) in shapes
        if there and missing and not any(mark.startswith(PREDICTOR) for mark in missing):
            alone = " (its noise predictor is there, its text encoder is not)"
        if tensor not in names or missing:
            continue
        shape = shapes[names[tensor]]
        if axis >= len(shape):
            continue
        if shape[axis] != channels:
            raise InputError(
                f"{named}: its noise predictor takes {shape[axis]} channels (an inpainting or editing model?), a "
                f"text-to-image model of {layout.model} takes {channels}"
            )
        return layout
    raise InputError(f"{named}: the file is not {whole} in one file{alone}")


def unpack(layout: Layout, folder: Path) -> None:
    """Write what is packed in a layout."""
    for path, packed in layout.packed.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(gzip.decompress(packed.read_bytes()))
