"""What a batch keeps on disk of itself, as models: whatever is read back is held against these first."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from icekit.run.records import Count, Name, Number, OriginRecord, Record, Seconds, Text


def _of_one_folder(name: str) -> str:
    if "/" in name or "\\" in name or name.startswith("."):
        raise ValueError("the name of a folder")
    return name


RunName = Annotated[Name, Field(min_length=1), AfterValidator(_of_one_folder)]
"""What a picture's run directory is called, in ``runs/``."""


class PictureRecord(Record):
    """A picture of a batch: its file, absolute, and its name."""

    name: RunName
    source: str


class Summary(Record):
    """What came of the last call. before: pictures that were done already. seconds: from the first picture on."""

    pictures: Count
    done: Count
    before: Count
    failed: Count
    seconds: Seconds
    finished: bool


class BatchRecord(Record):
    """``batch.json``.

    settings: complete, of all runs. settings_hash: of what their results depend on. versions: of what computes.
    leaving: runs of a batch that this one replaces; they go when it is finished.
    """

    icekit_version: Name
    command: Text = ""
    settings: dict[str, Any]
    settings_hash: Name
    executor: Name
    threads: Count
    versions: dict[Name, Name] = Field({})
    plugins: list[OriginRecord] = Field([])
    pictures: list[PictureRecord]
    leaving: list[RunName] = Field([])
    summary: Summary | None = None


class SeenRecord(Record):
    """A concept as the page shows it: its label, its score, and the best word of each attribute."""

    label: Name
    score: Number
    words: list[Text]


class DoneRecord(Record):
    """A line of ``pictures.jsonl``: a picture whose run is complete.

    sha256, size, mtime_ns: of its file then. settings: the hash of those that the run was made with. seconds: that it
    took; 0 where it was complete already. report: whether the run has a page.
    """

    name: RunName
    sha256: Name
    settings: Name
    size: Count
    mtime_ns: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    seconds: Seconds
    report: bool
    concepts: list[SeenRecord]


class FailureRecord(Record):
    """A line of ``failures.jsonl``: a picture that failed, in which stage, and why in one line."""

    picture: str
    name: RunName
    stage: Name
    error: Text
