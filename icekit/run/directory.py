"""A run directory, read and written: everything that icekit keeps on disk is in this module.

Every file is written beside its place and moved there in one step, so that a killed run leaves whole files only. While
a run is under way its state is in ``checkpoint/``; ``manifest.json`` comes last and makes it complete.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from icekit.protocols import FineTuning, InputError, Learned, Region, Step
from icekit.run.atomic import write_atomically, write_image_atomically, write_json_atomically, write_tensors_atomically
from icekit.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 2
"""Version 1 had one text encoder, without a name, and settings of the naming of regions that are no more."""
OLDEST_SCHEMA_VERSION = 1
"""The oldest run directory that can still be read."""
WORDS_ALONE = "-words"
"""After the part in the name of a sample that was made from plain words; no part has a hyphen in it."""

WEIGHTS_FOLDERS = ("unet", "transformer")
"""What pipelines call their noise predictor: the folder of fine-tuned weights, in diffusers' format, is named so."""
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

_OWN_FILES = (
    "manifest.json",
    "image.png",
    "settings.toml",
    "log.jsonl",
    "embeddings.safetensors",
    "lora.safetensors",
    "report.html",
    "checkpoint/regions.json",
    "checkpoint/learner.safetensors",
    "checkpoint/timings.json",
)
_OWN_PATTERNS = {
    "masks": r"\d+-.+\.png",
    "embeddings": r".+-\d+(-.+)?\.safetensors",
    **dict.fromkeys(WEIGHTS_FOLDERS, r"config\.json|diffusion_pytorch_model\.safetensors"),
    "samples": r"\d+-.+-\d+\.png",
    "attention": r"\d+-.+\.png",
    "checkpoint": r"run\.json",
}
"""What icekit writes into a run directory, and so all that it ever deletes there. ``run.json`` goes last."""


@dataclass(frozen=True)
class Started:
    """What a run began with: the source image's sha256, the complete settings (nested, JSON types), and the schema
    version of its directory.
    """

    sha256: str
    source: str
    settings: dict[str, Any]
    schema_version: int


@dataclass(frozen=True)
class Located:
    """Stage one so far.

    regions: those found. refused: the words that led nowhere. finished: whether that is all.
    rounds: how many words were tried. last: the last of them.
    erased: bool ``[H, W]``, what was erased with the words, regions or not; None: the regions alone.
    """

    regions: tuple[Region, ...] = ()
    refused: tuple[str, ...] = ()
    finished: bool = False
    rounds: int = 0
    last: str | None = None
    erased: Tensor | None = None


def check_place(path: Path, what: str, *, resume: bool, overwrite: bool) -> None:
    """Whether a folder can be here, and what is to become of one that is.

    what: is to be written into it, ``"a run"``, say.

    Raises:
        InputError: a file is in the way, or both ``resume`` and ``overwrite`` were asked for.
    """
    if resume and overwrite:
        raise InputError(f"--resume goes on with {what} and --overwrite replaces it: give one of them")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: --out takes a folder")


class RunDirectory:
    """One run directory under way: what is in it, and how things get into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = FileCheckpoint(self.path / "checkpoint" / "learner.safetensors")

    # --- Whose it is, and how far it got -----------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return bool(self.read_manifest())

    @property
    def is_ours(self) -> bool:
        """Whether icekit made this directory."""
        return self.is_complete or (self.path / "checkpoint" / "run.json").is_file()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; empty if there is none, or somebody else's."""
        manifest = _read_json(self.path / "manifest.json")
        ours = isinstance(manifest, dict) and {"schema_version", "icekit_version"} <= manifest.keys()
        return manifest if ours else {}

    def started(self) -> Started | None:
        """What the run under way here began with; None if there is none."""
        record = _read_json(self.path / "checkpoint" / "run.json")
        if not record or not record.get("ready"):
            return None
        return Started(record["sha256"], record["source"], record["settings"], record["schema_version"])

    def check_usable(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a run may be written here.

        Raises:
            InputError: a file is in the way, the folder is somebody else's, or holds a run and neither ``resume`` nor
                ``overwrite`` was asked for.
        """
        check_place(self.path, "a run", resume=resume, overwrite=overwrite)
        if not self.path.exists():
            return
        if self.is_ours:
            if not (resume or overwrite):
                kind = "a complete run" if self.is_complete else "an interrupted run (--resume goes on with it)"
                raise InputError(f"{self.path} already holds {kind}: --overwrite replaces it, or choose another --out")
        elif any(path.is_file() for path in self.path.rglob("*") if _becomes(path) != "run.json"):
            raise InputError(f"{self.path} is not empty and no run of icekit's: choose another --out")

    def begin(self, settings: Settings, source: str, sha256: str, image: Image.Image) -> None:
        """Start afresh, replacing what icekit wrote here before (and nothing else).

        Raises:
            InputError: the directory cannot be made.
        """
        record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "ready": False}
        try:
            # First of all: from here on the directory is icekit's, whenever the process may be killed.
            self._write_json("checkpoint/run.json", record)
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {(error.strerror or str(error)).lower()}") from error
        self._delete_own(keep="run.json")
        self._write("settings.toml", settings.to_toml().encode())
        self._write_image("image.png", image)
        record |= {"ready": True, "source": source, "sha256": sha256, "settings": settings.model_dump(mode="json")}
        self._write_json("checkpoint/run.json", record)

    def clear_leftovers(self) -> None:
        """Delete what a killed process had half-written."""
        for path in self._own_files():
            if _becomes(path):
                _delete(path)

    def _delete_own(self, keep: str) -> None:
        for path in self._own_files():
            if (_becomes(path) or path.name) != keep:
                _delete(path)
                if path.parent != self.path and not any(path.parent.iterdir()):
                    path.parent.rmdir()

    def _own_files(self) -> list[Path]:
        """The files that icekit wrote here, half-written ones among them, and folders of such."""
        folders = [self.path / name for name in _OWN_PATTERNS if not (self.path / name).is_symlink()]
        paths = [path for folder in [self.path, *folders] if folder.is_dir() for path in folder.iterdir()]
        return [path for path in paths if (path.is_file() or _becomes(path)) and self._is_own(path)]

    def _is_own(self, path: Path) -> bool:
        name = path.with_name(_becomes(path) or path.name).relative_to(self.path).as_posix()
        folder, _, file = name.rpartition("/")
        return name in _OWN_FILES or (folder in _OWN_PATTERNS and bool(re.fullmatch(_OWN_PATTERNS[folder], file)))

    # --- Stage one ---------------------------------------------------------------------------------------------------

    def load_image(self) -> Image.Image:
        """The image as the run saw it."""
        with Image.open(self.path / "image.png") as image:
            return image.convert("RGB")

    def save_located(self, located: Located) -> None:
        """Keep the regions found so far."""
        for region in located.regions:
            self._write_image(mask_name(region), Image.fromarray(region.mask.numpy().astype(np.uint8) * 255))
        regions = [
            {
                "index": region.index,
                "word": region.word,
                "score": region.score,
                "mask": mask_name(region),
                "hints": {attribute: dict(words) for attribute, words in region.hints.items()},
            }
            for region in located.regions
        ]
        self._write_json(
            "checkpoint/regions.json",
            {
                "regions": regions,
                "refused": list(located.refused),
                "finished": located.finished,
                "rounds": located.rounds,
                "last": located.last,
                "erased": None if located.erased is None else _mask_to_text(located.erased),
            },
        )
        current = {region["mask"] for region in regions}
        for path in (self.path / "masks").glob("*.png"):  # a region that was renamed left its mask's old name
            if re.fullmatch(_OWN_PATTERNS["masks"], path.name) and f"masks/{path.name}" not in current:
                path.unlink()

    def load_located(self) -> Located:
        """The regions found so far."""
        import torch

        record = _read_json(self.path / "checkpoint" / "regions.json")
        if not record:
            return Located()
        regions = []
        for entry in record["regions"]:
            with Image.open(self.path / entry["mask"]) as image:
                mask = torch.from_numpy(np.asarray(image.convert("L")) > 127)
            regions.append(Region(entry["index"], entry["word"], entry["score"], mask, entry.get("hints", {})))
        erased = record.get("erased")
        return Located(
            tuple(regions),
            tuple(record["refused"]),
            record["finished"],
            record.get("rounds", len(record["regions"]) + len(record["refused"])),
            record.get("last"),
            None if erased is None else _mask_from_text(erased),
        )

    # --- Stage two ---------------------------------------------------------------------------------------------------

    def open_log(self) -> StepLog:
        """``log.jsonl``, to append to."""
        return StepLog(self.path / "log.jsonl")

    def save_learned(self, learned: Learned) -> None:
        """Keep the learned tokens in both forms, and what was made of the noise predictor.

        ``embeddings.safetensors`` comes last: it says that all of them are there.
        """
        from safetensors.torch import save

        tuning = learned.tuning
        if tuning.lora:
            self._write("lora.safetensors", save({key: _plain(value) for key, value in tuning.lora.items()}))
        if tuning.weights:
            if tuning.weights_config:
                self._write_json(f"{tuning.folder}/config.json", tuning.weights_config, indent=2)
            # diffusers does not read a file that does not say which framework it is of.
            write_tensors_atomically(self.path / tuning.folder / WEIGHTS_FILE, tuning.weights, {"format": "pt"})
        everything: dict[str, Tensor] = {}
        for token, rows in learned.tokens.items():
            # One encoder: the file that diffusers' load_textual_inversion reads. Several: as other tools write them.
            own = {token: next(iter(rows.values()))} if len(rows) == 1 else rows
            plain = {key: _plain(row) for key, row in own.items()}
            self._write(f"embeddings/{token.strip('<>')}.safetensors", save(plain))
            everything |= {_key(token, encoder, rows): _plain(row) for encoder, row in rows.items()}
        self._write("embeddings.safetensors", save(everything))

    def load_tokens(self, encoders: Sequence[str] | None) -> dict[str, dict[str, Tensor]] | None:
        """The learned tokens: name -> text encoder -> its row, float32; None before they are there.

        encoders: the text encoders that tokens have rows for; None for a run of schema version 1, which had one and
            did not say which.
        """
        from safetensors.torch import load_file

        path = self.path / "embeddings.safetensors"
        if not path.is_file():
            return None
        rows = load_file(path)
        if encoders is None:
            return {token: {_clip_of(row): row} for token, row in rows.items()}
        if len(encoders) == 1:
            return {token: {encoders[0]: row} for token, row in rows.items()}
        tokens: dict[str, dict[str, Tensor]] = {}
        for key, row in rows.items():
            token, _, encoder = key.rpartition(".")
            tokens.setdefault(token, {})[encoder] = row
        return {token: {encoder: own[encoder] for encoder in encoders} for token, own in tokens.items()}

    def load_tuning(self) -> FineTuning:
        """What was made of the noise predictor; nothing where it was not trained."""
        from safetensors.torch import load_file

        file = self.path / "lora.safetensors"
        lora = load_file(file) if file.is_file() else {}
        for folder in WEIGHTS_FOLDERS:
            file = self.path / folder / WEIGHTS_FILE
            if file.is_file():
                return FineTuning(lora, load_file(file), _read_json(file.with_name("config.json")) or {}, folder)
        return FineTuning(lora, folder=next(iter(lora)).partition(".")[0]) if lora else FineTuning()

    # --- What is made of it ------------------------------------------------------------------------------------------

    def has_sample(self, index: int, part: str, number: int, *, words_alone: bool = False) -> bool:
        """Whether this sample was generated already."""
        return (self.path / sample_name(index, part, number, words_alone=words_alone)).is_file()

    def save_sample(self, index: int, part: str, number: int, image: Image.Image, *, words_alone: bool = False) -> None:
        """Keep a generated image; ``part`` is ``"object"`` or an attribute, ``words_alone`` as in ``sample_name``."""
        self._write_image(sample_name(index, part, number, words_alone=words_alone), image)

    def save_attention(self, index: int, part: str, image: Image.Image) -> None:
        """Keep the attention map of one token, 8-bit grey."""
        self._write_image(f"attention/{index}-{part}.png", image)

    def save_timings(self, timings: Mapping[str, float]) -> None:
        """Keep the seconds spent so far, over all sittings."""
        self._write_json("checkpoint/timings.json", dict(timings))

    def load_timings(self) -> dict[str, float]:
        """The seconds spent so far."""
        return dict(_read_json(self.path / "checkpoint" / "timings.json") or {})

    def save_report(self, html: str) -> None:
        """Keep the report."""
        self._write("report.html", html.encode())

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest: the run is complete. Its checkpoint is no longer needed."""
        self._write_json("manifest.json", manifest, indent=1)
        for name in ("learner.safetensors", "regions.json", "timings.json", "run.json"):
            (self.path / "checkpoint" / name).unlink(missing_ok=True)
        folder = self.path / "checkpoint"
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    # --- Files -------------------------------------------------------------------------------------------------------

    def _write(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, data)

    def _write_json(self, name: str, value: object, indent: int | None = None) -> None:
        write_json_atomically(self.path / name, value, indent)

    def _write_image(self, name: str, image: Image.Image) -> None:
        write_image_atomically(self.path / name, image)


class FileCheckpoint:
    """A learner's state in one file: tensors, and the JSON state in its metadata. See ``protocols.Checkpoint``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the state of the last save, or None."""
        from safetensors import safe_open

        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, json.loads(file.metadata()["state"])

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the last save by this one, in one step."""
        write_tensors_atomically(self.path, tensors, {"state": json.dumps(dict(state))})


class StepLog:
    """``log.jsonl``: one line a step. A resumed run repeats the steps after its checkpoint; their old lines go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def write(self, step: Step) -> None:
        """Append a step's line."""
        if self._file is None:
            self._drop_from(step.step)
            self._file = self.path.open("a", encoding="utf-8")
        line = {"step": step.step, "total": step.total, "phase": step.phase, "losses": dict(step.losses)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _drop_from(self, first: int) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < first:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the process was killed
        write_atomically(self.path, "".join(kept).encode())

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _mask_to_text(mask: Tensor) -> str:
    """A mask as a PNG in base64: what belongs to a JSON file is written with it, in one step."""
    png = io.BytesIO()
    Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def _mask_from_text(text: str) -> Tensor:
    import torch

    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return torch.from_numpy(np.asarray(image.convert("L")) > 127)


def mask_name(region: Region) -> str:
    """Where a region's mask is, relative to the run directory."""
    return f"masks/{region.index}-{region.label}.png"


def sample_name(index: int, part: str, number: int, *, words_alone: bool = False) -> str:
    """Where a sample is, relative to the run directory; ``words_alone``: its counterpart without a learned token."""
    return f"samples/{index}-{part}{WORDS_ALONE if words_alone else ''}-{number}.png"


def _key(token: str, encoder: str, rows: Mapping[str, Tensor]) -> str:
    """A row's name in ``embeddings.safetensors``: the token's own where there is one text encoder."""
    return token if len(rows) == 1 else f"{token}.{encoder}"


def _clip_of(row: Tensor) -> str:
    """The text encoder of a run of schema version 1: these had one CLIP, which is told by the length of its rows."""
    return {1024: "clip_h", 1280: "clip_g"}.get(len(row), "clip_l")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _becomes(path: Path) -> str | None:
    """The name of the file that a temporary one was to become; None if it is none."""
    match = re.fullmatch(r"\.(.+?)(\.\d+)?\.part", path.name)
    return match[1] if match else None


def _read_json(path: Path) -> Any:
    """The file's content; None if it is not there or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float().contiguous().clone()
