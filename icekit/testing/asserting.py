"""What checks of all kinds say: that things are the same, of the right form, or refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icekit.protocols import Backbone, InputError
from icekit.run.border import kind_of

ROUNDING = 1e-4
"""By what part of the largest number two results may differ that are computed in different orders."""
GREY_LEVELS = 2
"""By how much a pixel of two pictures may differ, of 255, that are to be the same picture."""


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_shape(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    assert tuple(value.shape) == shape, f"{what} has shape {list(value.shape)}, not {list(shape)}"
    assert value.dtype == torch.float32, f"{what} is {value.dtype}, not float32"
    assert bool(value.isfinite().all()), f"{what} has numbers that are not finite"


def assert_same(what: str, value: Tensor, expected: Tensor) -> None:
    """The same up to rounding."""
    assert value.shape == expected.shape, f"{what} has shape {list(value.shape)}, not {list(expected.shape)}"
    value, expected = value.detach(), expected.detach()
    off, size = float((value - expected).abs().max()), float(expected.abs().max())
    assert off <= ROUNDING * size, f"{what} is off by {off:.3g}, where the largest number is {size:.3g}"


def assert_differ(what: str, value: Tensor, other: Tensor) -> None:
    """Not the same, and not by rounding alone."""
    off, size = float((value - other).abs().max()), float(other.abs().max())
    assert off > ROUNDING * size, f"{what} are the same"


def assert_same_picture(what: str, picture: Image.Image, expected: Image.Image) -> None:
    assert picture.size == expected.size, f"{what}, is of size {picture.size}, not {expected.size}"
    off = np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int))
    found = f"off by up to {off.max()} of 255 grey levels, {off.mean():.2f} on average"
    assert off.max() <= GREY_LEVELS, f"{what}, is {found}"


def refused(what: str, call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """The message of the InputError that a call must raise."""
    try:
        call(*arguments, **named)
    except InputError as error:
        message = str(error)
        assert "\n" not in message, f"the message is longer than a line: {message!r}"
        return message
    except Exception as error:
        raise AssertionError(f"{what} is refused with a {type(error).__name__}, not an InputError: {error}") from error
    raise AssertionError(f"{what} is not refused")


def assert_mask(what: str, mask: object, size: tuple[int, int]) -> None:
    """A mask of a picture of this (height, width)."""
    right = f"a bool tensor {list(size)} on the CPU"
    assert isinstance(mask, Tensor), f"{what} is {kind_of(mask)}; it should be {right}"
    assert mask.dtype == torch.bool and tuple(mask.shape) == size and mask.device.type == "cpu", (
        f"{what} is {kind_of(mask)}; it should be {right}"
    )


def assert_text(what: str, value: object) -> None:
    """A text with something in it."""
    assert isinstance(value, str) and value.strip(), f"{what} is {kind_of(value)}; it should be text, not empty"


def assert_number(what: str, value: object) -> None:
    """A finite number of Python's."""
    assert isinstance(value, float | int) and not isinstance(value, bool), (
        f"{what} is {kind_of(value)}; it should be a float"
    )
    assert math.isfinite(value), f"{what} is {value}; it should be a finite number"


@contextmanager
def other_random_numbers(seed: int) -> Iterator[None]:
    """Other numbers from the generators of the whole process, for the length of the block."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def trace_of(backbone: Backbone) -> Tensor:
    """Numbers that tell whether a backbone is as it was: a prediction and the points of two texts."""
    latents = torch.randn(1, *backbone.latent_shape, generator=generator_of(0)).to(backbone.device)
    shares = torch.tensor([0.5], device=backbone.device)
    with torch.no_grad():
        output = backbone.predict(latents, shares, backbone.encode_prompts(["a photo of a ball"])).output
        texts = backbone.embed_texts(["a red ball", "ball"])
    return torch.cat([output.flatten(), texts.flatten()]).float().cpu()


def assert_backbone_unchanged(backbone: Backbone, before: Tensor, after_what: str) -> None:
    """A backbone's trace is what it was, bit for bit."""
    assert torch.equal(trace_of(backbone), before), (
        f"after {after_what} the backbone predicts otherwise than before: calls must leave nothing behind in it"
    )
