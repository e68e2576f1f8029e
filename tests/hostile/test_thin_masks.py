"""Masks one or two pixels thin, brought to every grid that a run has: they stay, and stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plain_components as plain
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from icekit import InputError, extract
from icekit.attention.maps import on_grid
from icekit.bench import bench
from icekit.builtin.datasets.folder import FolderDataset
from icekit.builtin.segmentors.masks import MaskFilesSegmentor
from icekit.learning.crops import close_ups
from icekit.learning.denoising import coverage, latent_mask, nearest_mask
from icekit.pixels import cover, erase, isolate
from icekit.settings import load_settings

SIDE = 512


def drawn(kind: str, width: int, side: int = SIDE) -> NDArray[np.bool_]:
    """A thin thing, bool ``[side, side]``."""
    rows, columns = np.mgrid[:side, :side]
    inside = (rows > side // 8) & (rows < side - side // 8)
    middle = side // 2 + 3  # not where a cell begins, and not in the middle of one
    return {
        "upright": inside & (abs(columns - middle) < width / 2),
        "lying": (abs(rows - middle) < width / 2) & (columns > side // 8) & (columns < side - side // 8),
        "slanted": inside & (abs(columns - rows / 2 - side / 4) < width),
        "ring": abs(np.hypot(rows - middle, columns - middle) - side / 4) < width / 2 + 0.25,
        "dot": (abs(rows - middle) < width / 2) & (abs(columns - middle) < width / 2),
    }[kind]


THIN = [(kind, width) for kind in ("upright", "lying", "slanted", "ring", "dot") for width in (1, 2)]


def near(found: NDArray[np.bool_], mask: NDArray[np.bool_]) -> bool:
    """Whether each cell that was found is one that the mask touches, or the next one."""
    cells = np.zeros_like(found)
    places = np.argwhere(mask) * found.shape[0] // mask.shape[0]
    for row, column in places:
        cells[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
    return bool((cells | ~found).all())


@pytest.mark.parametrize(("kind", "width"), THIN)
@pytest.mark.parametrize("cells", [8, 16, 64])
def test_on_every_grid(kind: str, width: int, cells: int) -> None:
    mask = drawn(kind, width)
    tensor = torch.from_numpy(mask)
    grid = (cells, cells)
    fitted = cover(mask, grid)
    on_latents = latent_mask(tensor[None], grid)[0] > 0
    nearest = nearest_mask(tensor[None], grid)[0] > 0
    seen = on_grid(tensor, grid).reshape(grid)
    covered = coverage(tensor[None], grid)[0]
    for name, found in {"cover": fitted, "latent": on_latents, "nearest": nearest, "visible": seen}.items():
        assert bool(found.any()) and not bool(found.all()), name
        assert near(found.numpy(), mask), name
    assert bool((covered > 0).any())
    if kind in ("upright", "slanted"):  # unbroken from top to bottom
        first, last = cells // 8 + 1, cells - cells // 8 - 1
        for found in (fitted, on_latents, seen):
            assert bool(found[first:last].any(dim=1).all())


def test_what_is_not_thin_is_as_before() -> None:
    """Cells at least half covered, and no others."""
    square = torch.zeros(1, 64, 64, dtype=torch.bool)
    square[:, 8:33, 8:31] = True
    covered = coverage(square, (16, 16))
    assert torch.equal(latent_mask(square, (16, 16)), (covered >= 0.5).float())
    assert torch.equal(on_grid(square[0], (16, 16)), (covered > 0.5).flatten())
    nothing = torch.zeros(1, 64, 64, dtype=torch.bool)
    for found in (latent_mask(nothing, (4, 4)), nearest_mask(nothing, (4, 4)), on_grid(nothing[0], (4, 4))):
        assert not bool(found.any())


@pytest.mark.parametrize(("kind", "width"), THIN)
def test_what_is_seen_of_it(kind: str, width: int) -> None:
    """The image alone is not the whole image, what is erased is the mask, and crops around it have it in them."""
    mask = torch.from_numpy(drawn(kind, width, 64))
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    alone = isolate(image, mask)
    assert torch.equal(alone[:, mask], image[:, mask]) and not torch.equal(alone, image)
    assert not torch.equal(erase(image, ~mask, "black")[:, mask], image[:, mask])
    crops, masks = close_ups(image, mask, torch.zeros_like(mask), 3, (1.4, 2.0), torch.Generator().manual_seed(0))
    assert bool(masks.flatten(1).any(dim=1).all()) and not bool(masks.flatten(1).all(dim=1).any())
    assert bool(crops.isfinite().all())


# --- Through the doors -----------------------------------------------------------------------------------------------


def saved(path: Path, mask: NDArray[np.bool_]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def parts(**others: str) -> dict[str, str]:
    return {role: "plain" for role in ("backbone", "retriever", "segmentor", "learner")} | others


@pytest.mark.parametrize("kind", ["upright", "ring", "dot"])
def test_in_a_run(kind: str, photo: Path, tmp_path: Path) -> None:
    """512 pixels to 32."""
    mask = drawn(kind, 1)
    file = saved(tmp_path / "mask.png", mask)
    settings = load_settings(
        options={"components": parts(segmentor="masks"), "samples": 0, "segmentor": {"files": [str(file)]}}
    )
    run = extract(photo, tmp_path / "run", settings, installed=plain.beside_builtins())
    [concept] = run.manifest["concepts"]
    found = np.asarray(Image.open(tmp_path / "run" / concept["mask"])) > 0
    assert found.any() and near(found, mask) and 0 < concept["area"] < 0.3


def test_in_a_data_set(photo: Path, tmp_path: Path) -> None:
    mask = drawn("ring", 1)
    saved(tmp_path / "masks" / "photo" / "0-ring.png", mask)
    [picture] = FolderDataset(FolderDataset.Settings(path=tmp_path)).pictures(None, seed=0, size=(16, 16))
    [concept] = picture.concepts
    assert near(concept.mask.numpy(), mask) and bool(concept.mask.any()) and not bool(concept.mask.all())


def test_what_lies_outside_of_the_middle_names_its_file(tmp_path: Path) -> None:
    mask = np.zeros((64, 128), dtype=bool)
    mask[:, 3] = True
    file = saved(tmp_path / "mask.png", mask)
    backbone: Any = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    with pytest.raises(InputError, match=f"^mask {file} is empty: ") as error:
        MaskFilesSegmentor(MaskFilesSegmentor.Settings(files=(file,)), backbone)
    assert "\n" not in str(error.value)


def test_a_bench_refuses_masks_of_another_picture(photo: Path, tmp_path: Path) -> None:
    """As a run does: see ``Segmentor.check_picture``."""
    file = saved(tmp_path / "elsewhere" / "mask.png", np.ones((96, 128), dtype=bool))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    photo.rename(pictures / "photo.png")
    with pytest.raises(InputError, match=f"^mask {file} is 128 x 96, "):
        bench(
            "folder",
            tmp_path / "bench",
            components={role: [name] for role, name in parts(segmentor="masks").items()},
            metrics=["seen"],
            settings={"dataset": {"path": str(pictures)}, "segmentor": {"files": [str(file)]}},
            installed=plain.beside_builtins(),
        )
    assert not (tmp_path / "bench" / "bench.json").exists()
