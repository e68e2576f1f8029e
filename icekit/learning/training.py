"""What all learners that train share: settings, task, and the loop of steps, AdamW and clipping, with a state that a
killed run goes on from bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from icekit.learning.rows import TokenParameters, flat
from icekit.learning.settings import TrainingSettings
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
    Trained,
    Tuned,
)
from icekit.protocols.strict import changes_no_result
from icekit.randomness import seeded_generator
from icekit.wording import option
from icekit.wording import settings as in_settings

Losses = dict[str, Tensor]
"""Scalars by name; ``total`` is what is minimised."""

GRADIENT_SCALE = 1024.0
"""Losses are multiplied by this before backpropagation and gradients divided after it: in float16 the denoising loss's
gradients would underflow. A power of two, so that in float32 it changes nothing."""


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
    takes_part: whether a step's losses are of these parameters; in another step they have no gradient, and stay as
        they are (unless there is ``one_optimizer``). None: in every step.
    keeps_length: after every step each parameter is brought back to the length that it had when the phase began, so
        that its direction alone is learned (Kim et al., "Directional Textual Inversion", 2025).
    """

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    setting: str = "learning_rate"
    takes_part: Callable[[int], bool] | None = None
    keeps_length: bool = False


class Trainer:
    """A learner's training, phase by phase, with its checkpoint.

    done: steps done so far, over all phases. saved: tensors of the state that was found. kept: tensors to save.
    moments: AdamW's state after the last phase, or in the state that was found: ``adamw.<key>/<name>``.
    """

    def __init__(self, tokens: TokenParameters, settings: TrainingSettings, task: Task, total: int) -> None:
        """Find the saved state, if there is one, and restore the rows from it.

        Args:
            tokens: whose rows are trained; they are saved as ``row/<name>/<encoder>``.
            settings: the learner's; a saved state must agree in them.
            task: whose seed a saved state must agree in.
            total: steps of all phases together.

        Raises:
            InputError: the saved state is of another run.
        """
        kept_settings = settings.model_dump(mode="json", exclude=set(changes_no_result(type(settings))))
        self.identity = {"tokens": list(tokens), "seed": task.seed, "settings": kept_settings}
        self.seed, self.total, self.checkpoint, self.on_step = task.seed, total, task.checkpoint, task.on_step
        self.weight_decay, self.gradient_clip = settings.weight_decay, settings.gradient_clip
        self.checkpoint_every = settings.checkpoint_every
        self.kept: dict[str, Tensor] = {}
        self.saved: Mapping[str, Tensor] = {}
        self.moments: Mapping[str, Tensor] = {}
        self.done = 0
        found = self.checkpoint.load()
        if found is not None:
            self.saved, state = found
            for name, value in self.identity.items():
                if state.get(name) != value:
                    raise InputError(f"the saved learning state is of a run with other {name}: {_afresh()}")
            self.done = _step_of(state, total)
            self.moments = self.saved
        self.keep(flat(tokens), "row")

    def keep(self, parameters: Mapping[str, Tensor], kind: str) -> None:
        """Save these tensors from now on, and take their values from the saved state, where it has them."""
        for name, parameter in parameters.items():
            self.kept[f"{kind}/{name}"] = parameter
            if f"{kind}/{name}" in self.saved:
                parameter.data.copy_(_fitting(self.saved, f"{kind}/{name}", parameter.shape))

    @contextmanager
    def fine_tuned(self, backbone: Backbone, trained: Trained, rank: int) -> Iterator[Tuned]:
        """A noise predictor to be trained, see ``Backbone.fine_tuned``; its first weights drawn or restored."""
        with backbone.fine_tuned(trained, rank, seeded_generator(self.seed, "lora")) as tuned:
            self.keep(tuned.parameters, "lora" if trained == "lora" else "weights")
            yield tuned

    def train(
        self,
        phase: str,
        groups: Sequence[Group],
        steps: range,
        losses_of: Callable[[int], Iterator[Losses]],
        loss_scale: float = 1.0,
        one_optimizer: bool = False,
    ) -> None:
        """Train the groups' parameters through ``steps``, as far as they are not done yet.

        By default each group learns as if it were alone: its gradient is clipped by itself, AdamW passes over it in a
        step that it takes no part in, and starts anew with every phase.

        With ``one_optimizer`` all groups are trained as if they were rows of one parameter, an embedding table, say,
        that one AdamW trains from the first step to the last:

        - the gradient is clipped over all of them together;
        - a row that takes no part in a step has a gradient of zero, not none: its moments decay, and it moves on by
          its momentum and the weight decay;
        - the moments are those that the phase before left, and the step count that corrects their bias goes on. A row
          that comes new into a phase has moments of zero and that same count, as if its gradient had been zero so far.
          Its n-th step then is (1 - 0.9^n) sqrt((1 - 0.999^(done + n)) / (1 - 0.999^n)) times as long as a fresh
          AdamW's: with done = 400 from 1.8 times (n = 1) to 3.8 times (n = 12), and 3.5 in the mean of the first 20.

        losses_of: step -> losses, chunk by chunk. They are backpropagated one by one and add up.
        loss_scale: the loss is multiplied by this. Where a group is one concept's tokens and the loss a mean over
            concepts, their number makes each learn as if it were alone.
        one_optimizer: see above.

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
        if one_optimizer or self.done >= steps.start:  # else the moments are an earlier phase's
            self._restore_optimizer(optimizer, named, all_alike=one_optimizer)
        lengths = self._lengths(phase, groups)
        fastest = max(groups, key=lambda group: group.learning_rate)
        slower = f"try a lower learner.{fastest.setting} than {fastest.learning_rate:g}, or {_precise()}"
        advice = f"nothing was learned before it, so that the model or the settings' weights are to blame: {_precise()}"
        for step in range(self.done + 1, steps.stop):
            advice = slower if self.done else advice
            optimizer.zero_grad()
            for group in groups:
                for parameter in group.parameters.values():
                    parameter.requires_grad_(group.takes_part is None or group.takes_part(step))
            sums: dict[str, float] = {}
            for losses in losses_of(step):
                values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
                check_finite(values, phase, step, advice)
                (losses["total"] * (loss_scale * GRADIENT_SCALE)).backward()
                sums = {name: sums.get(name, 0.0) + values.get(name, 0.0) for name in [*values, *sums]}
            for parameter in named.values():
                if parameter.grad is not None:
                    parameter.grad /= GRADIENT_SCALE
                elif one_optimizer:
                    parameter.grad = torch.zeros_like(parameter)
            for together in [named] if one_optimizer else [group.parameters for group in groups]:
                norm = nn.utils.clip_grad_norm_(together.values(), self.gradient_clip)
                check_finite({"gradient of the": float(norm)}, phase, step, advice)
            optimizer.step()
            for name, length in lengths.items():
                row = named[name].data
                row *= length / row.norm().clamp_min(torch.finfo(row.dtype).tiny)
            self.done = step
            self.on_step(Step(step, self.total, phase, sums))
            if step % self.checkpoint_every == 0 or step == steps[-1]:
                self._save(moments_of(optimizer, named))
        self.moments = moments_of(optimizer, named)
        for parameter in named.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _lengths(self, phase: str, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The lengths that are kept, by the parameters' names. They are saved: of a row that was brought back to a
        length the norm is that length up to rounding alone.
        """
        kept = {
            name: parameter.detach().norm()
            for group in groups
            if group.keeps_length
            for name, parameter in group.parameters.items()
        }
        self.keep({f"{phase}/{name}": length for name, length in kept.items()}, "length")
        return kept

    def repeat(self, phase: str, steps: range, step_of: Callable[[int], Losses]) -> None:
        """Steps without an optimiser, as far as they are not done yet: what they change must be kept tensors.

        step_of: makes a step, and returns losses to show.

        Raises:
            RunError: a loss became NaN or infinite.
        """
        for step in range(self.done + 1, steps.stop):
            values = {name: float(value) for name, value in step_of(step).items()}
            check_finite(values, phase, step)
            self.done = step
            self.on_step(Step(step, self.total, phase, values))
            if step % self.checkpoint_every == 0 or step == steps[-1]:
                self._save({})

    def _save(self, moments: Mapping[str, Tensor]) -> None:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in {**self.kept, **moments}.items()}
        self.checkpoint.save(tensors, {**self.identity, "step": self.done})

    def _restore_optimizer(
        self, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], *, all_alike: bool
    ) -> None:
        """AdamW's state from ``moments``. With ``all_alike`` one that is not in it has had gradients of zero so far."""
        for name, parameter in named.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adamw.{key}/{name}" in self.moments:
                    shape = torch.Size() if key == "step" else parameter.shape
                    value = _fitting(self.moments, f"adamw.{key}/{name}", shape).to(parameter.device).clone()
                elif all_alike and self.done:
                    value = torch.zeros_like(parameter, requires_grad=False)
                    if key == "step":
                        value = torch.tensor(float(self.done), device=parameter.device)
                else:
                    continue
                optimizer.state[parameter][key] = value


def _step_of(state: Mapping[str, object], total: int) -> int:
    """The number of steps that a saved state has done. Raises InputError for what is none."""
    step = state.get("step")
    if type(step) is not int or not 0 <= step <= total:
        raise InputError(f"the saved learning state is damaged: its step is no number from 0 to {total}: {_afresh()}")
    return step


def _fitting(saved: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """A saved tensor of this shape, all finite. Raises InputError for another."""
    value = saved[name]
    if value.shape != shape or not value.is_floating_point() or not bool(value.isfinite().all()):
        raise InputError(
            f"the saved learning state is damaged: {name} should be finite numbers of shape {list(shape)}: {_afresh()}"
        )
    return value


def moments_of(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state of these parameters: ``adamw.<key>/<name>`` -> tensor. None for those it never moved."""
    return {
        f"adamw.{key}/{name}": value
        for name, parameter in named.items()
        for key, value in optimizer.state[parameter].items()
    }


def check_finite(values: Mapping[str, float], phase: str, step: int, advice: str = "") -> None:
    """Refuse losses that are NaN or infinite, and name the way out.

    advice: what to change.

    Raises:
        RunError: one is.
    """
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        way_out = f"; {advice}" if advice else ""
        raise RunError(f"the {broken[0]} loss became {values[broken[0]]} in step {step} (phase {phase}){way_out}")


def _afresh() -> str:
    """The way out where a saved state cannot be gone on with."""
    return f"start again ({option('overwrite')})"


def _precise() -> str:
    """What may help against numbers that are too large for a model."""
    return f"{in_settings({'backbone': {'dtype': 'float32'}})} where the model runs in half precision"
