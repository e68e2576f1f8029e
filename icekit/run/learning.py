"""Stage two: the tokens of an image's concepts, learned by the settings' learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from icekit.run import border
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
        RunError: a loss is no number.
        BreachError: the learner returned what its protocol does not allow, see ``border``.
    """
    name = settings.name_of("learner")

    who = ("learner", name)

    def checked_step(step: Step) -> None:
        border.check_step(who, step)
        for loss, value in step.losses.items():
            if not math.isfinite(value):
                raise RunError(f"learner {name!r}: the loss {loss!r} became {value} in step {step.step}")
        on_step(step)

    with border.unchanged(who, picture=image, **{f"mask of concept {one.index}": one.mask for one in regions}):
        learned = learner.learn(
            image,
            regions,
            attributes,
            seed=settings.seed,
            checkpoint=checkpoint or NoCheckpoint(),
            on_step=checked_step,
        )
    expected = [token for one in regions for token in tokens_of(one, attributes, type(learner)).values()]
    border.check_learned(who, learned, expected, backbone.rows)
    return learned


def tokens_of(region: Region, attributes: Sequence[Attribute], learner: type) -> dict[str, str]:
    """A concept's tokens by part: those that this learner learns."""
    parts = parts_of(learner, [attribute.name for attribute in attributes])
    return {part: token for part, token in token_names(region, attributes).items() if part in parts}
