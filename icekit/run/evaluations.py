"""What a run costs, in evaluations of the noise predictor, counted where components ask the backbone for them.

An evaluation is one pass of the noise predictor over one picture. What it takes depends on the model and the machine
alone, so that a run's count says what the same run costs elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluations:
    """So many passes of the noise predictor over one picture each.

    forward: all of them. backward: those of them that kept what a gradient needs, for a backward pass.
    """

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(self.forward + other.forward, self.backward + other.backward)

    def __bool__(self) -> bool:
        return bool(self.forward or self.backward)


class Counter:
    """A run's evaluations by what they were for.

    booked: what for -> how many, in the order in which they came first.
    """

    def __init__(self, booked: Mapping[str, Evaluations] | None = None) -> None:
        self.booked = dict(booked or {})
        self._open = Evaluations()

    def add(self, evaluations: Evaluations) -> None:
        """Some more, for what is booked next."""
        self._open += evaluations

    def forget(self, what: str) -> None:
        """It is made again, in the place of what is there."""
        self.booked.pop(what, None)

    def book(self, what: str) -> None:
        """What came since the last booking was for this."""
        if self._open:
            self.booked[what] = self.booked.get(what, Evaluations()) + self._open
            self._open = Evaluations()
