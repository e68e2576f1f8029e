"""What the page shows of a run, read from its directory: complete, interrupted, or under way at this moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from icekit import Extraction, InputError, Unfinished
from icekit_ui.masks import Mask
from icekit_ui.runs import Run, Runs

LOOKING, FOUND, BEGUN, COMPLETE, DAMAGED = "looking", "found", "begun", "complete", "damaged"
"""How far a run is: stage one is not at its end, is; stage two has begun, and all is done. Or it cannot be read."""
MOST_SAMPLES = 60


@dataclass(frozen=True)
class Thing:
    """An object of a run. words: what its attributes' tokens are called, best first. tokens: by part."""

    index: int
    word: str
    score: float
    mask: Mask = field(repr=False)
    words: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A run as it stands. steps: the lines of its log. samples: name -> picture, the oldest first."""

    name: str
    state: str
    picture: Image.Image | None = None
    things: tuple[Thing, ...] = ()
    steps: tuple[dict[str, Any], ...] = ()
    samples: dict[str, Image.Image] = field(default_factory=dict)
    problem: str = ""


def signature(run: Run) -> tuple[Any, ...]:
    """Something that changes when there is something new to see."""
    found: list[Any] = [run.name, run.complete]
    for name in ("manifest.json", "checkpoint/regions.json", "log.jsonl", "samples", "image.png", "masks"):
        try:
            about = (run.path / name).lstat()
            found.append((about.st_mtime_ns, about.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


def look(runs: Runs, run: Run) -> Seen:
    """Read a run. One that cannot be read says why."""
    try:
        things: tuple[Thing, ...]
        if run.complete:
            extraction = Extraction.open(run.path)
            state = COMPLETE
            things = tuple(
                Thing(one.index, one.label.replace("-", " "), one.score, one.mask(), one.words, one.tokens)
                for one in extraction.concepts
            )
            picture = runs.read_picture(run.path, "image.png")
        else:
            begun = Unfinished.open(run.path)
            state = BEGUN if begun.learning else FOUND if begun.located.finished else LOOKING
            things = tuple(
                Thing(one.index, one.word, float(one.score), np.asarray(one.mask, dtype=bool))
                for one in begun.located.regions
            )
            picture = begun.picture
    except InputError as error:
        return Seen(run.name, DAMAGED, runs.read_picture(run.path, "image.png"), problem=str(error))
    names = runs.names(run.path, "samples")[:MOST_SAMPLES]
    samples = {name: one for name in names if (one := runs.read_picture(run.path, name)) is not None}
    return Seen(run.name, state, picture, things, tuple(runs.lines(run.path, "log.jsonl")), samples)
