"""Load any image that people have, and say plainly why one cannot be used."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from icekit import pixels
from icekit.protocols import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
"""Formats that Pillow decodes itself: nothing that is a program (PostScript) or calls one."""
MIN_SIDE = 32
"""Shortest side in pixels. Below it there is nothing to find."""
MAX_PIXELS = 150_000_000
"""Most pixels, by the header, before anything is decoded: above every camera's, below what fills the memory."""


@dataclass(frozen=True)
class SourceImage:
    """An image as the user gave it.

    source: the path as typed, or ``"image"`` when it came as an object.
    stem: what a run directory is named after.
    sha256: of the file's bytes (of the pixels when there is no file), hex.
    picture: the whole of it, RGB, oriented.
    """

    source: str
    stem: str
    sha256: str
    picture: Image.Image

    def fitted(self, size: tuple[int, int]) -> Image.Image:
        """The picture in a model's shape, (height, width): its middle, cut to these proportions and resized."""
        return pixels.fit(self.picture, size)

    def fitting(self, size: tuple[int, int]) -> dict[str, Any]:
        """What ``fitted`` does, for the manifest: the picture's size, and the box that is cut out and resized."""
        left, top, right, bottom = pixels.middle(self.picture.size, size)
        return {
            "source_width": self.picture.width,
            "source_height": self.picture.height,
            "box": [left, top, right, bottom],
        }


def load_image(image: str | Path | Image.Image) -> SourceImage:
    """Read an image file (or take a PIL image), apply its orientation and make it RGB.

    Transparent parts become white, 16-bit greys are scaled to 8 bits.

    Raises:
        InputError: missing, a folder, empty, truncated, no image, animated, too small or too large.
    """
    if isinstance(image, Image.Image):
        _check_size(image, "the image")
        picture = to_rgb(ImageOps.exif_transpose(image))
        return SourceImage("image", "image", hashlib.sha256(picture.tobytes()).hexdigest(), picture)
    path = Path(image)
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder: give one image file") from error
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not data:
        raise InputError(f"{path} is empty: give an image file")
    picture = _decode(path)
    return SourceImage(str(image), path.stem, hashlib.sha256(data).hexdigest(), picture)


def _decode(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; we have our own limits
            Image.init()
            there = [name for name in FORMATS if name in Image.OPEN]  # AVIF depends on how Pillow was built
            with Image.open(path, formats=there) as file:
                _check_size(file, str(path))
                # A phone's MPO is a photo with further views behind it: the first is the photo.
                if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                    raise InputError(f"{path} is animated or has several pages: give a single still image")
                file.load()
                return to_rgb(ImageOps.exif_transpose(file))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large: an image may have at most {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read (JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF)") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise InputError(f"{path} is damaged or cut short: {' '.join(str(error).split())}") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} is too small ({width} x {height}): each side needs {MIN_SIDE} pixels or more")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} is too large ({width} x {height}): an image may have at most {MAX_PIXELS:,} pixels")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency over white, 16-bit and float greys (in [0, 1] or [0, 255]) scaled to 8 bits."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64) / 65535
        return Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255 if grey.max() <= 1 else 1
        return Image.fromarray((grey * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
