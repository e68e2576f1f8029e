"""The exporter ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icekit.report import page
from icekit.report.settings import ReportSettings
from icekit.run.atomic import write_text_atomically
from icekit.run.extraction import Extraction


class Report:
    """``report.html``: the run, explained to people on one page that needs nothing else."""

    Settings = ReportSettings

    shows_attention = True

    def __init__(self, settings: ReportSettings) -> None:
        self.settings = settings

    def files(self, extraction: Extraction) -> Sequence[str]:
        """The page alone."""
        return ("report.html",)

    def export(self, extraction: Extraction, folder: Path) -> None:
        """Write the page."""
        html = page.render_report(extraction.run_dir, extraction.record, extraction.home, self.settings.image_side)
        write_text_atomically(folder / "report.html", html)
