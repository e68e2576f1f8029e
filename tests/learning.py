"""What tests of learners share: two regions, a checkpoint in memory, and a kill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from icekit.protocols import Attribute, Backbone, Checkpoint, Learned, Learner, Region, Step


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


def noise_image() -> Tensor:
    """An image of 128 pixels that is the same each time: float32 ``[3, 128, 128]``."""
    return torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Taught:
    """What was learned with a backbone of one text encoder: each token's one row, and the rest of ``Learned``."""

    learned: Learned

    @property
    def tokens(self) -> dict[str, Tensor]:
        return rows_of(self.learned.tokens)

    @property
    def lora(self) -> Mapping[str, Tensor]:
        return self.learned.tuning.lora

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self.learned.tuning.weights

    @property
    def weights_config(self) -> Mapping[str, Any]:
        return self.learned.tuning.weights_config


def rows_of(tokens: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each token's row, of tokens with one."""
    rows = {}
    for name, token in tokens.items():
        [rows[name]] = token.values()
    return rows


def row_of(backbone: Backbone, word: str) -> Tensor:
    """A word's row, of a backbone with one text encoder."""
    [row] = backbone.word_rows(word).values()
    return row


def learn_watched(
    learner: Learner,
    regions: Sequence[Region],
    attributes: Sequence[Attribute],
    *,
    checkpoint: Checkpoint | None = None,
    kill_at: int | None = None,
    seed: int = 0,
) -> tuple[Taught, list[Step]]:
    """Learn from ``noise_image``: what was learned, and the steps that were reported. ``Killed`` after a step."""
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if step.step == kill_at:
            raise Killed

    learned = learner.learn(
        noise_image(), regions, attributes, seed=seed, checkpoint=checkpoint or Memory(), on_step=on_step
    )
    return Taught(learned), steps


def recorded_generation(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the backbone's ``generate`` from now on: prompts and options."""
    calls: list[dict[str, Any]] = []
    generate = backbone.generate

    def recorded(prompts: Sequence[str], **options: Any) -> Any:
        calls.append({"prompts": list(prompts)} | options)
        return generate(prompts, **options)

    monkeypatch.setattr(backbone, "generate", recorded)
    return calls
