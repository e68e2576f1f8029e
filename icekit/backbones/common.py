"""What backbones of several families share."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from icekit.backbones.fine_tuning import replaced_weights
from icekit.model_files import check_finite
from icekit.protocols import FineTuning, InputError, Tokens

SAMPLED_ROWS = 64
BFLOAT16_SINCE = (8, 0)
"""Compute capability of the first NVIDIA cards (Ampere) that compute in bfloat16; AMD's that do say 9.0 and more."""


def predictor_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The number format of a noise predictor on a device, from the setting ``backbone.dtype``.

    ``"auto"`` is bfloat16 on a cuda card that computes in it, float16 on an older one and float32 elsewhere. bfloat16
    has float32's range: nothing overflows in it, as some layers do in float16.
    """
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        modern = torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE
        return torch.bfloat16 if modern else torch.float16
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def fingerprint(tables: Mapping[str, Tensor]) -> str:
    """What tokens depend on, as text: each encoder's name and shape, and a digest of rows spread over its table.

    Two models whose text encoders have the same table have the same fingerprint, wherever they lie on the disk and in
    whatever precision: the digest is of the signs of the numbers, which rounding leaves as they are.

    tables: name -> ``[vocabulary, D]``.
    """
    parts = []
    for name, table in sorted(tables.items()):
        every = max(1, len(table) // SAMPLED_ROWS)
        signs = table.detach()[::every].signbit().cpu().contiguous().numpy()
        parts.append(f"{name} {len(table)}x{table.shape[1]} {hashlib.sha256(signs.tobytes()).hexdigest()[:16]}")
    return ", ".join(parts)


def rows_for(encoder: str, tokens: Tokens) -> dict[str, Tensor]:
    """The tokens' rows for one text encoder.

    Raises:
        InputError: a token without such a row: it is another family's.
    """
    for name, token in tokens.items():
        if encoder not in token:
            raise InputError(f"token {name} has rows for {', '.join(token)}, and this model reads rows for {encoder}")
    return {name: token[encoder] for name, token in tokens.items()}


def to_pictures(images: Tensor) -> list[Image.Image]:
    """``[B, 3, H, W]`` in [0, 1] -> pictures.

    Raises:
        RunError: NaN or infinity, which would be black.
    """
    check_finite(images, "autoencoder's decoder", "the model is damaged, or its number format too narrow")
    return [Image.fromarray(one.numpy()) for one in (images * 255).round().byte().permute(0, 2, 3, 1).cpu()]


@contextmanager
def tuned_pipeline(pipeline: Any, module: nn.Module, tuning: FineTuning) -> Iterator[None]:
    """A pipeline with what a learner made of its noise predictor, for the length of the block.

    Raises:
        InputError: the adapter or the weights are of another model.
    """
    if tuning.weights:
        with ExitStack() as stack:
            try:
                stack.enter_context(replaced_weights(module, tuning.weights))
            except ValueError as error:
                raise InputError("the fine-tuned weights are of another model than this backbone's") from error
            yield
        return
    if not tuning.lora:
        yield
        return
    try:
        try:
            with quiet():
                pipeline.load_lora_weights(dict(tuning.lora))
        except (RuntimeError, ValueError) as error:
            raise InputError("the LoRA adapter was trained for another model than this backbone's") from error
        yield
    finally:
        pipeline.unload_lora_weights()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, notices and warnings of the model libraries while loading; downloads still show their bars."""
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging

    diffusers_bars = diffusers_logging.is_progress_bar_enabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    libraries = (diffusers_logging, transformers_logging, hub_logging)
    levels = [library.get_verbosity() for library in libraries]
    try:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        for library in libraries:
            library.set_verbosity_error()
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if diffusers_bars:
            diffusers_logging.enable_progress_bar()
        if transformers_bars:
            transformers_logging.enable_progress_bar()
