"""A bench directory, read and written.

    bench.json              what is measured, and with what settings; written first
    data/<image>/           the pictures as the runs saw them, and their true masks
    located/<stage one>/<image>/    stage one's results, shared by all learners
    runs/<combination>/<image>/     run directories; a combination, or the name of a row
    images/<combination>/<image>/   generated images, a strip for each prompt
    values/<combination>/<image>.json   the metrics' values
    results.json, results.csv, bench.html   what came out; written last

Every file is written in one step, so that a killed bench goes on from whole files.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from icekit.protocols import InputError
from icekit.run.atomic import write_atomically, write_image_atomically, write_json_atomically
from icekit.run.directory import RunDirectory, check_place
from icekit.settings import flatten

_FOLDERS = ("data", "located", "runs", "images", "values")
_RESULTS = ("results.json", "results.csv", "bench.html")


class BenchDirectory:
    """One bench directory: what is in it, and how things get into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check_usable(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a bench may be written here; known before a model takes minutes to load.

        Raises:
            InputError: a file is in the way, the folder is somebody else's, or holds a bench and neither ``resume`` nor
                ``overwrite`` was asked for.
        """
        check_place(self.path, "a bench", resume=resume, overwrite=overwrite)
        before = self._record()
        if before is not None and not (resume or overwrite):
            raise InputError(f"{self.path} already holds a bench: --resume goes on with it, --overwrite replaces it")
        if before is None and self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and no bench of icekit's: choose another --out")

    def begin(self, record: dict[str, Any], *, resume: bool) -> None:
        """Take the directory for a bench with this record: go on with the one that is there, or else replace it.

        The components, metrics and number of images may differ from those of a bench that goes on: what is there
        already is kept, and what is missing is measured.

        Raises:
            InputError: the bench that is to go on has other settings, or the directory cannot be written to.
        """
        before = self._record()
        if before is not None and resume:
            now, then = flatten(record["settings"]), flatten(before["settings"])
            changes = [f"{key} was {then[key]}, now {now[key]}" for key in now if key in then and now[key] != then[key]]
            if changes:
                raise InputError(
                    f"the bench in {self.path} cannot go on: {'; '.join(changes)} (--overwrite starts it afresh)"
                )
            record = record | {"settings": _nested(then | now)}
        elif before is not None:
            for name in _FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in _RESULTS:
                (self.path / name).unlink(missing_ok=True)
        try:
            write_json_atomically(self.path / "bench.json", record)
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {(error.strerror or str(error)).lower()}") from error

    def _record(self) -> dict[str, Any] | None:
        record = _read_json(self.path / "bench.json")
        return record if isinstance(record, dict) and "icekit_version" in record and "settings" in record else None

    def data(self, image: str) -> Path:
        """Folder of a picture and its true masks."""
        return self.path / "data" / image

    def located(self, stage_one: str, image: str) -> RunDirectory:
        """Where stage one's result is kept."""
        return RunDirectory(self.path / "located" / stage_one / image)

    def run(self, combination: str, image: str) -> Path:
        """A run directory."""
        return self.path / "runs" / combination / image

    # --- Generated images --------------------------------------------------------------------------------------------

    def strip(self, combination: str, image: str, prompt: str, how: Sequence[object]) -> Path:
        """Where a prompt's images are kept, side by side; ``how`` they were made is part of the name."""
        slug = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:80]
        digest = hashlib.sha256(json.dumps([prompt, *map(str, how)]).encode()).hexdigest()[:10]
        return self.path / "images" / combination / image / f"{slug}-{digest}.png"

    # --- Values ------------------------------------------------------------------------------------------------------

    def load_values(self, combination: str, image: str) -> dict[str, Any]:
        """What was measured: ``{"metrics": {metric: {column: {"value": ..., "prompts": [...]}}}, "error": ...}``."""
        return _read_json(self._values(combination, image)) or {"metrics": {}}

    def save_values(self, combination: str, image: str, values: dict[str, Any]) -> None:
        """Keep what was measured so far."""
        write_json_atomically(self._values(combination, image), values)

    def _values(self, combination: str, image: str) -> Path:
        return self.path / "values" / combination / f"{image}.json"

    def save_results(self, results: dict[str, Any], table: str, page: str) -> None:
        """Keep the results in all their forms."""
        write_json_atomically(self.path / "results.json", results)
        write_atomically(self.path / "results.csv", table.encode())
        write_atomically(self.path / "bench.html", page.encode())


def save_strip(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write pictures of one size side by side."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * width, 0))
    write_image_atomically(path, strip)


def load_strip(path: Path, count: int) -> list[Image.Image] | None:
    """The ``count`` pictures of a strip; None if it is not there."""
    if not path.is_file():
        return None
    with Image.open(path) as file:
        strip = file.convert("RGB")
    side = strip.width // count
    return [strip.crop((number * side, 0, (number + 1) * side, strip.height)) for number in range(count)]


def to_picture(pixels: Any) -> Image.Image:
    """float32 ``[3, H, W]`` in [0, 1] -> RGB image."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def to_mask_picture(mask: Any) -> Image.Image:
    """Mask, bool ``[H, W]`` -> 8-bit grey image, 0 or 255."""
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
