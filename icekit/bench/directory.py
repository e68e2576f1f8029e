"""A bench directory, read and written.

    bench.json              what is measured, and with what settings; written first
    data/<image>/           the pictures as the runs saw them, and their true masks
    located/<stage one>/<image>/    stage one's results, shared by all learners
    runs/<combination>/<image>/     run directories; a combination, or the name of a row
    images/<combination>/<image>/   generated images, a strip for each prompt
    values/<combination>/<image>.json   the metrics' values
    bench.html, results.csv, results.json   what came out; written last, in this order
    written.jsonl           the names of all that icekit wrote here, and so all that it ever deletes or replaces

Every file is written in one step, so that a killed bench goes on from whole files. A bench that is to replace another
is built in the subfolder ``.next``, and moved to its place when it is complete (see ``run.ownership``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from icekit.protocols import InputError
from icekit.run.atomic import write_image_atomically, write_json_atomically, write_text_atomically
from icekit.run.directory import RunDirectory, check_place
from icekit.run.directory import is_own_name as is_own_name_in_run
from icekit.run.exports import is_exported
from icekit.run.ownership import (
    LOCK,
    NEXT,
    Written,
    becomes,
    cannot_write,
    delete_files,
    delete_half_written,
    exchange,
    finish_exchange,
    link_to,
    refuse_if_busy,
    refuse_links,
    remove_next,
    writing_into,
)
from icekit.run.reading import DamagedError, Files
from icekit.run.records import BenchRecord, ValuesRecord
from icekit.settings import flatten, merge

STAGE_ONE_S = 86_400.0
"""Seconds to wait for another worker that looks at the same picture in the same way."""
_RECORD = "written.jsonl"
_LAST = "results.json"
_FILES = ("bench.json", "results.csv", "bench.html", _LAST, _RECORD)
_PATTERNS = (
    r"data/[^/]+/image\.png",
    r"data/[^/]+/masks/\d+-[^/]+\.png",
    r"images/[^/]+/[^/]+/[^/]*-[0-9a-f]{10}\.png",
    r"values/[^/]+/[^/]+\.json",
)
_RUN_PATTERN = r"((?:located|runs)/[^/]+/[^/]+)/(.*)"
"""What icekit writes into a bench directory, and so all that it ever deletes there, whatever a record says."""


class BenchDirectory:
    """One bench directory: what is in it, and how things get into it."""

    def __init__(self, path: str | Path, home: Path | None = None) -> None:
        """Open it, or say where it is to be.

        home: where its files will be in the end, if not there.
        """
        self.path = Path(path)
        self.home = home or self.path
        self.files = Files(
            self.path, f"the bench in {self.path}", lambda: "delete this file, and --resume makes it anew"
        )
        self.written = Written(self.path, _RECORD, before=self._names_by_pattern)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes out, but the workers of this one.

        Raises:
            InputError: another process is writing here, or nobody can.
        """
        return writing_into(self.path)

    def check_usable(self, *, resume: bool, overwrite: bool, writing: bool = False) -> None:
        """Whether a bench may be written here; known before a model takes minutes to load.

        writing: whether this process is known to be the only one that is writing here.

        Raises:
            InputError: a file is in the way, the folder is somebody else's, or holds a bench and neither ``resume`` nor
                ``overwrite`` was asked for.
        """
        check_place(self.path, "a bench", resume=resume, overwrite=overwrite)
        finish_exchange(self.path, lambda name: is_own_name(name) or is_exported(self.path, name), writing=writing)
        try:
            before = self._record()
        except DamagedError:
            if not (overwrite and self.written.is_there):
                raise
            before = {}
        if before is not None and not (resume or overwrite):
            raise InputError(f"{self.path} already holds a bench: --resume goes on with it, --overwrite replaces it")
        if before is not None:
            for name in sorted({*self.own_names(), *_FILES, "data", "located", "runs", "images", "values", NEXT}):
                refuse_links(self.path, name)
        elif self.path.is_dir() and any(not _is_of_a_beginning(path) for path in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and no bench of icekit's: choose another --out")

    def begin(self, record: dict[str, Any], *, resume: bool, may_change: Collection[str] = ()) -> None:
        """Take the directory for a bench with this record: go on with the one that is there, or else replace it.

        The components, metrics and number of images may differ from those of a bench that goes on: what is there
        already is kept, and what is missing is measured.

        may_change: settings by key that may be others, too: they change no number.

        Raises:
            InputError: the bench that is to go on has other settings, or the directory cannot be written to.
        """
        before = self._record()
        if before is not None and resume:
            now, then = flatten(record["settings"]), flatten(before["settings"])
            both = [key for key in now if key in then and key not in may_change]
            changes = [f"{key} was {then[key]}, now {now[key]}" for key in both if now[key] != then[key]]
            if changes:
                raise InputError(
                    f"the bench in {self.path} cannot go on: {'; '.join(changes)} (--overwrite starts it afresh)"
                )
            try:
                record = record | {"settings": merge(before["settings"], record["settings"])}
            except InputError as error:
                problem = self.files.damaged("bench.json", str(error)).problem
                raise DamagedError(problem, "--overwrite makes the bench anew") from error
        elif before is not None:
            delete_files(self.path, self.own_names() - {"bench.json", _RECORD})
        try:
            refuse_links(self.path, "bench.json")
            write_json_atomically(self.path / "bench.json", record)  # from here on the directory is icekit's
            if before is not None and not resume:
                self.written.reset({"bench.json"})
            self.written.claim("bench.json")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _record(self) -> dict[str, Any] | None:
        """What is measured here; None where there is no record, or somebody else's. Raises DamagedError."""
        name = "bench.json"
        try:
            record = self.files.json(name)
            if not isinstance(record, dict) or not {"icekit_version", "settings"} <= record.keys():
                return None
            return record | {"settings": self.files.check(name, BenchRecord, record).settings}
        except DamagedError as error:
            way_out = "--overwrite makes the bench anew" if self.written.is_there else "choose another --out"
            raise DamagedError(error.problem, way_out) from error

    # --- What is icekit's --------------------------------------------------------------------------------------------

    def claim(self, path: Path) -> Path:
        """Make sure that a file or a run directory may be written, and put it into the record.

        Raises:
            InputError: somebody else's is in the way, or a symbolic link is.
        """
        self.written.claim(path.relative_to(self.path).as_posix())
        return path

    def own_names(self) -> set[str]:
        """The files that icekit wrote here, those of its run directories among them, relative to the directory."""
        names: set[str] = set()
        for name in self.written.names() | {"bench.json", _RECORD}:
            if re.fullmatch(_RUN_PATTERN, f"{name}/"):
                if link_to(self.path, name) is None:
                    names |= {f"{name}/{own}" for own in RunDirectory(self.path / name).own_names()}
            elif is_own_name(name):
                names.add(name)
        return names

    def clear_leftovers(self) -> None:
        """Delete what a killed process had half-written, and what it had no more time to delete.

        Raises:
            Busy: another process is writing into one of the runs.
        """
        delete_half_written(self.path, self.own_names())
        for run in self._runs():
            refuse_if_busy(run.path)  # a lock that nobody holds goes by this
            with contextlib.suppress(DamagedError):
                run.clear_leftovers()

    def _runs(self) -> list[RunDirectory]:
        names = [name for name in self.written.names() if re.fullmatch(_RUN_PATTERN, f"{name}/")]
        return [RunDirectory(self.path / name) for name in names if link_to(self.path, name) is None]

    def _names_by_pattern(self) -> Iterable[str]:
        """What a version wrote that kept no record."""
        found = [path for folder in ("data", "images", "values") for path in (self.path / folder).rglob("*")]
        found += [self.path / name for name in _FILES]
        runs = [path for folder in ("located", "runs") for path in (self.path / folder).glob("*/*") if path.is_dir()]
        names = [path.relative_to(self.path).as_posix() for path in found if path.is_file()]
        return [
            *(name for name in names if is_own_name(name)),
            *(path.relative_to(self.path).as_posix() for path in runs),
        ]

    # --- One bench in the place of another ---------------------------------------------------------------------------

    @property
    def next(self) -> BenchDirectory:
        """Where a bench is built that is to replace the one here."""
        return BenchDirectory(self.path / NEXT, self.path)

    @property
    def holds_bench(self) -> bool:
        """Whether a bench was begun here, damaged or not."""
        try:
            return self._record() is not None
        except DamagedError:
            return self.written.is_there

    def discard_next(self) -> None:
        """Delete what was built in ``next``."""
        if self.next.holds_bench:
            self.next.clear_leftovers()
            delete_files(self.next.path, self.next.own_names())
        remove_next(self.path)

    def replace(self) -> None:
        """Put the complete bench in ``next`` into the place of the one here; the next bench here ends it if need be.

        Raises:
            InputError: a file that is not icekit's is in the way, or a symbolic link is; nothing was changed then.
        """
        self.next.clear_leftovers()
        new = {name for name in self.next.own_names() if (self.next.path / name).is_file()}
        exchange(self.path, old=self.own_names(), new=new, last=_LAST)

    # --- Places ------------------------------------------------------------------------------------------------------

    def data(self, image: str) -> Path:
        """Folder of a picture and its true masks."""
        return self.path / "data" / image

    def located(self, stage_one: str, image: str) -> RunDirectory:
        """Where stage one's result is kept."""
        return RunDirectory(self.path / "located" / stage_one / image)

    def run(self, combination: str, image: str) -> Path:
        """A run directory."""
        return self.path / "runs" / combination / image

    @contextlib.contextmanager
    def locating(self, place: RunDirectory) -> Iterator[None]:
        """Keep others out of stage one's result, for the length of the block; wait where another one is making it."""
        with writing_into(place.path, wait=STAGE_ONE_S):
            yield

    # --- Generated images --------------------------------------------------------------------------------------------

    def strip(self, combination: str, image: str, prompt: str, how: Sequence[object]) -> Path:
        """Where a prompt's images are kept, side by side; ``how`` they were made is part of the name."""
        slug = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:80]
        digest = hashlib.sha256(json.dumps([prompt, *map(str, how)]).encode()).hexdigest()[:10]
        return self.path / "images" / combination / image / f"{slug}-{digest}.png"

    # --- Values ------------------------------------------------------------------------------------------------------

    def load_values(self, combination: str, image: str) -> dict[str, Any]:
        """What was measured: ``{"metrics": {metric: {column: {"value": ..., "prompts": [...]}}}, "error": ...}``.

        Raises:
            DamagedError: the file is damaged.
        """
        name = self._values(combination, image).relative_to(self.path).as_posix()
        record = self.files.record(name, ValuesRecord)
        return {"metrics": {}} if record is None else record.model_dump(exclude_unset=True)

    def save_values(self, combination: str, image: str, values: dict[str, Any]) -> None:
        """Keep what was measured so far."""
        write_json_atomically(self.claim(self._values(combination, image)), values)

    def _values(self, combination: str, image: str) -> Path:
        return self.path / "values" / combination / f"{image}.json"

    def save_results(self, results: dict[str, Any], table: str, page: str) -> None:
        """Keep the results in all their forms."""
        write_text_atomically(self.claim(self.path / "bench.html"), page)
        write_text_atomically(self.claim(self.path / "results.csv"), table)
        write_json_atomically(self.claim(self.path / _LAST), results)


def is_own_name(name: str) -> bool:
    """Whether icekit writes files of this name, relative to a bench directory."""
    within = re.fullmatch(_RUN_PATTERN, name)
    if within:
        return is_own_name_in_run(within[2])
    return name in _FILES or any(re.fullmatch(pattern, name) for pattern in _PATTERNS)


def _is_of_a_beginning(path: Path) -> bool:
    """Whether a process that was killed before it had begun left this."""
    return becomes(path) == "bench.json" or path.name == LOCK


def save_strip(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write pictures of one size side by side."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * width, 0))
    write_image_atomically(path, strip)


def load_strip(files: Files, name: str, count: int, size: tuple[int, int]) -> list[Image.Image] | None:
    """The ``count`` pictures of a strip; None if it is not there or not whole: it is made again, with the same bits.

    size: (width, height) of each, pixels.

    Raises:
        DamagedError: it is a link that leads out of the bench, or no file.
    """
    if files.find(name) is None:
        return None
    width, height = size
    try:
        picture = files.picture(name, (width * count, height))
    except DamagedError:
        return None
    assert picture is not None  # it was found
    strip = picture.convert("RGB")
    return [strip.crop((number * width, 0, (number + 1) * width, height)) for number in range(count)]


def to_picture(pixels: Any) -> Image.Image:
    """float32 ``[3, H, W]`` in [0, 1] -> RGB image."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def to_mask_picture(mask: Any) -> Image.Image:
    """Mask, bool ``[H, W]`` -> 8-bit grey image, 0 or 255."""
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)
