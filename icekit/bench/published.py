"""Figures that others published on a data set, to stand beside what was measured: see ``protocols.Dataset``."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import Field

from icekit.files import read_bytes
from icekit.protocols import InputError, RunError
from icekit.protocols.strict import StrictSettings
from icekit.settings import validate

MAX_BYTES = 2**20


class PublishedRow(StrictSettings):
    """What one publication says: column -> its figure."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    values: dict[str, float]


class Published(StrictSettings):
    """Published rows, and what must be known to compare them; images: of how many pictures they are."""

    images: int = Field(ge=1)
    notes: tuple[str, ...] = ()
    rows: tuple[PublishedRow, ...] = Field(min_length=1)

    def of_columns(self, columns: Collection[str]) -> dict[str, Any]:
        """The rows as far as these columns go, JSON-able; ``rows`` is empty where none has any of them."""
        rows = [
            {"name": row.name, "source": row.source, "values": values}
            for row in self.rows
            if (values := {column: row.values[column] for column in columns if column in row.values})
        ]
        return {"images": self.images, "notes": list(self.notes), "rows": rows}


def read_published(file: object, dataset: str) -> Published | None:
    """A data set's file of published figures; None where it has none.

    Raises:
        RunError: the data set breaks its contract: there is no such file, or it is no such TOML.
    """
    if file is None:
        return None
    if not isinstance(file, Path):
        raise RunError(f"data set {dataset!r}: its published figures are {file!r}: the Path of a TOML file is right")
    try:
        values = tomllib.loads(read_bytes(file, MAX_BYTES).decode("utf-8"))
        return validate(Published, values)
    except (OSError, ValueError, InputError) as error:
        raise RunError(f"data set {dataset!r}: its published figures in {file} cannot be read: {error}") from error
