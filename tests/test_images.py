"""Any image that people have is loaded; one that cannot be used is refused in one clear line."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icekit.pixels import fit, middle, to_tensor
from icekit.protocols import InputError
from icekit.run.images import MAX_PIXELS, MIN_SIDE, load_image


def gradient(width: int = 96, height: int = 64) -> Image.Image:
    x = np.linspace(0, 255, width, dtype=np.uint8)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height, dtype=np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1))


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_formats(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"photo.{ending}"
    gradient().save(path)
    loaded = load_image(path)
    assert loaded.picture.mode == "RGB"
    assert loaded.picture.size == (96, 64)
    assert (loaded.source, loaded.stem, len(loaded.sha256)) == (str(path), "photo", 64)
    assert pixel(loaded.picture, 48, 32) == pytest.approx(pixel(gradient(), 48, 32), abs=20)
    assert loaded.fitted((48, 32)).size == (32, 48)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"])
def test_modes(tmp_path: Path, mode: str) -> None:
    grey = Image.new("L", (40, 40), 255)
    if mode in ("I", "I;16"):
        image = Image.fromarray(np.full((40, 40), 65535, dtype=np.int32 if mode == "I" else np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full((40, 40), 1, dtype=np.float32))
    else:
        image = grey.convert("RGB").convert(mode) if mode != "LA" else grey.convert(mode)
    image.save(tmp_path / "image.tiff")
    assert pixel(load_image(tmp_path / "image.tiff").picture, 20, 20) == (255, 255, 255)
    assert pixel(load_image(image).picture, 20, 20) == (255, 255, 255)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 32896, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert pixel(load_image(tmp_path / "grey.png").picture, 5, 5) == (128, 128, 128)


def test_transparent_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pixel(load_image(tmp_path / "clear.png").picture, 5, 5) == (255, 255, 255)
    palette = Image.new("P", (40, 40), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixel(load_image(tmp_path / "palette.png").picture, 5, 5) == (255, 255, 255)


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 64, 16))  # top, which becomes the right
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    picture = load_image(tmp_path / "photo.jpg").picture
    assert min(pixel(picture, 60, 32)) > 200
    assert max(pixel(picture, 4, 32)) < 50


@pytest.mark.parametrize("size", [(400, 40), (40, 400)])
@pytest.mark.parametrize("shape", [(40, 40), (40, 20), (20, 40), (80, 80)])
def test_the_middle_is_cut_to_the_models_shape_and_resized(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "black")
    box = middle(size, shape)
    image.paste("red", box)
    image.save(tmp_path / "long.png")
    fitted = load_image(tmp_path / "long.png").fitted(shape)
    assert fitted.getcolors() == [(shape[0] * shape[1], (255, 0, 0))]
    width, height = box[2] - box[0], box[3] - box[1]
    assert width / height == pytest.approx(shape[1] / shape[0])
    assert width == size[0] or height == size[1]  # the largest there is
    assert abs(box[0] - (size[0] - box[2])) <= 1 and abs(box[1] - (size[1] - box[3])) <= 1  # in the middle


def test_how_an_image_was_fitted_is_said() -> None:
    source = load_image(gradient(96, 64))
    assert source.fitting((32, 32)) == {"source_width": 96, "source_height": 64, "box": [16, 0, 80, 64]}
    assert source.fitting((64, 96))["box"] == [0, 0, 96, 64]
    assert np.array_equal(source.fitted((64, 96)), gradient(96, 64))  # as it is
    assert fit(gradient(96, 64), (1, 400)).size == (400, 1)


def test_pil_image_is_taken_as_it_is() -> None:
    first, second = load_image(gradient()), load_image(Image.new("RGB", (96, 64)))
    assert first.picture.size == (96, 64)
    assert first.sha256 != second.sha256


def test_to_tensor() -> None:
    tensor = to_tensor(Image.new("RGB", (4, 3), (255, 0, 51)))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 3, 4)
    assert tensor[:, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_image(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_no_image_there(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nope.jpg")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "is empty" in refused(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("hello " * 100)
    assert "not an image" in refused(tmp_path / "text.png")
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n")
    assert "not an image" in refused(tmp_path / "drawing.eps")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_cut_short(tmp_path: Path, ending: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{ending}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "damaged" in (message := refused(path)) or "not an image" in message


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_animated(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:])
    assert "animated" in refused(tmp_path / f"moving.{ending}")


def test_too_small(tmp_path: Path) -> None:
    for size in [(1, 1), (500, MIN_SIDE - 1)]:
        Image.new("RGB", size).save(tmp_path / "dot.png")
        assert f"{MIN_SIDE} pixels" in refused(tmp_path / "dot.png")
    with pytest.raises(InputError, match="too small"):
        load_image(Image.new("RGB", (1, 1)))


@pytest.mark.parametrize("side", [12_300, 30_000])
def test_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    assert f"{MAX_PIXELS:,} pixels" in refused(tmp_path / "bomb.png")
