"""A run under way, read: one that was interrupted, or that another process is at work on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from icekit.paths import user_path
from icekit.protocols import InputError
from icekit.run.directory import Located, RunDirectory
from icekit.settings import Settings, of_run_before, validate


@dataclass(frozen=True)
class Unfinished:
    """A run under way: where it is, what it began with, and what stage one has found so far.

    source: the image's path as typed. settings: all of them. picture: the image as the run sees it.
    located: stage one; corrected, it can be handed to ``extract(..., resume=True, located=...)``.
    learning: whether stage two has begun.
    """

    run_dir: Path
    source: str
    settings: Settings
    picture: Image.Image = field(repr=False)
    located: Located = field(repr=False)
    learning: bool

    @classmethod
    def open(cls, run_dir: str | Path) -> Unfinished:
        """Read the directory of a run that is not complete.

        Raises:
            InputError: there is none, it is complete, or damaged.
        """
        path = user_path(run_dir)
        directory = RunDirectory(path)
        if directory.is_complete:
            raise InputError(f"the run in {path} is complete: icekit.Extraction.open reads it")
        started = directory.started()
        if started is None:
            raise InputError(f"there is no run under way in {path}")
        picture = directory.load_image()
        return cls(
            run_dir=path,
            source=started.source,
            settings=validate(Settings, of_run_before(started.settings)),
            picture=picture,
            located=directory.load_located(picture.size),
            learning=directory.files.find("log.jsonl") is not None,
        )
