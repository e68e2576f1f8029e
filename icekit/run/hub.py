"""Runs of the Hugging Face hub, read: ``hub:user/run[@revision][/subfolder]`` wherever a run directory is named.

Files are fetched into the hub's own cache and read there as those of any other run. Of a repository come the kinds of
files that a run is read from, and nothing hidden: no pickle, and no record of what icekit is to write or delete.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from icekit.model_files import Hub
from icekit.paths import user_path
from icekit.protocols import InputError
from icekit.protocols.errors import printable

PREFIX = "hub:"
FORM = "hub:user/run, hub:user/run@revision or hub:user/batch/runs/photo"
KINDS = ("json", "jsonl", "safetensors", "png", "toml", "md", "html")
"""Endings of the files that are fetched."""
NOT_FETCHED = (".*", "*/.*", "checkpoint/*", "*/checkpoint/*")
"""Whatever its ending: what icekit keeps for itself while it writes."""
_REFERENCE = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+))?(?P<folder>(/[^/]+)*)/?")
WAYS_OUT = (
    "give a folder of this machine, or a run that was fetched before (HF_HUB_OFFLINE=1 in the environment then uses "
    "the cache alone)"
)


@dataclass(frozen=True)
class HubRun:
    """What a reference to the hub names. folder: within the repository, ``""`` for all of it."""

    repository: str
    revision: str | None
    folder: str


def is_of_hub(run_dir: object) -> bool:
    """Whether this names a run, or a folder of runs, of the hub."""
    return str(run_dir).startswith(PREFIX)


def parse(reference: str) -> HubRun:
    """What ``hub:user/run[@revision][/subfolder]`` names.

    Raises:
        InputError: it has another form.
    """
    match = _REFERENCE.fullmatch(reference.removeprefix(PREFIX))
    folder = (match["folder"] if match else "").strip("/")
    parts = folder.split("/") if folder else []
    if match is None or any(part.startswith(".") or not part.isprintable() for part in parts):
        raise InputError(f"{printable(reference, 200)}: no run of the hub is named so: write {FORM}")
    return HubRun(match["repository"], match["revision"], folder)


def run_path(run_dir: str | Path) -> Path:
    """Where a run, or a folder of runs, is on this machine; one of the hub is fetched first. It need not exist.

    Raises:
        InputError: no file can have this name; or the hub does not give it, and the cache has not got it.
    """
    return fetched(str(run_dir)) if is_of_hub(run_dir) else user_path(run_dir)


def fetched(reference: str) -> Path:
    """The folder in the hub's cache in which the files of a reference are, those that it has not got fetched now.

    Raises:
        InputError: see ``run_path``.
    """
    one = parse(reference)
    repository = Hub(one.repository, None, f"{printable(reference, 200)}:", WAYS_OUT, revision=one.revision)
    within = f"{_literal(one.folder)}/" if one.folder else ""
    root = repository.folder([f"{within}*.{kind}" for kind in KINDS], NOT_FETCHED)
    path = root / one.folder
    if not path.is_dir():
        raise InputError(
            f"{printable(reference, 200)}: {one.repository} has no folder {one.folder!r} with files of a run"
        )
    return path


def _literal(text: str) -> str:
    """A name as a pattern that matches itself alone."""
    return re.sub(r"([*?[])", r"[\1]", text)


def linked_files_of(path: Path) -> Path | None:
    """Where the files of a folder of the hub's cache really are, which are links there; None for other folders.

    The hub's cache has ``models--OWNER--NAME/snapshots/COMMIT/...``, whose files lead to ``models--OWNER--NAME/blobs``.
    """
    from huggingface_hub import constants

    try:
        cache, place = Path(constants.HF_HUB_CACHE).expanduser().resolve(), path.resolve()
        parts = place.relative_to(cache).parts
    except (OSError, RuntimeError, ValueError):
        return None
    return cache / parts[0] / "blobs" if len(parts) > 2 and parts[1] == "snapshots" else None
