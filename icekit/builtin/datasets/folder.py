"""The data set that is a folder of the user's own pictures, with masks where there are some."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from icekit.builtin.datasets.settings import FolderSettings
from icekit.builtin.segmentors.masks import SUFFIXES, fit_mask, image_files, natural_order, read_mask
from icekit.files import is_hidden, read_bytes
from icekit.pictures import MAX_BYTES, open_picture, same_proportions
from icekit.pixels import cover
from icekit.protocols import BenchPicture, InputError, TrueConcept
from icekit.protocols.values import bounded
from icekit.waiting import told

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 100
"""Of a picture's name, by which files of a bench are called."""


class FolderDataset:
    """The user's own pictures from a folder, with their masks where there are some.

    Either pictures side by side, the masks of ``photo.jpg`` in ``masks/photo/``; or a folder for each picture, the
    masks beside it (``mask0.png``, ...) or in its ``masks/``. White is the object. A mask ``0-red-bowl.png`` says its
    word, ``mask0.png`` does not.
    """

    Settings = FolderSettings

    def __init__(self, settings: FolderSettings) -> None:
        if settings.path is None:
            raise InputError("data set 'folder' has no folder: give one, as in --path FOLDER")
        if not settings.path.is_dir():
            raise InputError(f"dataset.path: no such folder: {settings.path}")
        self._path = settings.path

    @property
    def metrics(self) -> Sequence[str]:
        """Those that need no truth, and those that need masks or words."""
        return ("sim_i", "sim_c", "acc1", "acc3", "miou", "recall", "word_accuracy")

    def pictures(self, count: int | None, seed: int, size: tuple[int, int]) -> Sequence[BenchPicture]:
        """The pictures in the natural order of their names, whatever the seed; see ``protocols.Dataset``."""
        entries = find_pictures(self._path)
        if not entries:
            raise InputError(f"no picture in {self._path}: it needs image files, or folders with one each")
        if count is not None and count > len(entries):
            raise InputError(f"--n {count}: {self._path} has {len(entries)} pictures")
        names = safe_names([name for name, _, _ in entries])
        chosen = list(zip(names, entries, strict=True))[:count]
        return [
            BenchPicture(name, picture, concepts_of(picture, masks, size))
            for name, (_, picture, masks) in told(chosen, f"reading the pictures of {self._path}")
        ]


def find_pictures(folder: Path) -> list[tuple[str, Path, list[Path]]]:
    """The pictures of a folder: (name, file, mask files in their order)."""
    found = []
    for path in sorted((one for one in folder.iterdir() if not is_hidden(one)), key=natural_order):
        if path.is_dir() and path.name != "masks":
            files = _image_files(path)
            pictures = [file for file in files if not file.stem.startswith("mask")]
            beside = [file for file in files if file.stem.startswith("mask")]
            if len(pictures) > 1:  # a run directory, say: image.png is the picture
                pictures = [file for file in pictures if file.stem in ("image", "img")]
            if pictures:
                found.append((path.name, pictures[0], beside or _image_files(path / "masks")))
        elif path.suffix.lower() in SUFFIXES:
            found.append((path.stem, path, _image_files(folder / "masks" / path.stem)))
    names = [name for name, _, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{folder} has several pictures called {twice!r}: names must differ")
    return found


def safe_names(names: Sequence[str]) -> list[str]:
    """Names that files can have: of word characters, dots and hyphens, of bounded length.

    Those that would be the same, in a file system that knows no case too, all get digits of their own.
    """
    safe = [bounded(re.sub(r"[^\w.-]+", "-", name), MAX_NAME_BYTES) for name in names]
    counts = Counter(one.casefold() for one in safe)
    return [
        bounded(one, MAX_NAME_BYTES - 9) + "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        if counts[one.casefold()] > 1
        else one
        for one, name in zip(safe, names, strict=True)
    ]


def _image_files(folder: Path) -> list[Path]:
    return image_files(folder) if folder.is_dir() else []


def concepts_of(picture: Path, files: Sequence[Path], size: tuple[int, int]) -> tuple[TrueConcept, ...]:
    """A picture's concepts from its mask files, (height, width) ``size``.

    An object outside the middle of the picture, which is what a bench shows of it, is left out.

    Raises:
        InputError: a file cannot be read; a mask is empty, or has not the picture's proportions; all are outside.
    """
    if not files:
        return ()
    try:
        whole = open_picture(read_bytes(picture, MAX_BYTES), str(picture)).size
    except OSError as error:
        raise InputError(f"{picture} cannot be read: {error.strerror or error}") from error
    concepts = []
    for file in files:
        mask = read_mask(file)
        height, width = mask.shape
        if not same_proportions((width, height), whole):
            raise InputError(
                f"mask {file} is {width} x {height}, {picture} is {whole[0]} x {whole[1]}: a mask must have the "
                "proportions of its picture, turned upright"
            )
        if mask.any() and not bool(cover(mask, size).any()):
            log.warning("%s is left out: it is outside the middle of %s, which is what the model sees", file, picture)
            continue
        concepts.append(TrueConcept(fit_mask(mask, size, file), word_of(file)))
    if not concepts:
        raise InputError(f"{picture}: none of its masks is within its middle, which is what the model sees")
    return tuple(concepts)


def word_of(mask: Path) -> str | None:
    """``0-red-bowl.png`` -> ``"red bowl"``; None where the name says no word."""
    match = re.fullmatch(r"\d+-(.+)", mask.stem)
    return match[1].replace("-", " ") if match else None
