"""The weights of a model in one file, ``model.safetensors`` in the layout that it was trained with: read offline.

Such a file has weights alone. The configurations and tokenizers that belong to them are in its layout, see
``file_layouts``; CLIP's tokenizer is made of the vocabulary that open_clip carries. diffusers converts the weights'
names.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icekit.backbones.file_layouts import Layout, shapes_in, unpack
from icekit.protocols import InputError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SAYS_V, SAYS_ZERO = "v_pred", "ztsnr"
"""Tensors without a meaning of their own: the model predicts v; its schedule ends at noise alone."""
MERGES = 49152 - 256 - 2
"""CLIP's vocabulary is the bytes, within a word and at its end, so many merges, and two tokens for start and end."""


def check_whole(file: Path, layout: Layout, parts: Collection[str], named: str) -> None:
    """Whether a file has as many numbers as each of these parts has weights. It may have more: copies, statistics.

    Raises:
        InputError: it has fewer.
    """
    shapes = shapes_in(file, named)
    names = layout.names_in(shapes)
    for part in parts:
        configuration = layout.files[f"{part}/config.json"]
        with torch.device("meta"):  # without memory
            library, kind = _kind_of(layout, part)
            if library == "diffusers":
                model = kind.from_config(configuration)
            else:
                model = kind(kind.config_class(**configuration))
        filled = layout.filled.get(part, ())
        state = model.state_dict(keep_vars=True)
        once = {id(weight): weight.numel() for name, weight in state.items() if name not in filled}
        wanted = sum(once.values())
        found = sum(math.prod(shapes[name]) for name in names[part].values())
        if found < wanted:
            raise InputError(
                f"{named}: the file has not all weights of its {part}: {found:,} numbers of {wanted:,}; it is cut down "
                "or of another size"
            )


def _kind_of(layout: Layout, part: str) -> tuple[str, Any]:
    """The library of a part, and its class there."""
    import diffusers
    import transformers

    library, name = layout.index[part]
    return library, getattr(diffusers if library == "diffusers" else transformers, name)


def load_from_file(file: Path, layout: Layout, part: str, folder: Path, dtype: torch.dtype) -> Any:
    """One part of a model, with its weights out of the file.

    Args:
        file: a safetensors file of this layout.
        layout: of it.
        part: of the pipeline.
        folder: where ``write_configurations`` wrote the layout.
        dtype: the number format of its weights.

    Raises:
        InputError: some of its weights are not in the file.
        Exception: what the libraries raise.
    """
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model
    from safetensors import safe_open

    library, kind = _kind_of(layout, part)
    # diffusers tells text encoders apart by what else is in the file.
    beside = [one for one in layout.parts if layout.index[one][0] == library] if library == "transformers" else [part]
    with safe_open(file, "pt") as tensors:
        found = layout.names_in(list(tensors.keys()))
        weights = {read: tensors.get_tensor(name) for one in beside for read, name in found.get(one, {}).items()}
    model: Any = load_single_file_sub_model(
        library_name=library,
        class_name=kind.__name__,
        name=part,
        checkpoint=weights,
        pipelines=pipelines,
        is_pipeline_module=False,
        cached_model_config_path=str(folder),
        local_files_only=True,
        torch_dtype=dtype,
    )
    if library == "transformers":
        model.tie_weights()  # a table that is used in two places is in the file once
    missing = sorted(name for name, weight in model.state_dict().items() if weight.is_meta)
    if missing:
        raise InputError(
            f"{len(missing)} of its weights are not in the file ({missing[0]}{', ...' * (len(missing) > 1)})"
        )
    return model


def write_configurations(layout: Layout, file: Path, folder: Path) -> bool:
    """Write a layout in diffusers' format. Returns whether it is known what the file's noise predictor returns."""
    from safetensors import safe_open

    with safe_open(file, "np") as tensors:
        marks = {SAYS_V, SAYS_ZERO} & set(tensors.keys())
    for path, content in layout.files.items():
        if path.startswith("scheduler/"):
            content = {**content, **({"prediction_type": "v_prediction"} if SAYS_V in marks else {})}
            zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            content = {**content, **(zero if SAYS_ZERO in marks else {})}
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    for part, padding in layout.padding.items():
        clip_tokenizer(padding).save_pretrained(folder / part)
    unpack(layout, folder)
    return SAYS_V in marks or layout.tells_prediction


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
