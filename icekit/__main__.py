"""``python -m icekit`` is the program ``icekit``."""

from icekit.cli import main

main()
