"""Where the parts of a model are: all of them on the device, or, where memory is short, those alone that are in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class Residence:
    """The parts of a model, and which of them are on the device.

    Without ``in_turn`` all parts are there from the start, and stay. With it a part comes when it is used, and the
    others go to the main memory first; but those stay that were used while gradients are computed, for a step of
    learning needs them all, until ``release``.

    A part that goes has other tensors in the place of its parameters then. A graph that was built with it keeps the
    ones that it was built with: its gradients are right, whatever has moved before they are computed.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]], device: torch.device, *, in_turn: bool) -> None:
        """Bring the parts where they belong.

        Args:
            parts: modules by the name of what they do together.
            device: where they work.
            in_turn: one part at a time.
        """
        self._parts, self._device, self._in_turn = parts, device, in_turn
        self._away = torch.device("cpu")
        self._learning: set[str] = set()
        self._pinned: list[str] = []
        for modules in parts.values():
            for module in modules:
                module.to(self._away if in_turn else device)

    def use(self, name: str) -> None:
        """Have a part on the device, for a call that begins."""
        if not self._in_turn:
            return
        for other in self._parts:
            if other != name and other not in self._learning and other not in self._pinned:
                self._move(other, self._away)
        self._move(name, self._device)
        if torch.is_grad_enabled():
            self._learning.add(name)

    def release(self) -> None:
        """What learning used may go: something else begins."""
        self._learning.clear()

    @contextmanager
    def pinned(self, name: str) -> Iterator[None]:
        """A part is on the device and stays there, with the parameters that it has: they are being changed."""
        self.use(name)
        self._pinned.append(name)
        try:
            yield
        finally:
            self._pinned.remove(name)

    def _move(self, name: str, device: torch.device) -> None:
        for module in self._parts[name]:
            for owner in module.modules():
                for key, parameter in owner._parameters.items():
                    if parameter is not None and parameter.device != device:
                        moved = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                        owner._parameters[key] = moved
                for key, buffer in owner._buffers.items():
                    if buffer is not None and buffer.device != device:
                        owner._buffers[key] = buffer.to(device)
