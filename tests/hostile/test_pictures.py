"""Pictures of odd depths, colour profiles and transparency come out as people see them; what cannot be is refused."""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import icc_profiles as icc
import numpy as np
import pytest
from PIL import Image

from icekit import files
from icekit.protocols import InputError
from icekit.run.images import load_image

RAMP = np.linspace(0, 1, 1600).reshape(40, 40)


def values(path: Path | Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(load_image(path).picture)[..., 0].astype(int)


def spotted(pixels: np.ndarray[Any, Any], value: float) -> np.ndarray[Any, Any]:
    """One pixel is something else."""
    pixels = pixels.copy()
    pixels[0, 0] = value
    return pixels


GREYS: dict[str, tuple[np.ndarray[Any, Any], str]] = {
    "float of 0 to 1": (RAMP.astype(np.float32), "0 for black to 1 for white"),
    "float of 0 to 1, one over": (spotted(RAMP, 1.02).astype(np.float32), "0 for black to 1 for white"),
    "float of 0 to 1, one far over": (spotted(RAMP, 4e4).astype(np.float32), "0 for black to 1 for white"),
    "float of 0 to 1, one not a number": (spotted(RAMP, np.nan).astype(np.float32), "0 for black to 1 for white"),
    "float of 0 to 1, one infinite": (spotted(RAMP, np.inf).astype(np.float32), "0 for black to 1 for white"),
    "float of -1 to 1": ((RAMP * 2 - 1).astype(np.float32), "-1 for black to 1 for white"),
    "float of 0 to 255": ((RAMP * 255).astype(np.float32), "0 for black to 255 for white"),
    "float of 0 to 4": ((RAMP * 4).astype(np.float32), "0 for black to 4 for white"),
    "float of 0 to 1e-6": ((RAMP * 1e-6).astype(np.float32), "0 for black to 1e-06 for white"),
    "float of 0 to 65535": ((RAMP * 65535).astype(np.float32), "0 for black to 65535 for white"),
    "float of -1000 to 3000": ((RAMP * 4000 - 1000).astype(np.float32), "-1000 for black to 3000 for white"),
    "8 of 16 bits": ((RAMP * 255).astype(np.uint16), "0 for black to 255 for white"),
    "12 of 16 bits": ((RAMP * 4095).astype(np.uint16), "0 for black to 4095 for white"),
    "16 bits": ((RAMP * 65535).astype(np.uint16), ""),
    "16 of 32 bits": ((RAMP * 65535).astype(np.int32), ""),
    "32 bits": ((RAMP * (2**31 - 1)).astype(np.int32), "for white"),
    "32 bits, some below 0": ((RAMP * 3000 - 1000).astype(np.int32), "-1000 for black to 2000 for white"),
}


@pytest.mark.parametrize("case", GREYS)
def test_greys_are_neither_black_nor_blown_out(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels, said = GREYS[case]
    Image.fromarray(pixels).save(tmp_path / "grey.tif")
    with caplog.at_level(logging.WARNING):
        loaded = values(tmp_path / "grey.tif")
    assert np.abs(loaded - np.round(RAMP * 255)).ravel()[1:].max() <= 1
    assert [said in message and "grey.tif" in message for message in caplog.messages] == [True] * bool(said)


def test_unsigned_integers_of_32_bits(tmp_path: Path) -> None:
    Image.fromarray((RAMP * (2**32 - 1)).astype(np.uint32).view(np.int32)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    signed = struct.pack("<HHIHH", 339, 3, 1, 2, 0)  # SampleFormat: signed; Pillow writes no other
    assert signed in data
    (tmp_path / "a.tif").write_bytes(data.replace(signed, struct.pack("<HHIHH", 339, 3, 1, 1, 0)))
    assert np.abs(values(tmp_path / "a.tif") - np.round(RAMP * 255)).max() <= 1


@pytest.mark.parametrize("value", [0, 65535, 1000])
def test_sixteen_bits_of_one_value(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((40, 40), value, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.unique(values(tmp_path / "a.png")).tolist() == [{0: 0, 65535: 255, 1000: 62}[value]]


# --- Transparency ----------------------------------------------------------------------------------------------------


def png(kind: int, bits: int, rows: bytes, transparent: bytes, side: int = 40) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0))
    body = chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


@pytest.mark.parametrize(
    ("kind", "bits", "row", "transparent", "seen"),
    [
        (0, 16, struct.pack(">40H", *([0] * 20 + [32896] * 20)), (0,), 128),
        (0, 4, b"\x33" * 10 + b"\x66" * 10, (3,), 102),
        (0, 2, b"\x55" * 5 + b"\xaa" * 5, (1,), 170),
        (0, 1, b"\xff\xff\xf0\0\0", (1,), 0),
        (2, 16, struct.pack(">60H", *[0x1234] * 60) + struct.pack(">60H", *[0x8080] * 60), (0x1234,) * 3, 128),
    ],
)
def test_a_transparent_value_is_white(
    tmp_path: Path, kind: int, bits: int, row: bytes, transparent: tuple[int, ...], seen: int
) -> None:
    rows = (b"\0" + row) * 40
    (tmp_path / "a.png").write_bytes(png(kind, bits, rows, struct.pack(f">{len(transparent)}H", *transparent)))
    pixels = values(tmp_path / "a.png")
    assert (pixels[5, 5], pixels[5, 35]) == (255, seen)


# --- Colour profiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_a_wide_gamut_picture_becomes_srgb(tmp_path: Path, ending: str) -> None:
    """Display P3's red of 233, 51, 35 is about sRGB's full red; unconverted it would be a duller one."""
    every: dict[str, dict[str, Any]] = {"jpg": {"quality": 100}, "webp": {"lossless": True}}
    Image.new("RGB", (64, 64), (234, 51, 35)).save(
        tmp_path / f"a.{ending}", icc_profile=icc.wide_rgb(), **every.get(ending, {})
    )
    loaded = load_image(tmp_path / f"a.{ending}").picture
    assert np.abs(np.array(loaded)[5, 5].astype(int) - (255, 0, 0)).max() <= 14
    assert "icc_profile" not in loaded.info  # or it would be applied again where it is saved


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA"])
def test_profiles_of_three_colours(tmp_path: Path, mode: str) -> None:
    """A grey stays as it is, but for a gamma of 2.2 in place of sRGB's curve."""
    grey = Image.new("L", (40, 40), 128)
    picture = grey.convert("RGB").quantize() if mode == "P" else grey.convert(mode)
    picture.save(tmp_path / "a.png", icc_profile=icc.wide_rgb())
    assert values(tmp_path / "a.png")[5, 5] == pytest.approx(128, abs=2)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_profiles_of_grey(tmp_path: Path, mode: str) -> None:
    grey = Image.new("L", (40, 40), 55)
    picture = Image.fromarray(np.full((40, 40), 55 * 257, dtype=np.uint16)) if mode == "I;16" else grey.convert(mode)
    picture.save(tmp_path / "a.png", icc_profile=icc.linear_grey())
    assert values(tmp_path / "a.png")[5, 5] == pytest.approx(128, abs=2)  # sRGB's value for 55/255 of the light


def test_profiles_of_inks(tmp_path: Path) -> None:
    Image.new("CMYK", (40, 40), (255, 0, 0, 0)).save(tmp_path / "a.tif", icc_profile=icc.grey_cyan())
    assert np.array(load_image(tmp_path / "a.tif").picture)[5, 5].tolist() == pytest.approx([119, 119, 119], abs=2)


def test_lab(tmp_path: Path) -> None:
    Image.new("LAB", (40, 40), (128, 128, 128)).save(tmp_path / "a.tif")
    assert values(tmp_path / "a.tif")[5, 5] == pytest.approx(119, abs=2)


@pytest.mark.parametrize("broken", ["junk", "cut", "other"])
def test_a_broken_profile_is_one_line_of_the_log(tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    data = {"junk": b"no profile" * 30, "cut": icc.wide_rgb()[:200], "other": icc.grey_cyan()}[broken]
    Image.new("RGB", (40, 40), (234, 51, 35)).save(tmp_path / "a.png", icc_profile=data)
    with caplog.at_level(logging.WARNING):
        assert load_image(tmp_path / "a.png").picture.getpixel((5, 5)) == (234, 51, 35)
    [message] = caplog.messages
    assert "a.png: its colour profile cannot be used" in message


# --- Pipes, and what is no picture -----------------------------------------------------------------------------------


def photo() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "png")
    return buffer.getvalue()


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.png")
    writer = threading.Thread(target=lambda: (tmp_path / "photo.png").write_bytes(photo()))
    writer.start()
    loaded = load_image(tmp_path / "photo.png")
    writer.join()
    (tmp_path / "file.png").write_bytes(photo())
    assert (loaded.stem, loaded.picture.size) == ("photo", (200, 200))
    assert loaded.sha256 == load_image(tmp_path / "file.png").sha256


def test_an_anonymous_pipe_is_read() -> None:
    reader, writer = os.pipe()
    small = Image.new("RGB", (40, 40), "red")
    buffer = io.BytesIO()
    small.save(buffer, "png")
    os.write(writer, buffer.getvalue())
    os.close(writer)
    try:
        assert load_image(f"/dev/fd/{reader}").picture.getpixel((0, 0)) == (255, 0, 0)
        assert "empty" in refused(f"/dev/fd/{reader}")
    finally:
        os.close(reader)


def test_a_pipe_that_nobody_writes_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "NO_WRITER_S", 0.2)
    monkeypatch.setattr(files, "SILENCE_S", 0.4)
    os.mkfifo(tmp_path / "a.png")
    begun = time.monotonic()
    assert "nothing came through" in refused(tmp_path / "a.png")
    held = os.open(tmp_path / "a.png", os.O_RDWR)
    try:
        assert "nothing came through" in refused(tmp_path / "a.png")
    finally:
        os.close(held)
    assert time.monotonic() - begun < 5


def refused(path: Path | str) -> str:
    with pytest.raises(InputError) as error:
        load_image(path)
    assert "\n" not in str(error.value)
    assert str(path).replace("\0", "\\x00") in str(error.value)
    return str(error.value)


def test_what_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zeros.png").write_bytes(b"\0" * 4096)
    assert "not an image" in refused(tmp_path / "zeros.png")
    assert "device" in refused("/dev/zero")
    assert "device" in refused("/dev/null")
    assert "no file can have this name" in refused("a\0b.png")
    assert "no user's home" in refused("~nosuchuser/a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "no such file" in refused(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "cannot be read" in refused(tmp_path / "loop.png")
    monkeypatch.setattr("icekit.run.images.MAX_BYTES", 2**20)
    (tmp_path / "large.png").write_bytes(b"\0" * (2**20 + 1))
    assert "larger than 1 MiB" in refused(tmp_path / "large.png")


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photo.png").write_bytes(photo())
    assert load_image("~/photo.png").stem == "photo"


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_damaged_bytes_are_a_picture_or_one_line(tmp_path: Path, ending: str) -> None:
    random = np.random.default_rng(1)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, min(len(data), 400), 4):
            data[place] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            assert load_image(path).picture.mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
