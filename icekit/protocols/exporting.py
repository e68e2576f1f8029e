"""What an exporter must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch takes seconds to import; a plugin module that only declares things does not need it
    from pathlib import Path

    from icekit.run.extraction import Extraction


class Exporter(Protocol):
    """Writes files from a complete run: a page for people, tokens as another program reads them. Built as
    ``Exporter(settings)``.

    The exporters that the setting ``exporters`` names write into the run directory at the end of each run; ``icekit
    export RUN_DIR --format NAME`` writes into it later, or into another folder. Either way icekit hands over an empty
    folder, holds what was written there against what was declared, and then moves each file to its place as a whole.
    It replaces and deletes what this exporter wrote of this run before, and no other file.

    An exporter that shows a run's attention maps (``attention/``) says so in a class attribute ``shows_attention =
    True``: a run makes them if one of its exporters does.
    An exporter whose files are for another program, to be copied there, says ``own_folder = True``: in a run directory
    they lie in a folder of the exporter's name, in any other folder right in it.
    """

    def files(self, extraction: Extraction) -> Sequence[str]:
        """The files that ``export`` writes for this run, relative to the folder, with ``/`` between folders.

        Each name once, and the same for the same run; they may depend on its concepts, as in ``cut-outs/cup-0.png``.
        In a run directory they cannot be names that the run's own files have, such as ``masks/...``, unless they lie
        in a folder of the exporter's.
        """
        ...

    def export(self, extraction: Extraction, folder: Path) -> None:
        """Write these files, and no others, into the folder, which is there and empty. The run stays as it is.

        Args:
            extraction: the run. Its files are in ``extraction.run_dir``; a path that people are to type later begins
                with ``extraction.home``, for a run that replaces another is moved to its place in the end.
            folder: where to write.

        Raises:
            InputError: this run cannot be written in this form; one line says why.
        """
        ...
