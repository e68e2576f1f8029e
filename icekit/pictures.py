"""Picture files as people have them: decoded upright, and any mode, depth and colour profile as 8-bit sRGB."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from icekit.protocols import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
"""Formats that Pillow decodes itself: nothing that is a program (PostScript) or calls one."""
MAX_PIXELS = 150_000_000
"""Most pixels, by the header, before anything is decoded: above every camera's, below what fills the memory."""
MAX_BYTES = 2**30
"""Largest picture file: above ``MAX_PIXELS`` of 16 bits and three colours, uncompressed."""
DEPTHS = {8: 255.0, 12: 4095.0, 16: 65535.0}
"""White of integer greys by their bits."""
OUTLIERS = 1 / 200
"""Share of a picture's values that may lie outside what it is taken to range over: hot pixels, overshoot of filters."""
_STORED = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17}
_STORED |= {"RGB;16B": lambda values: tuple(value >> 8 for value in values)}
"""How Pillow scales a PNG's values by how they are stored; it leaves the transparent value as it is."""

log = logging.getLogger(__name__)


def open_picture(data: bytes, name: str) -> Image.Image:
    """Decode a picture file's bytes; turned as its EXIF orientation says, otherwise as it is stored.

    name: of the file, for messages.

    Raises:
        InputError: no image, damaged, animated or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; we have our own limits
            Image.init()
            there = [one for one in FORMATS if one in Image.OPEN]  # AVIF depends on how Pillow was built
            with Image.open(io.BytesIO(data), formats=there) as file:
                check_pixels(file.size, name)
                # A phone's MPO is a photo with further views behind it: the first is the photo.
                if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                    raise InputError(f"{name} is animated or has several pages: give a single still image")
                _mend_transparency(file)
                file.load()
                return upright(_unsigned(file), name)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large: an image may have at most {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image that can be read (JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF)") from error
    except MemoryError as error:
        raise InputError(f"{name} is too large for the memory of this machine") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise InputError(f"{name} is damaged or cut short: {' '.join(str(error).split())}") from error


def check_pixels(size: tuple[int, int], name: str) -> None:
    """Whether a picture of this (width, height) has at most ``MAX_PIXELS``. Raises InputError."""
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"{name} is too large ({size[0]} x {size[1]}): an image may have at most {MAX_PIXELS:,} pixels"
        )


def upright(picture: Image.Image, name: str) -> Image.Image:
    """A picture turned as its EXIF orientation says; as it is when that cannot be read."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # of metadata alone
        log.warning("%s: its EXIF orientation cannot be read and is passed over: %s", name, error)
        return picture.copy()


def same_proportions(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are those of one picture, larger and smaller, each side rounded to a pixel."""
    small, large = sorted((one, other))
    width, height = large[0] * small[1] / large[1], large[1] * small[0] / large[0]
    return abs(width - small[0]) <= 1 or abs(height - small[1]) <= 1


def to_rgb(picture: Image.Image, name: str = "the image") -> Image.Image:
    """Any mode as sRGB of 8 bits: transparency over white, colours by the picture's ICC profile, greys as ``to_grey``.

    name: for the log, which says what was assumed, and when a profile cannot be used.
    """
    alpha = None
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith(("I", "F")):
        transparent = picture.info.get("transparency")
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(np.asarray(picture) == transparent, 0, 255).astype(np.uint8))
        picture = to_grey(picture, name)
    elif picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        alpha = rgba.getchannel("A")
        picture = picture.convert("L") if picture.mode in ("LA", "La") else rgba.convert("RGB")
    picture = _to_srgb(picture, profile, name)
    if alpha is not None:
        picture.putalpha(alpha)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    picture.info.clear()  # its profile was applied, and must not be a second time
    return picture


def to_grey(picture: Image.Image, name: str) -> Image.Image:
    """A grey of 16 or 32 bits or of floats, mode I or F, as 8 bits: black and white by ``grey_range``."""
    values = np.asarray(picture).astype(np.float64)
    black, white, said = grey_range(values, whole=picture.mode.startswith("I"))
    if said:
        log.warning("%s has %s: taken as %g for black to %g for white", name, said, black, white)
    with np.errstate(invalid="ignore"):
        grey = (np.nan_to_num(values, nan=black, posinf=white, neginf=black) - black) / (white - black)
    return Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8))


def grey_range(values: NDArray[np.float64], whole: bool) -> tuple[float, float, str]:
    """What is black and what is white in greys that do not say so, and why, in words; empty for plain 16 bits.

    Integers are of 8, 12 or 16 bits, by the largest. Floats are in [0, 1], [-1, 1], [0, 255] or [0, 65535]. Of each
    1 in 200 may lie outside. What fits none of these, or would be all black, is stretched over its own range.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0, "no finite number"
    high, above = _extreme(finite)
    low, below = _extreme(-finite)
    low, below = -low, -below
    stored = "whole numbers" if whole else "floats"
    said = f"{stored} from {finite.min():g} to {finite.max():g}"
    if high <= 0 and low >= 0:
        return 0.0, 1.0, ""
    if whole and low >= 0:
        for bits, white in DEPTHS.items():
            if white / 100 <= high <= white:
                return 0.0, white, "" if bits == 16 else said
    elif not whole:
        if low >= -0.05 and 0.01 <= high <= 1.1:
            return 0.0, 1.0, said
        if -1.1 <= low < 0 and 0 < high <= 1.1:
            return -1.0, 1.0, said
        for least, white in ((16, 255.0), (65535 / 4, 65535.0)):
            if low >= -0.05 * white and least < high <= 1.1 * white:
                return 0.0, white, said
    black, white = min(below, 0.0), max(above, 0.0)
    return black, white if white > black else black + 1, said


def _extreme(values: NDArray[np.float64]) -> tuple[float, float]:
    """The largest of the positive values but for outliers; and the largest itself unless that is an outlier."""
    positive = values[values > 0]
    if not positive.size:
        return 0.0, 0.0
    most = float(np.quantile(positive, 1 - OUTLIERS, method="lower"))
    largest = float(positive.max())
    return most, largest if largest <= 1.1 * most else most


def _to_srgb(picture: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    if not profile and picture.mode != "LAB":
        return picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        space = source.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(space)
        own = {"1": "L", "L": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(picture.mode, "RGB")
        # A grey picture may have a profile for three colours, which are then equal.
        if mode is None or (own != mode and (own, mode) != ("L", "RGB")):
            raise ValueError(f"it is for {space}, the picture is {picture.mode}")
        intent = ImageCms.getDefaultIntent(source)
        converted = ImageCms.profileToProfile(
            picture.convert(mode),
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent(intent),
            outputMode="RGB",
        )
        assert converted is not None  # only when it is done in place
        return converted
    except (OSError, ValueError, TypeError, ImportError, ImageCms.PyCMSError) as error:
        why = " ".join(str(error).split())
        log.warning("%s: its colour profile cannot be used, its colours are taken as sRGB: %s", name, why)
        return picture.convert("RGB")


def _mend_transparency(file: Image.Image) -> None:
    tiles: Sequence[object] = getattr(file, "tile", ())
    arguments = getattr(tiles[0], "args", None) if tiles else None
    scaled = _STORED.get(arguments[0] if isinstance(arguments, tuple) else str(arguments))
    transparent = file.info.get("transparency")
    if scaled is not None and transparent is not None and file.format == "PNG":
        file.info["transparency"] = scaled(transparent)


def _unsigned(file: Image.Image) -> Image.Image:
    """TIFF's unsigned integers of 32 bits, which Pillow reads as signed, as floats; any other picture as it is."""
    if file.mode != "I" or not isinstance(file, TiffImagePlugin.TiffImageFile) or file.tag_v2.get(339, (1,))[0] != 1:
        return file
    values = np.asarray(file)
    return file if values.min() >= 0 else Image.fromarray(values.view(np.uint32).astype(np.float32))
