"""What goes wrong, by whose fault it is."""

from __future__ import annotations

MAX_MESSAGE = 4_000
"""Most characters of a message."""


def printable(text: str, length: int = 1_000) -> str:
    """A text of unknown origin for a terminal or a message: what does something there, or cannot be encoded, escaped.

    length: most characters.
    """
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def one_line(message: object) -> str:
    """A message as one line that a terminal can print."""
    return printable(" ".join(str(message).split()), MAX_MESSAGE)


class InputError(ValueError):
    """The user's input or settings are wrong. The message names what was given and what would be right.

    Whatever was given, the message is one line that a terminal can print.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class RunError(RuntimeError):
    """The run itself failed (a loss became NaN, nothing was found, ...). The message is one plain line, as above."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class StopRun(RunError):
    """Raised by an observer: the run is to end here. What it has done is kept, and ``resume`` goes on with it."""
