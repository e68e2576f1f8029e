"""Mask files as they lie about: beside hidden files, thin, of another size, on pictures that a camera held upright."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import plain_components as plain
import pytest
import torch
from PIL import Image

from icekit import InputError, extract
from icekit.builtin.datasets.folder import FolderDataset
from icekit.builtin.segmentors.masks import MaskFilesSegmentor
from icekit.pixels import cover
from icekit.plugins import Plugins
from icekit.settings import load_settings

HIDDEN = (".DS_Store", "._mask.png", ".hidden.png", "Thumbs.db", "desktop.ini")


@pytest.fixture
def plugins() -> Plugins:
    return plain.beside_builtins()


def photo(path: Path, size: tuple[int, int], orientation: int = 1) -> Path:
    """(width, height) as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, exif=exif)
    return path


def mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int], orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("L", size)
    picture.paste(255, box)
    picture.save(path, exif=exif)
    return path


def run(found: Plugins, picture: Path, out: Path, *files: Path) -> Any:
    roles = {role: "plain" for role in ("backbone", "retriever", "learner")} | {"segmentor": "masks"}
    settings = load_settings(
        options={
            "components": roles,
            "samples": 0,
            "min_area": 0,
            "segmentor": {"files": [str(file) for file in files]},
        }
    )
    return extract(picture, out, settings, installed=found)


# A camera held upright: 128 x 96 as stored, 96 x 128 as people see it; the model sees its middle, rows 16 to 112.


@pytest.mark.parametrize(
    ("size", "box", "orientation"),
    [
        ((96, 128), (0, 16, 48, 64), 1),  # drawn on the picture as people see it
        ((192, 256), (0, 32, 96, 128), 1),  # of the same proportions, larger
        ((47, 63), (0, 8, 24, 31), 1),  # rounded
        ((128, 96), (16, 48, 64, 96), 6),  # with the camera's own orientation
    ],
)
def test_a_mask_is_turned_as_its_picture_is(
    plugins: Plugins, tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int], orientation: int
) -> None:
    file = mask(tmp_path / "mask.png", size, box, orientation)
    done = run(plugins, photo(tmp_path / "photo.jpg", (128, 96), orientation=6), tmp_path / "run", file)
    found = np.asarray(Image.open(tmp_path / "run" / done.manifest["concepts"][0]["mask"])) > 0
    side = found.shape[0]
    expected = np.zeros_like(found)
    expected[: side // 2, : side // 2] = True
    assert (found != expected).mean() <= 0.04  # the smallest is a pixel of its 47 off


def test_a_mask_of_other_proportions_is_refused(plugins: Plugins, tmp_path: Path) -> None:
    picture = photo(tmp_path / "photo.jpg", (128, 96), orientation=6)
    file = mask(tmp_path / "mask.png", (128, 96), (0, 0, 50, 50))
    with pytest.raises(InputError) as error:
        run(plugins, picture, tmp_path / "run", file)
    message = str(error.value)
    assert message.startswith(f"mask {file} is 128 x 96, {picture} is 96 x 128: ") and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_data_sets_mask_of_other_proportions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "masks" / "photo").mkdir(parents=True)
    picture = photo(tmp_path / "photo.jpg", (128, 96), orientation=6)
    file = mask(tmp_path / "masks" / "photo" / "0-cup.png", (128, 96), (0, 0, 50, 50))
    dataset = FolderDataset(FolderDataset.Settings(path=tmp_path))
    with pytest.raises(InputError) as error:
        dataset.pictures(None, seed=0, size=(32, 32))
    assert str(error.value).startswith(f"mask {file} is 128 x 96, {picture} is 96 x 128: ")
    mask(file, (96, 128), (0, 16, 48, 64))
    [one] = dataset.pictures(None, seed=0, size=(32, 32))
    assert one.concepts[0].mask[:16, :16].all() and int(one.concepts[0].mask.sum()) == 256


def test_hidden_files_are_passed_over(plugins: Plugins, tmp_path: Path) -> None:
    picture = photo(tmp_path / "photo.png", (64, 64))
    folder = tmp_path / "masks" / "photo"
    folder.mkdir(parents=True)
    mask(folder / "0-cup.png", (64, 64), (0, 0, 32, 32))
    for place in (folder, tmp_path):
        for name in HIDDEN:
            (place / name).write_bytes(b"Mac OS X")
    assert len(run(plugins, picture, tmp_path / "run", folder).concepts) == 1
    (tmp_path / "__MACOSX").mkdir()
    photo(tmp_path / "__MACOSX" / "photo.png", (64, 64))
    [one] = FolderDataset(FolderDataset.Settings(path=tmp_path)).pictures(1, seed=0, size=(32, 32))
    assert (one.name, [concept.word for concept in one.concepts]) == ("photo", ["cup"])


def test_home_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert MaskFilesSegmentor.Settings.model_validate({"files": ["~/a.png", "b.png"]}).files == (
        tmp_path / "a.png",
        Path("b.png"),
    )
    assert FolderDataset.Settings.model_validate({"path": "~"}).path == tmp_path


def test_what_is_no_mask_file(tmp_path: Path) -> None:
    backbone: Any = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "zeros.png").write_bytes(b"\0" * 500)
    (tmp_path / "cut.png").write_bytes(mask(tmp_path / "a.png", (64, 64), (0, 0, 9, 9)).read_bytes()[:60])
    for name, why in (("pipe", "a pipe"), ("empty", "not an image"), ("zeros", "not an image"), ("cut", "damaged")):
        with pytest.raises(InputError, match=f"{name}.png.*{why}") as error:
            MaskFilesSegmentor(MaskFilesSegmentor.Settings(files=(tmp_path / f"{name}.png",)), backbone)
        assert "\n" not in str(error.value)


# --- Thin masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 8, 20])
def test_thin_lines_stay_where_they_are(width: int) -> None:
    """1024 pixels to 64: a cell is 16 of them."""
    upright = np.zeros((1024, 1024), dtype=bool)
    upright[100:900, 500 : 500 + width] = True
    fitted = cover(upright, (64, 64))
    assert fitted[7:56].any(dim=1).all() and not fitted[:6].any() and not fitted[57:].any()
    assert not fitted[:, :31].any() and not fitted[:, 33:].any()
    slanted = np.array([[abs(row - column / 2 - 100) < width for column in range(1024)] for row in range(1024)])
    assert cover(slanted, (64, 64)).any(dim=0).all()  # not broken anywhere


def test_a_thick_mask_is_of_the_cells_half_covered() -> None:
    square = np.zeros((64, 64), dtype=bool)
    square[8:33, 8:31] = True  # 4 pixels to a cell: the last row is covered by a quarter, the last column by three
    fitted = cover(square, (16, 16))
    assert fitted[2:8, 2:8].all() and int(fitted.sum()) == 36
    assert not cover(np.zeros((64, 64), dtype=bool), (16, 16)).any()


def test_a_smaller_mask_is_enlarged() -> None:
    small = np.zeros((16, 16), dtype=bool)
    small[4:8, 4:8] = True
    fitted = cover(small, (64, 64))
    assert fitted[17:31, 17:31].all() and not fitted[:15].any() and not fitted[33:].any()
