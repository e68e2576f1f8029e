"""What takes long says how far it is, now and then, on the log: nobody should have to guess whether it hangs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

FIRST_S, THEN_S = 10.0, 30.0
"""Seconds until the first word, and between two."""

log = logging.getLogger(__name__)
One = TypeVar("One")


class Ticker:
    """Says how far something is: ``embedding the vocabulary: 2560 of 80000``. Quick work is not spoken of."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + FIRST_S

    def tick(self, done: int, total: int) -> None:
        """So much is done; may be called as often as one likes."""
        if time.monotonic() >= self._next and done < total:
            log.warning("%s: %d of %d", self._what, done, total)
            self._next = time.monotonic() + THEN_S


def told(items: Sequence[One], what: str) -> Iterator[One]:
    """The items one after another; a ``Ticker`` says how far they are."""
    ticker = Ticker(what)
    for number, item in enumerate(items):
        ticker.tick(number, len(items))
        yield item
