"""A noise predictor whose weights are trained for a while, by a LoRA adapter or as a whole, and then put back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from icekit.backbones.lora import ATTENTION_PROJECTIONS, lora_adapter
from icekit.protocols import FineTuning, Trained, Tuned


@contextmanager
def fine_tuned(
    module: nn.Module,
    trained: Trained,
    rank: int,
    generator: torch.Generator,
    *,
    targets: Sequence[str] = ATTENTION_PROJECTIONS,
    folder: str = "unet",
) -> Iterator[Tuned]:
    """Make a noise predictor trainable; when the block ends it is as it was before, bit for bit.

    Args:
        module: the noise predictor.
        trained: what is to be trained.
        rank: of the LoRA adapter, see ``lora_adapter``.
        generator: draws the adapter's first weights.
        targets: the ends of the names of the linear layers that the adapter changes.
        folder: what the family's pipeline calls the noise predictor.

    Raises:
        InputError: a LoRA adapter is asked for, and the noise predictor is not a diffusers model.
    """
    if trained == "lora":
        with lora_adapter(module, rank, generator, targets, folder) as adapter:

            def kept() -> FineTuning:
                lora = {name: weight.detach().float().cpu().clone() for name, weight in adapter.items()}
                return FineTuning(lora=lora, folder=folder)

            yield Tuned(adapter, kept)
    else:
        with whole_weights(module) as parameters:
            yield Tuned(
                parameters,
                lambda: FineTuning(
                    weights=half_precision(module.state_dict()), weights_config=configuration(module), folder=folder
                ),
            )


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """All of a model's parameters, to be trained in place; when the block ends they are what they were before.

    For the length of the block they are float32, whatever the model's own type: a step of 2e-6 is lost in the rounding
    of half precision. The parameters stay the same objects.

    Yields:
        The parameters by their key in ``model.state_dict()``.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.data = parameter.data.to(torch.float32, copy=True)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = before[name]


@contextmanager
def replaced_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights for the length of the block, in its own type and on its own device.

    weights: all of ``model.state_dict()``, by its keys.

    Raises:
        ValueError: other keys or shapes than the model's.
    """
    own = model.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in weights.items()}:
        raise ValueError("these are the weights of another model")
    # The state's tensors share the model's memory: putting them back is exact, and costs nothing.
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    try:
        for name, value in own.items():
            held[name].data = weights[name].to(value.device, value.dtype, copy=True)
        yield
    finally:
        for name, value in own.items():
            held[name].data = value


def half_precision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, floating point numbers as float16: what a run keeps of fine-tuned weights."""
    return {
        name: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype, copy=True)
        for name, value in state.items()
    }


def configuration(model: nn.Module) -> dict[str, Any]:
    """What diffusers writes into ``config.json`` beside a model's weights; empty for a model that is not diffusers'."""
    to_json = getattr(model, "to_json_string", None)
    return json.loads(to_json()) if to_json else {}
