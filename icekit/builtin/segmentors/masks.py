"""The segmentor that needs no model: the user's own mask files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BeforeValidator, Field
from torch import Tensor

from icekit.pixels import fit
from icekit.protocols import Backbone, ComponentSettings, InputError, Proposal
from icekit.words import WordList

SUFFIXES = frozenset({".png", ".bmp", ".gif", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
"""What is taken for a mask in a folder."""


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class MaskFilesSegmentor:
    """The user's own masks, from files: white (128 of 255 or more) is the object.

    A ``protocols.Proposer``: its masks are all the regions there are.

    The files of a folder are taken in the natural order of their names (``mask2.png`` before ``mask10.png``), listed
    files in the order listed. All are fitted to the model's shape as the image is, so they must be drawn on the image
    as it was before, or on the ``image.png`` of a run.

    Raises:
        InputError: no file, no such file, not an image, nothing white in it, or files that differ in size.
    """

    class Settings(ComponentSettings):
        """Settings of the ``masks`` segmentor."""

        files: Annotated[tuple[Path, ...], BeforeValidator(_one_or_more)] = Field(
            (), description="mask images, or one folder of them; white is the object"
        )
        words: WordList = Field(
            (), description="what they show, in the same order: cup,ball; none: the retriever names them"
        )

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        paths = mask_paths(settings.files)
        sizes = {path: mask_size(path) for path in paths}
        for path, size in sizes.items():
            if size != sizes[paths[0]]:
                raise InputError(
                    f"masks differ in size: {path} is {size[0]} x {size[1]}, {paths[0]} is "
                    f"{sizes[paths[0]][0]} x {sizes[paths[0]][1]}: all must have the size of the image"
                )
        self._words = settings.words
        if self._words and len(self._words) != len(paths):
            raise InputError(f"segmentor.words: {len(self._words)} words for {len(paths)} masks; give one for each")
        self._masks = [load_mask(path, backbone.image_size) for path in paths]

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

    Raises:
        InputError: nothing given, no such file, or a folder without an image.
    """
    if not files:
        raise InputError("segmentor 'masks' has no files: give some, as in --set segmentor.files=FOLDER")
    paths: list[Path] = []
    for given in files:
        if given.is_dir():
            found = sorted((path for path in given.iterdir() if path.suffix.lower() in SUFFIXES), key=natural_order)
            if not found:
                raise InputError(f"segmentor.files: no images in the folder {given}")
            paths += found
        elif given.is_file():
            paths.append(given)
        else:
            raise InputError(f"segmentor.files: no such file or folder: {given}")
    return paths


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts ``mask2.png`` before ``mask10.png``."""
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in re.split(r"(\d+)", path.name)]


def mask_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file, pixels. Raises InputError when it is no image."""
    return _open(path).size


def load_mask(path: Path, shape: tuple[int, int]) -> Tensor:
    """One mask file -> bool ``shape``, (height, width): fitted to it as images are, half white or more kept.

    Raises:
        InputError: not an image, or nothing white in the part of it that is kept.
    """
    image = _open(path)
    if image.mode.startswith(("I", "F")):  # 16-bit greys: what is not 0 in a mask of two values is the top one
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((255 * values / max(float(values.max()), 1e-9)).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    mask = torch.from_numpy(np.asarray(fit(image.convert("L"), shape, Image.Resampling.BILINEAR)) >= 128)
    if not bool(mask.any()):
        raise InputError(f"mask {path} is empty: no pixel of it that the model sees is white (128 of 255 or more)")
    return mask


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            return ImageOps.exif_transpose(file)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"mask {path} is not an image that can be read: give a PNG, white where the object is"
        ) from error
