"""``log.jsonl``, read: the steps of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from icekit.protocols.strict import LARGEST
from icekit.run.reading import Files
from icekit.run.records import StepRecord

MAX_LOG_BYTES = 2**30
"""Largest log: a line has some 200 bytes, and there can be a million of them."""
MAX_LOSSES = 32
"""Losses of one log at most; no learner has more than a few."""


@dataclass(frozen=True)
class LogLine:
    """One step of ``log.jsonl``: its number, the phase's name, and the losses that are finite numbers."""

    step: int
    phase: str
    losses: dict[str, float]


def read_log(files: Files) -> tuple[list[LogLine], int]:
    """The steps of a run's ``log.jsonl``, in order of their number, and how many of its lines are none.

    Losses stand under ``losses`` or beside ``step``. A last line without its end is what a killed run leaves, and is
    passed over, as are values that are no numbers and losses after the first ``MAX_LOSSES``; a step that was done twice
    (a resumed run) counts as it was done last. No file: no steps.

    Raises:
        DamagedError: the file cannot be read, or lies outside of the run.
    """
    lines: dict[int, LogLine] = {}
    known: set[str] = set()
    passed_over = 0
    *whole, last = (files.read("log.jsonl", MAX_LOG_BYTES) or b"").split(b"\n")
    for number, data in enumerate([*whole, last]):
        if not data.strip():
            continue
        try:
            content = parse_line(data)
            record = StepRecord.model_validate(content)
        except ValueError:  # a validation error is one
            passed_over += number < len(whole)
            continue
        losses = record.losses
        if losses is None:
            losses = {name: value for name, value in content.items() if name not in StepRecord.KNOWN}
        finite = {}
        for name, value in losses.items():
            if type(value) not in (int, float) or not abs(value) <= LARGEST:
                continue
            if name in known or len(known) < MAX_LOSSES:
                known.add(name)
                finite[name] = float(value)
        lines[record.step] = LogLine(record.step, record.phase or "", finite)
    return [lines[step] for step in sorted(lines)], passed_over


def parse_line(data: bytes) -> dict[str, Any]:
    """One line of a log: a JSON object, whose numbers may be NaN or infinite.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content
