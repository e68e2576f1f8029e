"""Settings of the data sets. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from icekit.paths import PLACE
from icekit.protocols import ComponentSettings
from icekit.protocols.strict import CHANGES_NO_RESULT


class FolderSettings(ComponentSettings):
    """Settings of the ``folder`` data set."""

    path: Annotated[Path | None, PLACE] = Field(None, description="the folder of pictures")


class UceSettings(ComponentSettings):
    """Settings of the ``uce`` data set."""

    path: Annotated[Path | None, PLACE] = Field(
        None, description="the folder of photographs: 00/img.jpg with 00/mask0.png, ..., 01/img.jpg, ..."
    )
    published: Literal["D1"] | None = Field(
        "D1",
        description="which published figures stand below the measured ones: those of D1, 96 photographs, or none",
        json_schema_extra=CHANGES_NO_RESULT,
    )
