"""The segmentor that needs no model: the user's own mask files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from icekit import wording
from icekit.builtin.segmentors.settings import MaskFilesSettings
from icekit.files import is_hidden, read_bytes
from icekit.pictures import MAX_BYTES, open_picture, same_proportions
from icekit.pixels import cover
from icekit.protocols import Backbone, InputError, Proposal

SUFFIXES = frozenset({".png", ".bmp", ".gif", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
"""What is taken for a mask in a folder."""


class MaskFilesSegmentor:
    """The user's own masks, from files: white (128 of 255 or more) is the object.

    A ``protocols.Proposer``: its masks are all the regions there are.

    The files of a folder are taken in the natural order of their names (``mask2.png`` before ``mask10.png``), listed
    files in the order listed. A mask is drawn on the picture as people see it, turned upright, in its size or another
    one of its proportions: the picture may have been made smaller. It is fitted to the model's shape as the picture is.

    Raises:
        InputError: no file, no such file, not an image, nothing white in it, or files that differ in their proportions.
    """

    Settings = MaskFilesSettings

    def __init__(self, settings: MaskFilesSettings, backbone: Backbone) -> None:
        paths = mask_paths(settings.files)
        masks = {path: read_mask(path) for path in paths}
        for path, mask in masks.items():
            _check_proportions(path, _size(mask), paths[0], _size(masks[paths[0]]))
        self._words = settings.words
        if self._words and len(self._words) != len(paths):
            raise InputError(f"segmentor.words: {len(self._words)} words for {len(paths)} masks; give one for each")
        self._masks = [fit_mask(masks[path], backbone.image_size, path) for path in paths]

    @staticmethod
    def check_picture(settings: MaskFilesSettings, picture: str, size: tuple[int, int]) -> None:
        """Whether the masks are of this picture, see ``protocols.Segmentor``: they must have its proportions."""
        for path in mask_paths(settings.files):
            _check_proportions(path, _size(read_mask(path)), picture, size)

    def propose(self, image: Tensor) -> list[Proposal]:
        """All masks, bool ``[H, W]``, in order, with their words where the user gave them.

        Raises:
            InputError: the image is not of the backbone's size.
        """
        for mask in self._masks:
            if mask.shape != image.shape[-2:]:
                raise InputError(f"masks are {tuple(mask.shape)}, the image is {tuple(image.shape[-2:])} pixels")
        words = self._words or (None,) * len(self._masks)
        return [Proposal(mask.clone(), word) for mask, word in zip(self._masks, words, strict=True)]


def mask_paths(files: tuple[Path, ...]) -> list[Path]:
    """The mask files meant by the setting ``files``: those listed, in order, or those of a folder, sorted naturally.

    What the system keeps in a folder (``.DS_Store``, ``._mask.png``) is passed over.

    Raises:
        InputError: nothing given, no such file, or a folder without an image.
    """
    if not files:
        example = wording.settings({"segmentor": {"files": "FOLDER"}})
        raise InputError(f"segmentor 'masks' has no files: give some, as in {example}")
    paths: list[Path] = []
    for given in files:
        if given.is_dir():
            found = image_files(given)
            if not found:
                raise InputError(f"segmentor.files: no images in the folder {given}")
            paths += found
        elif given.is_file():
            paths.append(given)
        elif given.exists():
            raise InputError(
                f"segmentor.files: {given} is no file or folder, but a pipe or a device: save it as a file"
            )
        else:
            raise InputError(f"segmentor.files: no such file or folder: {given}")
    return paths


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, by their names' ends, in natural order. Hidden ones are passed over."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not is_hidden(path))
    return sorted(files, key=natural_order)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts ``mask2.png`` before ``mask10.png``."""
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in re.split(r"(\d+)", path.name)]


def read_mask(path: Path) -> NDArray[np.bool_]:
    """One mask file, upright -> bool ``[H, W]``, True where it is white: 128 of 255, or half of its largest, or more.

    Raises:
        InputError: not an image.
    """
    try:
        image = open_picture(read_bytes(path, MAX_BYTES), f"mask {path}")
    except OSError as error:
        raise InputError(f"mask {path} cannot be read: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{error}; give a PNG, white where the object is") from error
    if image.mode.startswith(("I", "F")):  # greys of more than 8 bits: what is not 0 in a mask is the top value
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        return values >= max(float(values.max()) / 2, 1e-9)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return np.asarray(image.convert("L")) >= 128


def fit_mask(mask: NDArray[np.bool_], shape: tuple[int, int], path: Path) -> Tensor:
    """A mask, bool ``[H, W]`` -> bool ``shape``, (height, width): fitted to it as images are, see ``pixels.cover``.

    path: its file, for messages.

    Raises:
        InputError: nothing is white in the part of it that is kept.
    """
    fitted = cover(mask, shape)
    if not bool(fitted.any()):
        raise InputError(f"mask {path} is empty: no pixel of it that the model sees is white (128 of 255 or more)")
    return fitted


def _size(mask: NDArray[np.bool_]) -> tuple[int, int]:
    return mask.shape[1], mask.shape[0]


def _check_proportions(path: Path, size: tuple[int, int], other: str | Path, others: tuple[int, int]) -> None:
    if not same_proportions(size, others):
        raise InputError(
            f"mask {path} is {size[0]} x {size[1]}, {other} is {others[0]} x {others[1]}: a mask must have the "
            "proportions of the picture, turned upright (a run's masks are those of its image.png)"
        )
