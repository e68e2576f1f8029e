"""What tests of learners share: two regions, a checkpoint in memory, and a kill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from icekit.protocols import Region


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


class Memory:
    """A checkpoint in memory."""

    def __init__(self) -> None:
        self.held: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.saves = 0

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.held

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.held = ({name: tensor.clone() for name, tensor in tensors.items()}, dict(state))
        self.saves += 1


def two_regions() -> list[Region]:
    """A cup and a metal ball in an image of 128 pixels."""
    left, right = torch.zeros(2, 128, 128, dtype=torch.bool)
    left[20:100, 10:60] = True
    right[60:120, 70:120] = True
    return [Region(0, "cup", 0.3, left), Region(1, "metal ball", 0.2, right)]


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
