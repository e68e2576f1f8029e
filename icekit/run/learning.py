"""Stage two: the tokens of an image's concepts, learned by the settings' learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from icekit.protocols import (
    Attribute,
    Backbone,
    Checkpoint,
    Learned,
    Learner,
    Region,
    RunError,
    Step,
    parts_of,
    token_names,
)
from icekit.run.directory import WEIGHTS_FOLDERS
from icekit.settings import Settings


class NoCheckpoint:
    """Keeps nothing: for a learner that is not to be interrupted. See ``protocols.Checkpoint``."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Nothing."""
        return None

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


def learn(
    image: Tensor,
    regions: Sequence[Region],
    learner: Learner,
    backbone: Backbone,
    settings: Settings,
    *,
    attributes: Sequence[Attribute] = (),
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Learned:
    """Stage two: learn the tokens of all regions, and see that they can be used.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        regions: what stage one found.
        learner: the settings' learner.
        backbone: that of the learner.
        settings: the seed, and the learner's name for messages.
        attributes: one more token for each.
        checkpoint: where the learner keeps its state, and goes on from; None: nowhere.
        on_step: called after every step.

    Raises:
        RunError: a loss is no number, or a token is missing, of the wrong length or no number.
    """
    name = settings.name_of("learner")

    def checked_step(step: Step) -> None:
        for loss, value in step.losses.items():
            if not math.isfinite(value):
                raise RunError(f"learner {name!r}: the loss {loss!r} became {value} in step {step.step}")
        on_step(step)

    learned = learner.learn(
        image,
        regions,
        attributes,
        seed=settings.seed,
        checkpoint=checkpoint or NoCheckpoint(),
        on_step=checked_step,
    )
    if not isinstance(learned, Learned):
        raise RunError(f"learner {name!r} returned {type(learned).__name__}, expected icekit.Learned")
    for region in regions:
        for token in tokens_of(region, attributes, type(learner)).values():
            rows = learned.tokens.get(token, {})
            lengths = {encoder: len(row) for encoder, row in rows.items() if row.ndim == 1}
            if lengths != dict(backbone.rows) or not all(bool(row.isfinite().all()) for row in rows.values()):
                raise RunError(f"learner {name!r} returned no usable embedding for {token}")
    for key, weight in {**learned.tuning.lora, **learned.tuning.weights}.items():
        if weight.dtype.is_floating_point and not bool(torch.isfinite(weight).all()):
            raise RunError(f"learner {name!r} returned no usable weight for {key}")
    if learned.tuning and learned.tuning.folder not in WEIGHTS_FOLDERS:
        raise RunError(
            f"learner {name!r} returned weights for {learned.tuning.folder!r}: it can be {' or '.join(WEIGHTS_FOLDERS)}"
        )
    return learned


def tokens_of(region: Region, attributes: Sequence[Attribute], learner: type) -> dict[str, str]:
    """A concept's tokens by part: those that this learner learns."""
    parts = parts_of(learner, [attribute.name for attribute in attributes])
    return {part: token for part, token in token_names(region, attributes).items() if part in parts}
