"""A low-rank adapter (LoRA; Hu et al., ICLR 2022) on a noise predictor's attention, while it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from icekit.protocols import InputError

ADAPTER = "icekit"
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of every attention layer, which is what diffusers' own LoRA training adapts."""


@contextmanager
def lora_adapter(
    module: nn.Module,
    rank: int,
    generator: torch.Generator,
    targets: Sequence[str] = ATTENTION_PROJECTIONS,
    folder: str = "unet",
) -> Iterator[dict[str, nn.Parameter]]:
    """Put an adapter on a noise predictor's linear layers, W + B A with A ``[rank, in]`` and B ``[out, rank]``.

    B starts at zero, so that the predictor starts unchanged; A is drawn from ``generator``. The scale is one (alpha =
    rank), which is what a LoRA file without alphas is read with. When the block ends the predictor is as it was before.

    Args:
        module: the noise predictor.
        rank: of A and B.
        generator: draws A.
        targets: the ends of the names of the layers that are changed.
        folder: what the family's pipeline calls the noise predictor: the keys' first part.

    Yields:
        The adapter's weights by diffusers' key (``unet.down_blocks. ... .to_q.lora_A.weight``), float32, to be trained.

    Raises:
        InputError: the noise predictor is not a diffusers model.
    """
    if not hasattr(module, "add_adapter"):
        raise InputError(
            f"the weights of {type(module).__name__} cannot be trained: only diffusers' models take a LoRA adapter"
        )
    from peft import LoraConfig

    model = cast(Any, module)  # diffusers' mixin, which nn.Module does not know of
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), ADAPTER)
    try:
        weights = {
            f"{folder}.{name.replace(f'.{ADAPTER}.', '.')}": parameter
            for name, parameter in module.named_parameters()
            if f".{ADAPTER}." in name
        }
        for name, parameter in weights.items():
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])  # peft's own default, Kaiming with a = sqrt(5)
                drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                parameter.data = drawn.to(parameter.device)
            else:
                parameter.data = torch.zeros(parameter.shape, device=parameter.device)
        yield weights
    finally:
        model.unload_lora()
