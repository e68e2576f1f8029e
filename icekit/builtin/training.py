"""The loop in which a learner trains: steps, AdamW, clipping, and a state a killed run goes on from bit for bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icekit.protocols import Checkpoint, InputError, RunError, Step

Losses = dict[str, Tensor]
"""Scalars by name; ``total`` is what is minimised."""

GRADIENT_SCALE = 1024.0
"""Losses are multiplied by this before backpropagation and gradients divided after it: in float16 the denoising loss's
gradients would underflow. A power of two, so that in float32 it changes nothing."""


def step_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """The randomness of one step, from the seed and the step's number alone: a resumed run draws what it would have."""
    digest = hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike.

    parameters: by name. Their gradient is clipped together.
    learning_rate: AdamW's, constant.
    setting: the learner's setting that the rate is from; named when the training breaks.
    """

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    setting: str = "learning_rate"


class Trainer:
    """A learner's training, phase by phase, with its checkpoint.

    done: steps done so far, over all phases. saved: tensors of the state that was found. kept: tensors to save.
    """

    def __init__(
        self,
        rows: Mapping[str, nn.Parameter],
        identity: Mapping[str, Any],
        total: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
        *,
        weight_decay: float,
        gradient_clip: float,
        checkpoint_every: int,
    ) -> None:
        """Find the saved state, if there is one.

        Args:
            rows: the tokens' embeddings by name; they are saved as ``row/<name>``.
            identity: what a saved state must agree in, JSON-able (the seed, the settings, ...).
            total: steps of all phases together.
            checkpoint: where the state is kept.
            on_step: called after every step.
            weight_decay: AdamW's.
            gradient_clip: largest norm of a group's gradient.
            checkpoint_every: steps between two saves; the end of a phase is saved as well.

        Raises:
            InputError: the saved state is of another run.
        """
        self.identity = {"tokens": list(rows), **identity}
        self.total, self.checkpoint, self.on_step = total, checkpoint, on_step
        self.weight_decay, self.gradient_clip = weight_decay, gradient_clip
        self.checkpoint_every = checkpoint_every
        self.kept: dict[str, Tensor] = {f"row/{name}": row for name, row in rows.items()}
        self.saved: Mapping[str, Tensor] = {}
        self.done = 0
        found = checkpoint.load()
        if found is not None:
            self.saved, state = found
            for name, value in self.identity.items():
                if state.get(name) != value:
                    raise InputError(
                        f"the saved learning state is of a run with other {name}: start again (--overwrite)"
                    )
            self.done = int(state["step"])

    def restore(self, parameters: Mapping[str, Tensor], kind: str) -> None:
        """Take these tensors' values from the saved state, where it has them."""
        for name, parameter in parameters.items():
            if f"{kind}/{name}" in self.saved:
                parameter.data.copy_(self.saved[f"{kind}/{name}"])

    def train(
        self,
        phase: str,
        groups: Sequence[Group],
        steps: range,
        losses_of: Callable[[int], Iterator[Losses]],
        loss_scale: float = 1.0,
    ) -> None:
        """Train the groups' parameters through ``steps``, as far as they are not done yet.

        losses_of: step -> losses, chunk by chunk. They are backpropagated one by one and add up.
        loss_scale: the loss is multiplied by this. Where a group is one concept's tokens and the loss a mean over
            concepts, their number makes each learn as if it were alone.

        Raises:
            RunError: a loss became NaN or infinite.
        """
        if not steps or self.done >= steps[-1]:
            return
        named = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups],
            weight_decay=self.weight_decay,
            fused=True,
        )
        if self.done >= steps.start:  # saved within this phase: an earlier one's moments are not this optimiser's
            self._restore_optimizer(optimizer, named)
        for parameter in named.values():
            parameter.requires_grad_(True)
        for step in range(self.done + 1, steps.stop):
            optimizer.zero_grad()
            sums: dict[str, float] = {}
            for losses in losses_of(step):
                values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
                check_finite(values, phase, step, max(groups, key=lambda group: group.learning_rate))
                (losses["total"] * (loss_scale * GRADIENT_SCALE)).backward()
                sums = {name: sums.get(name, 0.0) + values.get(name, 0.0) for name in [*values, *sums]}
            for parameter in named.values():
                if parameter.grad is not None:
                    parameter.grad /= GRADIENT_SCALE
            for group in groups:
                nn.utils.clip_grad_norm_(group.parameters.values(), self.gradient_clip)
            optimizer.step()
            self.done = step
            self.on_step(Step(step, self.total, phase, sums))
            if step % self.checkpoint_every == 0 or step == steps[-1]:
                self._save(optimizer, named)
        for parameter in named.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _save(self, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        moments = {
            f"adamw.{key}/{name}": value
            for name, parameter in named.items()
            for key, value in optimizer.state[parameter].items()
        }
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in (self.kept | moments).items()}
        self.checkpoint.save(tensors, {**self.identity, "step": self.done})

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in named.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adamw.{key}/{name}" in self.saved:
                    optimizer.state[parameter][key] = self.saved[f"adamw.{key}/{name}"].to(parameter.device).clone()


def check_finite(values: Mapping[str, float], phase: str, step: int, group: Group) -> None:
    """Refuse losses that are NaN or infinite, and name the setting to change.

    Raises:
        RunError: one is.
    """
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise RunError(
            f"the {broken[0]} loss became {values[broken[0]]} in step {step} (phase {phase}); "
            f"try a lower learner.{group.setting} than {group.learning_rate:g}"
        )
