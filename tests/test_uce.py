"""The UCE benchmark: its layout, its protocol, and published figures beside measured ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plain_components as plain
import pytest
from icekit_process import in_this_process, plain_plugin, with_what_is_installed
from PIL import Image

from icekit import InputError, RunError
from icekit.bench.published import read_published
from icekit.builtin.datasets.uce import UceDataset
from icekit.testing import tiny

Run = Callable[..., tuple[int, str, str]]
OPTIONS = ["--backbone=plain", "--retriever=plain", "--segmentor=plain", "--learner=plain"]
QUICK = ["--set", "bench.images=2", "--set", "sample_steps=1", "--set", "learner.plain.steps=3"]
ICE = {"sim_i": 0.738, "acc1": 0.325, "miou": 0.635, "mask_precision": 0.72, "sim_i_dino": 0.677}


def photograph(folder: Path, *words: str, name: str = "img.jpg", side: int = plain.SIDE) -> Path:
    """A photograph in UCE's layout, whose masks are the quadrants that the plain components find."""
    folder.mkdir(parents=True)
    Image.new("RGB", (side, side), "red").save(folder / name)
    for number, word in enumerate(words):
        mask = Image.fromarray(plain.quadrant(word).numpy().astype(np.uint8) * 255)
        mask.resize((side, side)).save(folder / f"mask{number}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uce")
    plain_plugin(folder / "plugin")
    photograph(folder / "uce_images" / "00", "cup", "vase")
    photograph(folder / "uce_images" / "01", "red bowl")
    (folder / "uce_images" / "__MACOSX").mkdir()
    tiny.write_dino(folder / "dino")
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_this_process(place, monkeypatch, capsys)


def test_measured_beside_published(place: Path, run: Run, clip_folder: Path) -> None:
    arguments = [
        "bench", "uce", "--path", "uce_images", *OPTIONS, *QUICK, "--set", f"metric.clip=local-dir:{clip_folder}",
        "--set", "metric.dino=dino", "--out", "out",
    ]  # fmt: skip
    status, out, err = run(*arguments)
    assert status == 0, err
    made = json.loads((place / "out" / "results.json").read_text())
    assert list(made["columns"]) == [
        "sim_i", "sim_c", "acc1", "acc3", "sim_i_dino", "sim_c_dino", "acc1_dino", "acc3_dino", "miou", "mask_recall",
        "mask_precision", "recall", "clip_colour", "clip_material", "clip_colour_word", "clip_material_word",
    ]  # fmt: skip
    assert [row["name"] for row in made["rows"]] == ["plain-plain", "floor"]  # no word is known, so there is no ceiling
    ours = {column: value["mean"] for column, value in made["rows"][0]["values"].items()}
    # The quadrants with a frayed edge: nothing beyond the object is in their masks.
    assert ours["mask_precision"] == 1 and 0.9 < ours["mask_recall"] < 1
    assert ours["miou"] == pytest.approx(ours["mask_recall"])

    others = {row["name"]: row for row in made["published"]["rows"]}
    assert ICE.items() <= others["ICE"]["values"].items()
    assert others["ICE"]["source"].startswith("Cendra and Han, CVPR 2025")
    assert "recall" not in others["ICE"]["values"]  # that is objects found, and not what was published by this name
    lines = out.splitlines()
    [line] = [line for line in lines if line.startswith("ICE (published) ")]
    assert line.split()[2:6] == ["0.738", "0.822", "0.325", "0.518"]
    assert "published figures are of 96 images and these of 2: no comparison" in lines
    assert any(line.startswith("ICE (published): Cendra and Han, CVPR 2025") for line in lines)

    table = {row["row"]: row for row in csv.DictReader((place / "out" / "results.csv").open())}
    assert (table["ICE (published)"]["miou_mean"], table["ICE (published)"]["miou_low"]) == ("0.635", "")
    assert table["ICE (published)"]["published_in"] == others["ICE"]["source"]
    assert table["plain-plain"]["published_in"] == ""
    page = (place / "out" / "bench.html").read_text()
    assert page.count("ICE (published)") > 8 and "0.738" in page and "Cendra and Han" in page

    # The protocol: eight images, 50 steps, on black; what a user sets is above it.
    assert made["settings"]["metric"]["sim_i"]["background"] == "black"
    assert (made["settings"]["bench"]["images"], made["settings"]["run"]["sample_steps"]) == (2, 1)

    status, out, err = run(*arguments, "--set", "dataset.published=none", "--resume")
    assert status == 0, err
    assert "published" not in out
    assert "published" not in json.loads((place / "out" / "results.json").read_text())


def dataset(path: Path) -> UceDataset:
    return UceDataset(UceDataset.Settings(path=path))


def problem(path: Path, count: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        dataset(path).pictures(count, seed=0, size=(20, 20))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_layouts(tmp_path: Path) -> None:
    photograph(tmp_path / "10", "cup")
    photograph(tmp_path / "9", "cup", "vase", "ball", name="IMG.PNG")
    (tmp_path / "10" / "mask0.png").rename(tmp_path / "10" / "semantic_mask_0_cup.png")
    (tmp_path / "9" / "masks").mkdir()
    for number in range(3):
        (tmp_path / "9" / f"mask{number}.png").rename(tmp_path / "9" / "masks" / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no photograph")
    nine, ten = dataset(tmp_path).pictures(None, seed=0, size=(20, 30))
    assert [(one.name, len(one.concepts)) for one in (nine, ten)] == [("9", 3), ("10", 1)]
    assert ten.concepts[0].word is None and ten.concepts[0].mask.shape == (20, 30)
    assert [one.name for one in dataset(tmp_path).pictures(1, seed=7, size=(20, 20))] == ["9"]
    assert problem(tmp_path, 3) == f"--n 3: {tmp_path} has 2 photographs"


def test_an_object_outside_the_middle_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = photograph(tmp_path / "00")
    Image.new("RGB", (90, 40), "red").save(folder / "img.jpg")
    for number, left in enumerate((2, 40)):
        mask = Image.new("L", (90, 40))
        mask.paste(255, (left, 5, left + 10, 30))
        mask.save(folder / f"mask{number}.png")
    [picture] = dataset(tmp_path).pictures(None, seed=0, size=(20, 20))
    assert len(picture.concepts) == 1
    assert f"{folder / 'mask0.png'} is left out: it is outside the middle of {folder / 'img.jpg'}" in caplog.text
    (folder / "mask1.png").unlink()
    assert "none of its masks is within its middle" in problem(tmp_path)


def test_wrong_layouts(tmp_path: Path) -> None:
    assert problem(tmp_path).startswith(f"no photograph in {tmp_path}: UCE is a folder for each photograph, 00/img.jpg")
    folder = photograph(tmp_path / "uce" / "00")
    assert problem(tmp_path) == f"no photograph in {tmp_path}, but some further down: give --path {tmp_path / 'uce'}"
    path = tmp_path / "uce"
    assert problem(path).startswith(f"{folder} has no masks (mask0.png, ...)")
    assert f"`icekit bench folder --path {path}` measures what needs none" in problem(path)
    Image.new("L", (32, 20), 255).save(folder / "mask0.png")
    assert "mask0.png is 32 x 20" in problem(path) and "32 x 32: a mask must have the proportions" in problem(path)
    Image.new("L", (32, 32)).save(folder / "mask0.png")
    assert f"mask {folder / 'mask0.png'} is empty" in problem(path)
    (folder / "mask0.png").write_text("no image")
    assert f"mask {folder / 'mask0.png'} is not an image that can be read" in problem(path)
    (folder / "img.jpg").write_text("no image")
    assert f"{folder / 'img.jpg'} is not an image that can be read" in problem(path)
    (folder / "img.jpg").unlink()
    assert problem(path).startswith(f"{folder} has no photograph: the photograph is called img.jpg")
    for name in ("one.jpg", "two.jpg"):
        Image.new("RGB", (32, 32)).save(folder / name)
    assert "has several images that are no masks (one.jpg, two.jpg)" in problem(path)
    with pytest.raises(InputError, match=r"^data set 'uce' has no folder: give one, as in --path FOLDER"):
        UceDataset(UceDataset.Settings())
    with pytest.raises(InputError, match=r"^dataset.path: no such folder: .*nowhere$"):
        dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("images = 96\n", "rows"),
        ("images = 96\nrows = 3\n", "rows"),
        ('images = 96\n[[rows]]\nname = "a"\nsource = "b"\nvalues.miou = "much"\n', "miou"),
        ("images = ", "Invalid value"),
    ],
)
def test_wrong_published_figures_are_the_data_sets_fault(tmp_path: Path, text: str, hint: str) -> None:
    file = tmp_path / "published.toml"
    file.write_text(text)
    with pytest.raises(RunError, match=hint) as error:
        read_published(file, "mine")
    assert str(error.value).startswith(f"data set 'mine': its published figures in {file} cannot be read: ")
    with pytest.raises(RunError, match="the Path of a TOML file is right"):
        read_published("figures", "mine")
    with pytest.raises(RunError, match="No such file"):
        read_published(tmp_path / "nowhere.toml", "mine")
    assert read_published(None, "mine") is None


ROOT = Path(__file__).resolve().parents[1]


def test_the_page_has_the_published_figures() -> None:
    published = read_published(dataset(Path(__file__).parent).published, "uce")
    assert published is not None
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    for row in published.rows:
        stated = " ".join(line for line in page.splitlines() if line.startswith(f"| {row.name} |"))
        figures = [float(cell) for cell in stated.split("|") if cell.strip().startswith("0.")]
        assert figures == list(row.values.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_path_with_tiny_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the page says it, on drawn photographs: there is a figure in every column."""
    monkeypatch.chdir(tmp_path)
    tiny.write_all(tmp_path / "models")
    for number, words in enumerate((("cup", "vase", "ball"), ("red bowl", "ball"))):
        folder = photograph(tmp_path / "photographs" / f"{number:02d}", *words, side=96)
        noise = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "img.jpg")
    run = with_what_is_installed(tmp_path, monkeypatch, capsys)
    configuration = ROOT / "benchmarks" / "uce-tiny.toml"
    status, _, err = run("bench", "uce", "--path", "photographs", "--config", configuration, "--out", "out")
    assert status == 0, err
    made = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {row["name"]: row["values"].keys() for row in made["rows"]}
    assert found["xattn-ice"] == made["columns"].keys()
    assert len(made["columns"]) == 16 and made["published"]["rows"]
