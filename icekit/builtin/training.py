"""What all learners that train share: settings, task, and the loop of steps, AdamW and clipping, with a state that a
killed run goes on from bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from icekit.builtin.lora import lora_adapter
from icekit.builtin.templates import PHOTO_TEMPLATES, Templates
from icekit.protocols import (
    Attribute,
    Backbone,
    Checkpoint,
    ComponentSettings,
    InputError,
    Learned,
    Region,
    RunError,
    Step,
)

Losses = dict[str, Tensor]
"""Scalars by name; ``total`` is what is minimised."""

GRADIENT_SCALE = 1024.0
"""Losses are multiplied by this before backpropagation and gradients divided after it: in float16 the denoising loss's
gradients would underflow. A power of two, so that in float32 it changes nothing."""


def step_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """The randomness of one step, from the seed and the step's number alone: a resumed run draws what it would have."""
    digest = hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class TrainingSettings(ComponentSettings):
    """Settings that every learner that trains has."""

    weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient of what is trained together")
    flip_probability: float = Field(0.5, ge=0, le=1, description="how often the image is mirrored left to right")
    templates: Templates = Field(PHOTO_TEMPLATES, description="prompts, {} where the tokens go")
    max_batch: int = Field(4, ge=1, description="images denoised at once; more are taken in turns, with equal result")
    checkpoint_every: int = Field(50, ge=1, description="steps between two saves of the learning state")


S = TypeVar("S", bound=ComponentSettings)


@dataclass(frozen=True)
class Task:
    """What a learner is asked for; see ``protocols.Learner.learn``. At least one region, no empty mask."""

    image: Tensor
    regions: Sequence[Region]
    attributes: Sequence[Attribute]
    seed: int
    checkpoint: Checkpoint
    on_step: Callable[[Step], None]


class TaskLearner(ABC, Generic[S]):
    """A learner that is handed all it is asked for as one ``Task``: a ``protocols.Learner``, but for ``teach``."""

    def __init__(self, settings: S, backbone: Backbone) -> None:
        self.settings = settings
        self.backbone = backbone

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Learn the tokens of all regions: image ``[3, H, W]`` in [0, 1], see ``protocols.Learner``.

        Raises:
            InputError: an empty mask, a saved state of another run, or what ``teach`` refuses.
            RunError: a loss became NaN or infinite.
        """
        if not regions:
            return Learned({})
        for region in regions:
            if not region.mask.any():
                raise InputError(
                    f"the mask of {region.word!r} (concept {region.index}) is empty: nothing can be learned"
                )
        return self.teach(Task(image, regions, attributes, seed, checkpoint, on_step))

    @abstractmethod
    def teach(self, task: Task) -> Learned:
        """Learn what ``learn`` was asked for."""


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

    def __init__(self, rows: Mapping[str, nn.Parameter], settings: TrainingSettings, task: Task, total: int) -> None:
        """Find the saved state, if there is one, and restore the rows from it.

        Args:
            rows: the tokens' embeddings by name; they are saved as ``row/<name>``.
            settings: the learner's; a saved state must agree in them.
            task: whose seed a saved state must agree in.
            total: steps of all phases together.

        Raises:
            InputError: the saved state is of another run.
        """
        kept_settings = settings.model_dump(mode="json", exclude={"checkpoint_every"})
        self.identity = {"tokens": list(rows), "seed": task.seed, "settings": kept_settings}
        self.seed, self.total, self.checkpoint, self.on_step = task.seed, total, task.checkpoint, task.on_step
        self.weight_decay, self.gradient_clip = settings.weight_decay, settings.gradient_clip
        self.checkpoint_every = settings.checkpoint_every
        self.kept: dict[str, Tensor] = {}
        self.saved: Mapping[str, Tensor] = {}
        self.done = 0
        found = self.checkpoint.load()
        if found is not None:
            self.saved, state = found
            for name, value in self.identity.items():
                if state.get(name) != value:
                    raise InputError(
                        f"the saved learning state is of a run with other {name}: start again (--overwrite)"
                    )
            self.done = int(state["step"])
        self.keep(rows, "row")

    def keep(self, parameters: Mapping[str, Tensor], kind: str) -> None:
        """Save these tensors from now on, and take their values from the saved state, where it has them."""
        for name, parameter in parameters.items():
            self.kept[f"{kind}/{name}"] = parameter
            if f"{kind}/{name}" in self.saved:
                parameter.data.copy_(self.saved[f"{kind}/{name}"])

    @contextmanager
    def adapter(self, unet: nn.Module, rank: int) -> Iterator[dict[str, nn.Parameter]]:
        """A ``lora_adapter`` to be trained, drawn from the seed or restored."""
        with lora_adapter(unet, rank, step_generator(self.seed, "lora")) as weights:
            self.keep(weights, "lora")
            yield weights

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
