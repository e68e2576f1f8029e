"""Load any image that people have, and say plainly why one cannot be used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icekit.files import read_bytes
from icekit.paths import user_path
from icekit.pictures import MAX_BYTES, MAX_PIXELS, check_pixels, open_picture, to_rgb, upright
from icekit.protocols import InputError

__all__ = ["MAX_PIXELS", "MIN_SIDE", "SourceImage", "load_image", "to_rgb"]

MIN_SIDE = 32
"""Shortest side in pixels. Below it there is nothing to find."""


@dataclass(frozen=True)
class SourceImage:
    """An image as the user gave it.

    source: the path as typed, or ``"image"`` when it came as an object.
    stem: what a run directory is named after.
    sha256: of the file's bytes (of the pixels when there is no file), hex.
    picture: the whole of it, sRGB, upright.
    """

    source: str
    stem: str
    sha256: str
    picture: Image.Image

    def fitted(self, size: tuple[int, int]) -> Image.Image:
        """The picture in a model's shape, (height, width): its middle, cut to these proportions and resized."""
        from icekit import pixels  # which imports torch

        return pixels.fit(self.picture, size)

    def mask_of(self, mask: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
        """A mask of the fitted picture, bool ``size``, in this one's own size: 8-bit, 0 or 255; what was cut is 0."""
        from icekit import pixels

        left, top, right, bottom = pixels.middle(self.picture.size, size)
        inner = (right - left, bottom - top)
        shown = Image.fromarray(mask.astype(np.uint8) * 255).resize(inner, Image.Resampling.BILINEAR)
        whole = Image.new("L", self.picture.size)
        whole.paste(shown.point(lambda value: 255 * (value >= 128)), (left, top))
        return whole

    def fitting(self, size: tuple[int, int]) -> dict[str, Any]:
        """What ``fitted`` does, for the manifest: the picture's size, and the box that is cut out and resized."""
        from icekit import pixels

        left, top, right, bottom = pixels.middle(self.picture.size, size)
        return {
            "source_width": self.picture.width,
            "source_height": self.picture.height,
            "box": [left, top, right, bottom],
        }


def load_image(image: str | Path | Image.Image) -> SourceImage:
    """Read an image file, or a pipe (or take a PIL image), turn it upright and make it sRGB of 8 bits.

    Transparent parts become white, an ICC profile is applied; other greys than those of 8 bits: ``pictures.to_grey``.

    Raises:
        InputError: missing, a folder, empty, truncated, no image, animated, too small or too large.
    """
    if isinstance(image, Image.Image):
        _check_size(image, "the image")
        picture = to_rgb(upright(image, "the image"))
        return SourceImage("image", "image", hashlib.sha256(picture.tobytes()).hexdigest(), picture)
    path = user_path(image)
    try:
        data = read_bytes(path, MAX_BYTES)
    except IsADirectoryError as error:
        raise InputError(f"{image} is a folder: give one image file") from error
    except FileNotFoundError as error:
        raise InputError(f"no such file: {image}") from error
    except OSError as error:
        raise InputError(f"{image} cannot be read: {error.strerror or error}") from error
    if not data:
        raise InputError(f"{image} is empty: give an image file")
    stored = open_picture(data, str(image))
    _check_size(stored, str(image))
    return SourceImage(str(image), path.stem, hashlib.sha256(data).hexdigest(), to_rgb(stored, str(image)))


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} is too small ({width} x {height}): each side needs {MIN_SIDE} pixels or more")
    check_pixels(image.size, name)
