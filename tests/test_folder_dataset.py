"""The user's own pictures as a data set: where masks and words are looked for, and what is said when they are not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icekit import InputError
from icekit.builtin.datasets.folder import FolderDataset, word_of


def picture(path: Path, size: tuple[int, int] = (48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((40, 48), dtype=np.uint8)
    pixels[:, 24:] = 255
    Image.fromarray(pixels).save(path)


def dataset(path: Path) -> FolderDataset:
    return FolderDataset(FolderDataset.Settings(path=path))


def test_pictures_side_by_side(tmp_path: Path) -> None:
    for name in ("photo10.jpg", "photo2.png"):
        picture(tmp_path / name)
    mask(tmp_path / "masks" / "photo2" / "0-red-bowl.png")
    mask(tmp_path / "masks" / "photo2" / "1.png")
    (tmp_path / "notes.txt").write_text("no picture")
    first, second = dataset(tmp_path).pictures(None, seed=0, size=(20, 20))
    assert (first.name, first.picture) == ("photo2", tmp_path / "photo2.png")
    assert [concept.word for concept in first.concepts] == ["red bowl", None]
    assert first.concepts[0].mask.shape == (20, 20)
    # The centre square of 48 x 40 pixels is 4 pixels in: the white half begins at its middle.
    assert not first.concepts[0].mask[:, :10].any() and first.concepts[0].mask[:, 10:].all()
    assert (second.name, second.concepts) == ("photo10", ())
    assert [one.name for one in dataset(tmp_path).pictures(1, seed=9, size=(20, 20))] == ["photo2"]


def test_a_folder_for_each_picture(tmp_path: Path) -> None:
    picture(tmp_path / "toys" / "img.jpg")
    mask(tmp_path / "toys" / "mask0.png")
    mask(tmp_path / "toys" / "mask1.png")
    picture(tmp_path / "scene" / "image.png")  # as `icekit tabletop render` and a run directory are laid out
    picture(tmp_path / "scene" / "other.png")
    mask(tmp_path / "scene" / "masks" / "0-cup.png")
    scene, toys = dataset(tmp_path).pictures(None, seed=0, size=(20, 20))
    assert (scene.name, [concept.word for concept in scene.concepts]) == ("scene", ["cup"])
    assert scene.picture == tmp_path / "scene" / "image.png"
    assert (toys.name, [concept.word for concept in toys.concepts]) == ("toys", [None, None])


def test_words() -> None:
    assert word_of(Path("0-red-bowl.png")) == "red bowl"
    assert word_of(Path("mask0.png")) is None
    assert word_of(Path("0.png")) is None


def test_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data set 'folder' has no folder: give one, as in --path FOLDER$"):
        FolderDataset(FolderDataset.Settings())
    with pytest.raises(InputError, match=r"^dataset.path: no such folder: .*nowhere$"):
        dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no picture in"):
        dataset(tmp_path).pictures(None, seed=0, size=(20, 20))
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^--n 2: .* has 1 picture"):
        dataset(tmp_path).pictures(2, seed=0, size=(20, 20))
    picture(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="several pictures called 'a'"):
        dataset(tmp_path).pictures(None, seed=0, size=(20, 20))
