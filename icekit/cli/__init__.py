"""The command line: ``icekit``."""

from icekit.cli.program import main

__all__ = ["main"]
