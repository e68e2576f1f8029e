"""A model in one file, ``model.safetensors`` in the layout of the programs that it was trained with: read offline.

Such a file has weights alone. The configurations that belong to them are in ``layouts`` (as published with Stable
Diffusion 1.5, 2.1 and XL), and CLIP's tokenizer is made of the vocabulary that open_clip carries. diffusers converts
the weights' names.
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icekit.backbones.common import quiet
from icekit.model_files import one_line
from icekit.protocols import InputError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from icekit.backbones.loading import Family

UNET = "model.diffusion_model."
CHANNELS = f"{UNET}input_blocks.0.0.weight"
MARKS = {
    "sdxl": "conditioner.embedders.1.model.",
    "sd2": "cond_stage_model.model.",
    "sd1": "cond_stage_model.transformer.",
}
"""How the names of a text encoder's weights begin, by layout."""
PLACES = {
    "sd1": {"text_encoder": "cond_stage_model."},
    "sd2": {"text_encoder": "cond_stage_model."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
}
"""How the names of each part's weights begin, beside those of the noise predictor and the autoencoder."""
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
"""The pipeline in diffusers that a layout is one of."""
SAYS_V, SAYS_ZERO = "v_pred", "ztsnr"
"""Tensors without a meaning of their own: the model predicts v; its schedule ends at noise alone."""
ADAPTERS = ("lora_unet_", "lora_te", ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")
MERGES = 49152 - 256 - 2
"""CLIP's vocabulary is the bytes, within a word and at its end, so many merges, and two tokens for start and end."""


def layout_of(file: Path, named: str) -> str:
    """Which of ``MARKS`` a file is of, by the names of its tensors.

    Raises:
        InputError: it is no whole text-to-image model of these families.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            channels = tensors.get_slice(CHANNELS).get_shape()[1] if CHANNELS in names else None
    except (OSError, SafetensorError, IndexError) as error:
        raise InputError(f"{named}: it cannot be read as a safetensors file: {one_line(error)}") from error
    known = "a whole model of Stable Diffusion 1.x, 2.x or XL in one file"
    if any(part in name for name in names for part in ADAPTERS):
        raise InputError(f"{named}: the file is a LoRA adapter, not {known}")
    found = [one for one, mark in MARKS.items() if any(name.startswith(mark) for name in names)]
    if channels is None or not found:
        part = " (its noise predictor is there, its text encoder is not)" if channels is not None else ""
        raise InputError(f"{named}: the file is not {known}{part}")
    if channels != 4:
        raise InputError(
            f"{named}: its noise predictor takes {channels} channels (an inpainting or editing model?), a "
            "text-to-image model takes 4"
        )
    return found[0]


def read_layout(name: str) -> dict[str, Any]:
    """A layout: "files", configurations by their path in diffusers' format; "padding", of each tokenizer."""
    text = files("icekit.backbones").joinpath("layouts", f"{name}.json").read_text(encoding="utf-8")
    layout: dict[str, Any] = json.loads(text)
    return layout


def load_single_file(file: Path, family: Family, named: str) -> tuple[Any, bool]:
    """Read a model of this family from one safetensors file; nothing is fetched, nothing is run.

    Returns:
        Its diffusers pipeline, and whether what its noise predictor returns is known: of Stable Diffusion 2.x there are
        models that predict noise and such that predict v, and their files do not say which they are.

    Raises:
        InputError: no such model, one of another family, or a file that is damaged or has weights missing.
    """
    import diffusers

    name = layout_of(file, named)
    if PIPELINES[name] != family.pipeline:
        raise InputError(f"{named}: it is made for {PIPELINES[name]}; supported is {family.pipeline} ({family.name})")
    layout = read_layout(name)
    _check_whole(file, name, layout["files"], family, named)
    with tempfile.TemporaryDirectory(prefix="icekit-") as place, quiet():
        says = _write_configurations(layout, file, Path(place))
        try:
            pipeline = getattr(diffusers, family.pipeline).from_single_file(
                str(file), config=place, local_files_only=True, torch_dtype=torch.float32, **family.options
            )
        except MemoryError:
            raise
        except Exception as error:  # diffusers, transformers, torch: each fails in its own way
            raise InputError(
                f"{named}: its weights cannot be read as those of {family.name}: {one_line(error)}"
            ) from error
    pipeline.register_to_config(_name_or_path=None)
    return pipeline, says or name != "sd2"


def _check_whole(file: Path, name: str, files: Mapping[str, Any], family: Family, named: str) -> None:
    """Whether a file has as many numbers as each part of the model has weights. It may have more: copies, statistics.

    Raises:
        InputError: it has fewer.
    """
    import diffusers
    import transformers
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        counts = {key: math.prod(tensors.get_slice(key).get_shape()) for key in list(tensors.keys())}
    for part, begins in {"unet": UNET, "vae": "first_stage_model.", **PLACES[name]}.items():
        library, (kind, *_) = family.parts[part]
        configuration = files[f"{part}/config.json"]
        with torch.device("meta"):  # without memory
            model: Any
            if library == "diffusers":
                model = getattr(diffusers, kind).from_config(configuration)
            else:
                model = getattr(transformers, kind)(transformers.CLIPTextConfig(**configuration))
        wanted = sum(weight.numel() for weight in model.parameters())
        found = sum(count for key, count in counts.items() if key.startswith(begins))
        if found < wanted:
            raise InputError(
                f"{named}: the file has not all weights of its {part}: {found:,} numbers of {wanted:,}; it is cut down "
                "or of another size"
            )


def _write_configurations(layout: Mapping[str, Any], file: Path, place: Path) -> bool:
    """Write a layout in diffusers' format. Returns whether the file says what its noise predictor returns."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        marks = {SAYS_V, SAYS_ZERO} & set(tensors.keys())
    for path, content in layout["files"].items():
        if path.startswith("scheduler/"):
            content = content | ({"prediction_type": "v_prediction"} if SAYS_V in marks else {})
            zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            content = content | (zero if SAYS_ZERO in marks else {})
        (place / path).parent.mkdir(exist_ok=True)
        (place / path).write_text(json.dumps(content), encoding="utf-8")
    for part, padding in layout["padding"].items():
        clip_tokenizer(padding).save_pretrained(place / part)
    return SAYS_V in marks


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """The tokenizer of every published CLIP text encoder (Radford et al., 2021), which pads with this token."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=padding, model_max_length=77)


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their ids, and its merges in their order."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe()) as packed:
        lines = packed.read().decode("utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines[1 : 1 + MERGES]]
    merges = [(first, second) for first, second in pairs]
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(one + "</w>" for one in alphabet), *(first + second for first, second in merges)]
    return {token: place for place, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges
