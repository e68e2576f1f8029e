"""A resumable training run: weights, optimiser state, moving average and counters in one safetensors file."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from icekit_tabletop.train.settings import Settings

CHECKPOINT_SECONDS = 75.0


def save_state(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes tensors, and `info` as JSON in the file's header, by way of a temporary file: a reader never sees half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    flat = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    save_file(flat, str(temporary), metadata={"info": json.dumps(dict(info))})
    os.replace(temporary, path)


def load_state(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors whose name starts with `prefix` (which is cut off) and the `info` of a file from `save_state`."""
    with safe_open(str(path), framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
        tensors = {name[len(prefix) :]: stored.get_tensor(name) for name in names}
        info = json.loads(stored.metadata()["info"])
    return tensors, info


def load_info(path: Path) -> dict[str, Any]:
    """The `info` of a file from `save_state`."""
    with safe_open(str(path), framework="pt") as stored:
        info: dict[str, Any] = json.loads(stored.metadata()["info"])
    return info


class MovingAverage:
    """Exponential moving average of a module's floating-point state; integers are copied.

    The decay is held down at the start, where it would remember the random initialisation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the module's present state. `step` counts from one."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.state[name])
                values.append(tensor.detach())
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(averages, values, 1.0 - decay)


class Run:
    """The loop state of one stage. Use as a context manager: leaving it, by Ctrl-C too, writes a checkpoint.

    `module`, `optimiser` and `average` are restored from `<work>/<stage>.safetensors` when that exists.
    """

    def __init__(
        self,
        settings: Settings,
        stage: str,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        total: int,
        decay: float,
        *,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.stage, self.module, self.optimiser = settings, stage, module, optimiser
        self.total = total
        self.extra: dict[str, Any] = dict(extra or {})
        self.path = settings.work / f"{stage}.safetensors"
        self.seen = self.step = 0
        self.spent = 0.0  # minutes of training before this start
        self.average = MovingAverage(module, decay)
        if self.path.exists():
            self._restore()
        self.minutes_left = settings.minutes_left(self.spent)
        self.started = self.saved = time.monotonic()
        self.seen_at_save = self.seen
        self.sums: dict[str, float] = {}
        self.steps_since_save = 0

    def _restore(self) -> None:
        tensors, info = load_state(self.path)
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimiser": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        self.module.load_state_dict(parts["weights"])
        for name, tensor in parts["average"].items():
            self.average.state[name].copy_(tensor)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.seen, self.step, self.spent = int(info["seen"]), int(info["step"]), float(info["minutes"])
        self.extra.update(info.get("extra", {}))

    @property
    def minutes(self) -> float:
        """Minutes trained, earlier starts included."""
        return self.spent + (time.monotonic() - self.started) / 60

    @property
    def fraction(self) -> float:
        """Share of the training done, 0 to 1: of the samples, or of the time where that runs out first."""
        share = self.seen / max(1, self.total)
        if self.minutes_left is not None:
            share = max(share, self.minutes / max(1e-6, self.spent + self.minutes_left))
        return min(1.0, share)

    @property
    def finished(self) -> bool:
        """Whether the samples or the time are used up."""
        return self.fraction >= 1.0

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate of every parameter group, times the group's own "scale" where it has one."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)

    def set_cosine_rate(self, peak: float, warmup: int) -> None:
        """As `set_rate`: a rise over `warmup` steps to `peak`, then half a cosine down to a fiftieth of it."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.fraction))
        self.set_rate(peak * min(1.0, (self.step + 1) / warmup) * (0.02 + 0.98 * cosine))

    def advance(self, images: int, losses: Mapping[str, float]) -> None:
        """Counts a step over `images` samples; writes a checkpoint and a log line when one is due."""
        self.step += 1
        self.seen += images
        self.average.update(self.module, self.step)
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps_since_save += 1
        self.bar.update(images)
        if time.monotonic() - self.saved >= CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes the checkpoint and the log line now."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"average/{name}": tensor for name, tensor in self.average.state.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
        info = {"seen": self.seen, "step": self.step, "minutes": self.minutes, "extra": self.extra}
        save_state(self.path, tensors, info)
        seconds = max(1e-6, time.monotonic() - self.saved)
        means = {name: round(total / max(1, self.steps_since_save), 5) for name, total in self.sums.items()}
        append_log(
            self.settings.work,
            stage=self.stage,
            seen=self.seen,
            step=self.step,
            minutes=round(self.minutes, 2),
            images_per_second=round((self.seen - self.seen_at_save) / seconds, 1),
            fraction=round(self.fraction, 4),
            **means,
        )
        self.bar.set_postfix(means)
        self.saved, self.seen_at_save, self.sums, self.steps_since_save = time.monotonic(), self.seen, {}, 0

    def __enter__(self) -> Run:
        self.bar = tqdm(
            total=self.total, initial=self.seen, desc=self.stage, unit="img", file=sys.stderr, mininterval=5
        )
        # A plain kill saves as Ctrl-C does.
        self._previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.save()
        self.bar.close()


def append_log(work: Path, **entry: Any) -> None:
    """Adds a line to `<work>/log.jsonl`."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **entry}
    with (work / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
