"""Settings of the exporters for other programs, which are imported when they are used."""

from __future__ import annotations

from pydantic import Field

from icekit.protocols import ComponentSettings


class TokenFilesSettings(ComponentSettings):
    """What the files of a run's tokens are called."""

    prefix: str | None = Field(
        None,
        max_length=40,
        pattern=r"^[A-Za-z0-9_-]*$",
        description="put before the name of each file and a hyphen, so that the tokens of several runs can lie in one "
        'folder: letters, digits, _ and -; none: the name of the run directory; "": nothing',
    )
