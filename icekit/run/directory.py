"""A run directory, read and written: everything that icekit keeps on disk is in this module.

Every file is written beside its place and moved there in one step, so that a killed run leaves whole files only. While
a run is under way its state is in ``checkpoint/``; ``manifest.json`` comes last and makes it complete. What was written
is in a record, ``checkpoint/written.jsonl`` and then the manifest's ``files``: all that is ever deleted or replaced. A
run that is to replace another is built in the subfolder ``.next`` (see ``ownership``).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icekit.protocols import FineTuning, InputError, Learned, Region, Step
from icekit.protocols.errors import printable
from icekit.run.atomic import (
    write_atomically,
    write_image_atomically,
    write_json_atomically,
    write_tensors_atomically,
    writing,
)
from icekit.run.evaluations import Evaluations
from icekit.run.exports import Exports, is_exported
from icekit.run.ownership import (
    EXPORTS,
    LOCK,
    NEXT,
    Written,
    becomes,
    check_way,
    delete,
    delete_files,
    exchange,
    finish_exchange,
    in_the_way,
    refuse_links,
    remove_empty_folders,
    remove_next,
)
from icekit.run.reading import DamagedError, Files, decode_picture, listed, parse_json
from icekit.run.records import Begun, CountsRecord, LocatedRecord, OriginRecord, Started, Timings
from icekit.settings import Settings
from icekit.wording import named, option, run_into

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

MAX_DIMENSIONS, MAX_SPACE = 8192, 200
"""Most numbers of a vector (sqlite-vec's own bound), and most characters of the name of their space."""

_RECORD = "checkpoint/written.jsonl"
_STARTED = "checkpoint/run.json"
CARD = "README.md"
"""The model card, which hubs show of a directory; see ``card``."""
VECTORS = "vectors.safetensors"
"""Where each concept lies in the space of the retriever's CLIP, see ``protocols.Embedder``."""
_IN_EVERY_RUN = ("manifest.json", "image.png", "settings.toml", "log.jsonl", "embeddings.safetensors", CARD)
_CHECKPOINT = (
    "checkpoint/learner.safetensors",
    "checkpoint/regions.json",
    "checkpoint/timings.json",
    "checkpoint/evaluations.json",
    _RECORD,
    _STARTED,
)
"""In the order in which they are deleted: as long as the last is there, the rest is icekit's."""
EXPORTED_BEFORE = ("report.html",)
"""What every run wrote before exporters were plugins; where the manifest names it, it is the run's own to this day."""
_OWN_FILES = (*_IN_EVERY_RUN, *EXPORTED_BEFORE, VECTORS, "lora.safetensors", EXPORTS, *_CHECKPOINT)
_OWN_PATTERNS = {
    "masks": r"\d+-.+\.png",
    "masks/original": r"\d+-.+\.png",
    "embeddings": r".+-\d+(-.+)?\.safetensors",
    **dict.fromkeys(WEIGHTS_FOLDERS, r"config\.json|diffusion_pytorch_model\.safetensors"),
    "samples": r"\d+-.+-\d+\.png",
    "attention": r"\d+-.+\.png",
    "checkpoint": r"run\.json",
}
"""What a run writes into its directory, and so, with what exporters wrote there, all that is ever deleted, whatever a
record says."""


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

    def is_as(self, other: Located) -> bool:
        """Whether both are finished with the same regions: what is learned of them is the same."""
        if not (self.finished and other.finished) or len(self.regions) != len(other.regions):
            return False
        return all(
            (one.index, one.word, dict(one.hints)) == (two.index, two.word, dict(two.hints))
            and one.mask.shape == two.mask.shape
            and bool((one.mask == two.mask).all())
            for one, two in zip(self.regions, other.regions, strict=True)
        )


@dataclass(frozen=True)
class Vectors:
    """Concepts of a run as points of a space. space: see ``protocols.Embedder``. rows: float32 ``[N, D]``, of length
    one, in the order of the manifest's concepts.
    """

    space: str
    rows: NDArray[np.float32]


def is_space(name: object) -> bool:
    """Whether this can be the name of a space: a line of at most 200 characters that can be printed."""
    return isinstance(name, str) and 0 < len(name) <= MAX_SPACE and name == printable(name, MAX_SPACE)


def check_place(path: Path, what: str, *, resume: bool, overwrite: bool) -> None:
    """Whether a folder can be here, and what is to become of one that is.

    what: is to be written into it, ``"a run"``, say.

    Raises:
        InputError: a file is in the way, or both ``resume`` and ``overwrite`` were asked for.
    """
    if resume and overwrite:
        raise InputError(
            f"{option('resume')} goes on with {what} and {option('overwrite')} replaces it: give one of them"
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: {named('out')} takes a folder")


class RunDirectory:
    """One run directory under way: what is in it, and how things get into it."""

    def __init__(self, path: str | Path, home: Path | None = None) -> None:
        """Open it, or say where it is to be.

        home: where its files will be in the end, if not there.
        """
        self.path = Path(path)
        self.home = home or self.path
        self.files = Files(self.path, f"the run in {self.path}", self._way_out)
        self.checkpoint = FileCheckpoint(self.path / "checkpoint" / "learner.safetensors", self.files)
        self.written = Written(self.path, _RECORD, before=self._names_by_pattern)

    # --- Whose it is, and how far it got -----------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return bool(self.read_manifest())

    @property
    def is_ours(self) -> bool:
        """Whether icekit made this directory. A manifest that cannot be read says nothing of that."""
        try:
            manifest = Files(self.path, "", lambda: "").json("manifest.json")
        except DamagedError:
            manifest = None
        return _is_manifest(manifest) or (self.path / "checkpoint" / "run.json").is_file()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; empty if there is none, or somebody else's. What is in it was not looked at: see ``Manifest``.

        Raises:
            DamagedError: it cannot be read.
        """
        manifest = self.files.json("manifest.json")
        return manifest if _is_manifest(manifest) else {}

    def started(self) -> Started | None:
        """What the run under way here began with; None if there is none, or it was only about to begin.

        Raises:
            DamagedError: its record is damaged.
        """
        name = "checkpoint/run.json"
        record = self.files.json(name)
        if record is None or not self.files.check(name, Begun, record).ready:
            return None
        return self.files.check(name, Started, record)

    def update_settings(self, settings: Settings) -> None:
        """Keep settings that changed since the run began: those that change nothing of what comes out."""
        name, values = "checkpoint/run.json", settings.model_dump(mode="json")
        record = self.files.json(name)
        if record["settings"] != values:
            self._write("settings.toml", settings.to_toml().encode())
            self._write_json(name, record | {"settings": values})

    def _way_out(self) -> str:
        """What to do where a file here is damaged."""
        if self.is_ours:
            return f"{run_into(self.home, 'overwrite')} makes the run anew"
        return f"make the run anew in another folder, as in {run_into('DIR')}"

    def check_usable(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a run may be written here.

        Raises:
            InputError: a file is in the way, the folder is somebody else's, or holds a run and neither ``resume`` nor
                ``overwrite`` was asked for.
        """
        check_place(self.path, "a run", resume=resume, overwrite=overwrite)
        if not self.path.exists():
            return
        self.finish_exchange()
        if self.is_ours:
            if not (resume or overwrite):
                kind = (
                    "a complete run" if self.is_complete else f"an interrupted run ({option('resume')} goes on with it)"
                )
                if self.is_complete and self.next.is_ours:
                    kind += " and one that was interrupted before it had replaced it "
                    kind += f"({option('resume')} goes on with that)"
                raise InputError(
                    f"{self.path} already holds {kind}: {option('overwrite')} replaces it, or choose another "
                    f"{named('out')}"
                )
            self._check_ownership()
        elif any(path.is_file() for path in self.path.rglob("*") if not self._is_of_a_beginning(path)):
            raise InputError(f"{self.path} is not empty and no run of icekit's: choose another {named('out')}")

    def _is_of_a_beginning(self, path: Path) -> bool:
        """Whether a process that was killed before it had begun left this."""
        return becomes(path) == "run.json" or path == self.path / LOCK

    def _check_ownership(self) -> None:
        """Whether what a run writes in any case can be written: no link is on the way, and nothing of others."""
        own = self.own_names()
        for name in sorted({*own, *_OWN_FILES, *_OWN_PATTERNS, NEXT}):
            refuse_links(self.path, name)
        for name in _IN_EVERY_RUN:
            if os.path.lexists(self.path / name) and name not in own:
                raise in_the_way(self.path / name)

    def begin(
        self,
        settings: Settings,
        source: str,
        sha256: str,
        image: Image.Image,
        plugins: Sequence[OriginRecord] = (),
    ) -> None:
        """Start afresh, replacing what icekit wrote here before (and nothing else).

        Raises:
            CannotWrite: the system refuses.
            InputError: somebody else's file is in the way.
        """
        record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "ready": False}
        # First of all: from here on the directory is icekit's, whenever the process may be killed.
        self._write_json(_STARTED, record)
        self.delete_own(keep=(_STARTED, _RECORD))
        self.written.reset()
        self.written.claim(_CHECKPOINT[0])
        self._write("settings.toml", settings.to_toml().encode())
        self._write_image("image.png", image)
        record |= {"ready": True, "source": source, "sha256": sha256, "settings": settings.model_dump(mode="json")}
        record |= {"plugins": [one.model_dump() for one in plugins]}
        self._write_json(_STARTED, record)

    def clear_leftovers(self) -> None:
        """Delete what a killed process had half-written, and what it had no more time to delete."""
        for path in self._files_by_pattern():
            if becomes(path):
                delete(path)
        if self.is_complete:
            if (self.path / _STARTED).is_file():
                self._delete_checkpoint()
            remove_empty_folders(self.path, [_STARTED])

    def delete_own(self, keep: Collection[str] = ()) -> None:
        """Delete what icekit wrote here, by its record.

        keep: names that stay.
        """
        names = self.own_names() - {*keep}
        for path in self._files_by_pattern():
            if becomes(path):
                delete(path)
        delete_files(self.path, names)

    def own_names(self) -> set[str]:
        """The files that icekit wrote here, exporters among it, relative to the directory.

        A run of a version that kept no record: those of names that icekit gives.
        """
        try:
            manifest = self.read_manifest()
        except DamagedError:
            manifest = {}
        if isinstance(manifest.get("files"), list):
            names = {name for name in manifest["files"] if isinstance(name, str)} | {"manifest.json"}
            names |= {*_CHECKPOINT} if (self.path / _STARTED).is_file() else set()
        elif self.written.is_there:
            names = self.written.names() | {_RECORD, _STARTED}
        else:
            names = self._names_by_pattern()
        return {name for name in names if is_own_name(name)} | Exports(self.path).names()

    def exported_before(self) -> set[str]:
        """The files here that a version of icekit wrote as the run's own which exporters write today."""
        return self.own_names() & {*EXPORTED_BEFORE}

    def _names_by_pattern(self) -> set[str]:
        paths = [path for path in self._files_by_pattern() if not becomes(path)]
        # Versions that kept no record wrote no card and no vectors: those that are there are the user's.
        return {path.relative_to(self.path).as_posix() for path in paths if path.name not in (CARD, VECTORS)}

    def _files_by_pattern(self) -> list[Path]:
        """Files whose names icekit gives, half-written ones among them, and folders of such."""
        folders = [self.path / name for name in _OWN_PATTERNS if not (self.path / name).is_symlink()]
        paths = [path for folder in [self.path, *folders] if folder.is_dir() for path in folder.iterdir()]
        final = {path: path.with_name(becomes(path) or path.name).relative_to(self.path).as_posix() for path in paths}
        return [path for path in paths if (path.is_file() or becomes(path)) and is_own_name(final[path])]

    # --- One run in the place of another -----------------------------------------------------------------------------

    @property
    def next(self) -> RunDirectory:
        """Where a run is built that is to replace the one here."""
        return RunDirectory(self.path / NEXT, self.path)

    @property
    def is_settled(self) -> bool:
        """Whether the run is complete and no process has left anything to be done."""
        return self.is_complete and not any((self.path / name).is_dir() for name in ("checkpoint", NEXT))

    def discard_next(self) -> None:
        """Delete what was built in ``next``."""
        if self.next.is_ours:
            self.next.delete_own()
        remove_next(self.path)

    @property
    def holds_run(self) -> bool:
        """Whether a run is here that is complete or was begun, damaged or not."""
        try:
            return self.is_complete or self.started() is not None
        except DamagedError:
            return True

    def check_replaceable(self, finished: RunDirectory) -> None:
        """Whether the run in ``next`` can replace the one here, which is the user's to mend.

        Raises:
            InputError: a file that is not icekit's is in the way, or a symbolic link is.
        """
        check_way(self.path, self.own_names(), [name for name in finished.own_names() if name not in _CHECKPOINT])

    def replace(self) -> None:
        """Put the complete run in ``next`` into the place of the one here; whoever opens the directory ends it if need
        be: ``finish_exchange``.

        Raises:
            InputError: see ``check_replaceable``; nothing was changed then.
        """
        self.next.clear_leftovers()
        exchange(self.path, old=self.own_names(), new=self.next.own_names(), last="manifest.json")

    def finish_exchange(self, *, writing: bool = False) -> None:
        """End the exchange that a killed process had begun, if there is one.

        writing: whether this process is known to be ``writing_into`` the directory.

        Raises:
            InputError: another process is at it, or it cannot be ended.
        """
        finish_exchange(self.path, lambda name: is_own_name(name) or is_exported(self.path, name), writing=writing)

    # --- Stage one ---------------------------------------------------------------------------------------------------

    def load_image(self, size: tuple[int, int] | None = None) -> Image.Image:
        """The image as the run saw it.

        size: (width, height) that it must have, pixels.

        Raises:
            DamagedError: it is not there, damaged, or of another size.
        """
        image = self.files.picture("image.png", size)
        if image is None:
            raise self.files.damaged("image.png", "it is missing")
        return image.convert("RGB")

    def save_picture(self, name: str, picture: Image.Image) -> None:
        """Write a picture under one of the names that a run's files have."""
        self._write_image(name, picture)

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
        for name in self.own_names() - current:  # a region that was renamed left its mask's old name
            if name.startswith("masks/"):
                (self.path / name).unlink(missing_ok=True)

    def load_located(self, size: tuple[int, int] | None = None) -> Located:
        """The regions found so far.

        size: (width, height) that masks must have, pixels.

        Raises:
            DamagedError: their record or a mask is damaged, not there, or of another size.
        """
        name = "checkpoint/regions.json"
        record = self.files.record(name, LocatedRecord)
        if record is None:
            return Located()
        regions = [
            Region(one.index, one.word, one.score, self._load_mask(one.mask, size), one.hints) for one in record.regions
        ]
        erased = None
        if record.erased is not None:
            try:
                erased = _to_mask(decode_picture(base64.b64decode(record.erased, validate=True), size))
            except ValueError as error:
                raise self.files.damaged(name, f"erased: {error}") from error
        rounds = len(record.regions) + len(record.refused) if record.rounds is None else record.rounds
        return Located(tuple(regions), tuple(record.refused), record.finished, rounds, record.last, erased)

    def save_vectors(self, space: str, vectors: Sequence[Tensor]) -> None:
        """Keep where each region lies in the space of the retriever's CLIP.

        space: see ``protocols.Embedder``. vectors: float32 ``[D]`` of length one, a region each, in their order.
        """
        import torch
        from safetensors.torch import save

        self._write(VECTORS, save({"vectors": torch.stack([_plain(one) for one in vectors])}, {"space": space}))

    def load_vectors(self, count: int) -> Vectors | None:
        """Where each concept lies; None where the run did not keep it. count: of the concepts.

        Raises:
            DamagedError: the file is damaged, or of something else.
        """
        found = self.files.arrays(VECTORS)
        if found is None:
            return None
        rows, space = found[0].get("vectors"), found[1].get("space", "")
        if len(found[0]) != 1 or rows is None or rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != count:
            raise self.files.damaged(VECTORS, f"it should hold one tensor, vectors: float32 [{count}, D]")
        if not 1 <= rows.shape[1] <= MAX_DIMENSIONS:
            raise self.files.damaged(VECTORS, f"its vectors have {rows.shape[1]} numbers: 1 to {MAX_DIMENSIONS} it is")
        if not bool((np.abs(np.linalg.norm(rows.astype(np.float64), axis=1) - 1) < 1e-3).all()):
            raise self.files.damaged(VECTORS, "its vectors should be of length one")
        if not is_space(space):
            raise self.files.damaged(VECTORS, "it does not say of which space its vectors are")
        return Vectors(space, rows)

    def forget_vectors(self) -> None:
        """Delete them: the regions are others by now."""
        if VECTORS in self.own_names():
            delete_files(self.path, [VECTORS])

    def forget_learned(self) -> None:
        """Delete what was learned and shown of the regions: they are others by now."""
        folders = ("embeddings", *WEIGHTS_FOLDERS, "samples", "attention")
        files = ("checkpoint/learner.safetensors", "log.jsonl", "embeddings.safetensors", "lora.safetensors")
        own = self.own_names()
        delete_files(self.path, {name for name in own if name in files or name.partition("/")[0] in folders})

    def _load_mask(self, name: str, size: tuple[int, int] | None) -> Tensor:
        picture = self.files.picture(name, size)
        if picture is None:
            raise self.files.damaged(name, "it is missing")
        return _to_mask(picture)

    # --- Stage two ---------------------------------------------------------------------------------------------------

    def open_log(self) -> StepLog:
        """``log.jsonl``, to append to."""
        self._claim("log.jsonl")
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
            self._claim(f"{tuning.folder}/{WEIGHTS_FILE}")
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

    def load_tokens(
        self, lengths: Mapping[str, int] | None, expected: Collection[str]
    ) -> dict[str, dict[str, Tensor]] | None:
        """The learned tokens: name -> text encoder -> its row, float32; None before they are there.

        lengths: the text encoders that tokens have rows for, and how long these are; None for a run of schema version
            1, which had one and did not say which.
        expected: the tokens that there should be.

        Raises:
            DamagedError: the file is damaged, tokens or rows are missing or another run's, or numbers are not finite.
        """
        name = "embeddings.safetensors"
        rows = self.files.finite_tensors(name)
        if rows is None:
            return None
        keys = {
            token: {_key(token, encoder, lengths or [""]): encoder for encoder in lengths or [""]} for token in expected
        }
        known = {key for own in keys.values() for key in own}
        if missing := known - rows.keys():
            raise self.files.damaged(name, f"it lacks {listed(missing)}")
        if foreign := rows.keys() - known:
            raise self.files.damaged(name, f"it has {listed(foreign)}, which this run does not know")
        tokens: dict[str, dict[str, Tensor]] = {}
        for token, own in keys.items():
            tokens[token] = {}
            for key, encoder in own.items():
                row = rows[key]
                length = row.numel() if lengths is None else lengths[encoder]
                if not row.is_floating_point() or tuple(row.shape) != (length,):
                    kind = f"{str(row.dtype).removeprefix('torch.')} {list(row.shape)}"
                    raise self.files.damaged(name, f"{printable(key, 200)} is {kind}, and should be float32 [{length}]")
                tokens[token][encoder or _clip_of(row)] = row.float()
        return tokens

    @property
    def is_fine_tuned(self) -> bool:
        """Whether there are trained weights of the noise predictor, an adapter or all of them. Raises DamagedError."""
        return bool(self.tuning_files())

    def tuning_files(self) -> dict[str, Path]:
        """The files of what was made of the noise predictor, by name. Raises DamagedError."""
        names = ["lora.safetensors"]
        for folder in WEIGHTS_FOLDERS:
            if self.files.find(f"{folder}/{WEIGHTS_FILE}"):
                names += [f"{folder}/config.json", f"{folder}/{WEIGHTS_FILE}"]
        return {name: path for name in names if (path := self.files.find(name))}

    def load_tuning(self) -> FineTuning:
        """What was made of the noise predictor; nothing where it was not trained.

        Raises:
            DamagedError: a file is damaged, or is not of weights.
        """
        name = "lora.safetensors"
        lora = self.files.finite_tensors(name) or {}
        folders = {key.partition(".")[0] for key in lora}
        if len(folders) > 1 or not folders <= set(WEIGHTS_FOLDERS):
            raise self.files.damaged(name, f"its weights are of {listed(folders)}: it is no adapter of icekit's")
        for folder in WEIGHTS_FOLDERS:
            weights = self.files.finite_tensors(f"{folder}/{WEIGHTS_FILE}")
            if weights is not None:
                return FineTuning(lora, weights, self.weights_config(folder), folder)
        return FineTuning(lora, folder=folders.pop()) if lora else FineTuning()

    def weights_config(self, folder: str) -> dict[str, Any]:
        """The configuration beside fine-tuned weights; empty where there is none. Raises DamagedError."""
        config = self.files.json(f"{folder}/config.json")
        if config is not None and not isinstance(config, dict):
            raise self.files.damaged(f"{folder}/config.json", "it should be a JSON object")
        return config or {}

    def save_card(self, text: str) -> None:
        """Keep the model card; what no UTF-8 holds, of file names say, is written as an escape."""
        self._write(CARD, text.encode("utf-8", "backslashreplace"))

    # --- What is made of it ------------------------------------------------------------------------------------------

    def has_sample(self, index: int, part: str, number: int, *, words_alone: bool = False) -> bool:
        """Whether this sample was generated already, and is whole: else it is made again, with the same bits."""
        name = sample_name(index, part, number, words_alone=words_alone)
        if self.files.find(name) is None:
            return False
        try:
            return self.files.picture(name) is not None
        except DamagedError:
            return False

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
        """The seconds spent so far. Raises DamagedError."""
        record = self.files.record("checkpoint/timings.json", Timings)
        return {} if record is None else record.model_dump()

    def save_evaluations(self, evaluations: Mapping[str, Evaluations]) -> None:
        """Keep how often the noise predictor was evaluated so far, over all sittings, by what for."""
        record = {what: asdict(count) for what, count in evaluations.items()}
        self._write_json("checkpoint/evaluations.json", {"evaluations": record})

    def load_evaluations(self) -> dict[str, Evaluations]:
        """Evaluations so far, by what they were for. Raises DamagedError."""
        record = self.files.record("checkpoint/evaluations.json", CountsRecord)
        found = record.evaluations if record else {}
        return {what: Evaluations(**count.model_dump()) for what, count in found.items()}

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, with the names of all ``files``: the run is complete, and its checkpoint goes."""
        self._claim("manifest.json")
        names = {name for name in self.own_names() - {*_CHECKPOINT} if (self.path / name).is_file()}
        self._write_json("manifest.json", {**manifest, "files": sorted(names | {"manifest.json"})}, indent=1)
        self._delete_checkpoint()

    def _delete_checkpoint(self) -> None:
        for name in _CHECKPOINT:
            delete_files(self.path, [name])

    # --- Files -------------------------------------------------------------------------------------------------------

    def _claim(self, name: str) -> None:
        """Make sure that a file may be written, and put it into the record.

        Raises:
            InputError: somebody else's file is in the way, or a symbolic link is.
        """
        if name == _STARTED:  # by which the directory is known to be icekit's, before there is a record
            refuse_links(self.path, name)
        elif self.is_complete:
            refuse_links(self.path, name)
            if os.path.lexists(self.path / name) and name not in self.own_names():
                raise in_the_way(self.path / name)
        else:
            self.written.claim(name)

    def _write(self, name: str, data: bytes) -> None:
        self._claim(name)
        write_atomically(self.path / name, data)

    def _write_json(self, name: str, value: object, indent: int | None = None) -> None:
        self._claim(name)
        write_json_atomically(self.path / name, value, indent)

    def _write_image(self, name: str, image: Image.Image) -> None:
        self._claim(name)
        write_image_atomically(self.path / name, image)


class FileCheckpoint:
    """A learner's state in one file: tensors, and the JSON state in its metadata. See ``protocols.Checkpoint``."""

    def __init__(self, path: Path, files: Files | None = None) -> None:
        """Keep it in this file.

        files: those of the directory that it lies in; by default of its own folder.
        """
        self.path = path
        folder = path.parent
        self._files = files or Files(folder, f"the learning state in {folder}", lambda: "delete it to learn afresh")

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the state of the last save, or None.

        Raises:
            DamagedError: the file is damaged, or somebody else's.
        """
        name = self.path.relative_to(self._files.path).as_posix()
        found = self._files.tensors(name)
        if found is None:
            return None
        tensors, metadata = found
        try:
            state = parse_json(metadata.get("state", "").encode())
        except ValueError as error:
            raise self._files.damaged(name, f"its state cannot be read: {error}") from error
        if not isinstance(state, dict):
            raise self._files.damaged(name, "its state should be a JSON object")
        return tensors, state

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
        line = {"step": step.step, "total": step.total, "phase": step.phase, "losses": dict(step.losses)}
        with writing(self.path):
            if self._file is None:
                self._drop_from(step.step)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a line that could not be written, which was said
                self._file.close()

    def _drop_from(self, first: int) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_file():
            raise in_the_way(self.path)  # a pipe, say, into which nobody would take what is written
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


def _to_mask(picture: Image.Image) -> Tensor:
    import torch

    return torch.from_numpy(np.asarray(picture.convert("L")) > 127)


def is_own_name(name: str) -> bool:
    """Whether icekit writes files of this name, relative to a run directory."""
    folder, _, file = name.rpartition("/")
    return name in _OWN_FILES or (folder in _OWN_PATTERNS and bool(re.fullmatch(_OWN_PATTERNS[folder], file)))


def mask_name(region: Region) -> str:
    """Where a region's mask is, relative to the run directory."""
    return f"masks/{region.index}-{region.label}.png"


def original_mask_name(region: Region) -> str:
    """Where a region's mask in the photograph's own size is, relative to the run directory."""
    return f"masks/original/{region.index}-{region.label}.png"


def sample_name(index: int, part: str, number: int, *, words_alone: bool = False) -> str:
    """Where a sample is, relative to the run directory; ``words_alone``: its counterpart without a learned token."""
    return f"samples/{index}-{part}{WORDS_ALONE if words_alone else ''}-{number}.png"


def _key(token: str, encoder: str, rows: Collection[str]) -> str:
    """A row's name in ``embeddings.safetensors``: the token's own where there is one text encoder."""
    return token if len(rows) == 1 else f"{token}.{encoder}"


def _clip_of(row: Tensor) -> str:
    """The text encoder of a run of schema version 1: these had one CLIP, which is told by the length of its rows."""
    return {1024: "clip_h", 1280: "clip_g"}.get(len(row), "clip_l")


def _is_manifest(content: Any) -> bool:
    return isinstance(content, dict) and {"schema_version", "icekit_version"} <= content.keys()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float().contiguous().clone()
