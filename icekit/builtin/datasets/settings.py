"""Settings of the data sets. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from icekit.paths import PLACE
from icekit.protocols import ComponentSettings


class FolderSettings(ComponentSettings):
    """Settings of the ``folder`` data set."""

    path: Annotated[Path | None, PLACE] = Field(None, description="the folder of pictures")
