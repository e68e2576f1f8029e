"""How far a batch is, as it is told while it runs and as its page says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a batch is.

    pictures: that were given. done: of them, those with a complete run; before: how many of these had one when the
    batch began. failed: in this call. per_minute: pictures that end in a minute; left_s: seconds to the end at that
    rate; None before there is one. name: the picture that has just ended, and why if it failed.
    """

    pictures: int
    done: int
    before: int
    failed: int
    per_minute: float | None = None
    left_s: float | None = None
    name: str | None = None
    error: str | None = None

    @property
    def left(self) -> int:
        """Pictures that have not ended yet."""
        return self.pictures - self.done - self.failed
