"""What goes wrong, by whose fault it is."""

from __future__ import annotations


class InputError(ValueError):
    """The user's input or settings are wrong. The message names what was given and what would be right."""


class RunError(RuntimeError):
    """The run itself failed (a loss became NaN, nothing was found, ...). The message is one plain line."""
