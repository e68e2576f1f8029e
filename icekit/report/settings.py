"""Settings of the report, which is imported when it is used."""

from __future__ import annotations

from pydantic import Field

from icekit.protocols import ComponentSettings


class ReportSettings(ComponentSettings):
    """Settings of ``report.html``."""

    image_side: int = Field(
        1024, ge=64, le=8192, description="longest side of the run's picture in the page, pixels, if it is larger"
    )
