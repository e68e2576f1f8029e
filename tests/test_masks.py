"""The user's own mask files, and the user's own words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from icekit.builtin.retrievers.words import WordsRetriever
from icekit.builtin.segmentors.masks import MaskFilesSegmentor
from icekit.protocols import Candidate, InputError, Proposer, View

BACKBONE: Any = SimpleNamespace(image_size=(32, 32), knows=lambda word: word != "zyx")


def write(path: Path, box: tuple[int, int, int, int], size: tuple[int, int] = (64, 64), mode: str = "L") -> Path:
    """A mask file, white inside ``box`` (left, top, right, bottom)."""
    image = Image.new("L", size)
    image.paste(255, box)
    image.convert(mode).save(path)
    return path


def segmentor(*files: Path | str) -> MaskFilesSegmentor:
    return MaskFilesSegmentor(MaskFilesSegmentor.Settings(files=tuple(Path(file) for file in files)), BACKBONE)


def view(visible: torch.Tensor) -> View:
    image = torch.zeros(3, 32, 32)
    return View(image, image, visible)


def test_a_folder_is_taken_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write(tmp_path / f"mask{number}.png", (0, 0, 2 * number + 10, 64))
    (tmp_path / "notes.txt").write_text("no mask")
    masks = [found.mask for found in segmentor(tmp_path).propose(torch.zeros(3, 32, 32))]
    assert [int(mask[0].sum()) for mask in masks] == [6, 7, 15]
    assert all(mask.dtype == torch.bool and mask.shape == (32, 32) for mask in masks)
    assert isinstance(segmentor(tmp_path), Proposer)


def test_listed_files_keep_their_order(tmp_path: Path) -> None:
    first, second = write(tmp_path / "b.png", (0, 0, 10, 64)), write(tmp_path / "a.png", (0, 0, 20, 64))
    assert [int(found.mask[0].sum()) for found in segmentor(first, second).propose(torch.zeros(3, 32, 32))] == [5, 10]


def test_one_folder_may_be_given_as_text(tmp_path: Path) -> None:
    write(tmp_path / "a.png", (0, 0, 10, 64))
    assert MaskFilesSegmentor.Settings.model_validate({"files": str(tmp_path)}).files == (tmp_path,)


def test_the_centre_square_is_taken(tmp_path: Path) -> None:
    masks = segmentor(write(tmp_path / "wide.png", (32, 0, 64, 64), size=(128, 64))).propose(torch.zeros(3, 32, 32))
    assert masks[0].mask[:, :16].all() and not masks[0].mask[:, 16:].any()


def test_a_model_of_another_shape_takes_the_middle_of_its_proportions(tmp_path: Path) -> None:
    backbone: Any = SimpleNamespace(image_size=(32, 48))
    file = write(tmp_path / "tall.png", (0, 0, 48, 72), size=(96, 128))  # of which rows 32 to 96 are taken
    [found] = MaskFilesSegmentor(MaskFilesSegmentor.Settings(files=(file,)), backbone).propose(torch.zeros(3, 32, 48))
    assert found.mask.shape == (32, 48)
    assert found.mask[:20, :24].all() and not found.mask[20:].any() and not found.mask[:, 24:].any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_any_mode_of_image_is_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "mask.png"
    if mode == "I;16":
        values = np.zeros((64, 64), dtype=np.uint16)
        values[:, :32] = 65535
        Image.fromarray(values).save(path)
    else:
        write(path, (0, 0, 32, 64), mode=mode)
    mask = segmentor(path).propose(torch.zeros(3, 32, 32))[0].mask
    assert mask[:, :16].all() and not mask[:, 16:].any()


def test_what_is_transparent_is_no_object(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 4), 255, dtype=np.uint8)
    pixels[:, 32:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    assert not segmentor(tmp_path / "cut.png").propose(torch.zeros(3, 32, 32))[0].mask[:, 16:].any()


def test_words_go_with_the_masks_in_order(tmp_path: Path) -> None:
    for number in (2, 1):
        write(tmp_path / f"{number}.png", (0, 0, 20 * number, 64))
    settings = MaskFilesSegmentor.Settings.model_validate({"files": str(tmp_path), "words": "cup, ball"})
    found = MaskFilesSegmentor(settings, BACKBONE).propose(torch.zeros(3, 32, 32))
    assert [(proposal.word, int(proposal.mask[0].sum())) for proposal in found] == [("cup", 10), ("ball", 20)]
    with pytest.raises(InputError, match="1 words for 2 masks"):
        MaskFilesSegmentor(settings.model_copy(update={"words": ("cup",)}), BACKBONE)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.png", (0, 0, 0, 0))
    text = tmp_path / "text.png"
    text.write_text("no image")
    bare = tmp_path / "bare"
    bare.mkdir()
    good = write(tmp_path / "good.png", (0, 0, 9, 9))
    other = write(tmp_path / "other.png", (0, 0, 9, 9), size=(64, 48))
    for files, message in (
        ((), "no files"),
        ((tmp_path / "none.png",), "no such file or folder: .*none.png"),
        ((bare,), "no images in the folder .*bare"),
        ((text,), "text.png is not an image"),
        ((empty,), "empty.png is empty"),
        ((good, other), "other.png is 64 x 48, .*good.png is 64 x 64"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            segmentor(*files)
        assert "\n" not in str(caught.value)


def test_words_come_in_order_and_once() -> None:
    settings = WordsRetriever.Settings.model_validate({"words": "ball, red cup,Ball"})
    words, everything = WordsRetriever(settings, BACKBONE), view(torch.ones(32, 32, dtype=torch.bool))
    assert words.retrieve(everything, []) == [Candidate("ball", 1.0), Candidate("red cup", 1.0)]
    assert words.retrieve(everything, ["Ball"]) == [Candidate("red cup", 1.0)]
    assert words.retrieve(everything, ["ball", "red cup"]) == []


@pytest.mark.parametrize(("words", "message"), [("", "has no words"), (["cup", "zyx"], "does not know the word 'zyx'")])
def test_wrong_words_are_named(words: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WordsRetriever(WordsRetriever.Settings.model_validate({"words": words}), BACKBONE)
