"""The UCE benchmark: unsupervised concept extraction from single photographs.

Hao et al., "ConceptExpress: Harnessing Diffusion Models for Single-image Unsupervised Concept Extraction" (ECCV 2024).
Its photographs are fetched by whoever measures; icekit ships none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icekit.builtin.datasets.folder import concepts_of, safe_names
from icekit.builtin.datasets.settings import UceSettings
from icekit.builtin.segmentors.masks import image_files, natural_order
from icekit.files import is_hidden
from icekit.protocols import BenchPicture, InputError
from icekit.waiting import told

PICTURE_NAMES = ("img", "image")
"""What a photograph is called, before its suffix."""
MASK_NAMES = ("mask", "semantic_mask")
"""How the name of a mask beside it begins."""
LAYOUT = "a folder for each photograph, 00/img.jpg, with its masks beside it, 00/mask0.png, 00/mask1.png, ..."


class UceDataset:
    """The UCE benchmark: a folder for each photograph, ``00/img.jpg``, with ``mask0.png``, ... beside it.

    White is the object. Masks may lie in ``00/masks/``, too. What a mask is of is not said: UCE knows no words. Every
    photograph needs masks, for all of its figures are of known objects; an object outside the middle that the model
    sees is left out.
    """

    Settings = UceSettings

    preset = "uce"

    metrics: Sequence[str] = (
        *("sim_i", "sim_c", "acc1", "acc3"),
        *("sim_i_dino", "sim_c_dino", "acc1_dino", "acc3_dino"),
        *("miou", "mask_recall", "mask_precision", "recall", "attribute_clip"),
    )
    """The protocol's; objects that were found at all; and whether attributes' images show what they are named with."""

    def __init__(self, settings: UceSettings) -> None:
        if settings.path is None:
            raise InputError(f"data set 'uce' has no folder: give one, as in --path FOLDER; it has {LAYOUT}")
        if not settings.path.is_dir():
            raise InputError(f"dataset.path: no such folder: {settings.path}")
        self._path = settings.path
        self.published = Path(__file__).with_name("uce_d1.toml") if settings.published == "D1" else None

    def pictures(self, count: int | None, seed: int, size: tuple[int, int]) -> Sequence[BenchPicture]:
        """The photographs in the natural order of their folders, whatever the seed; see ``protocols.Dataset``."""
        entries = find_photographs(self._path)
        if count is not None and count > len(entries):
            raise InputError(f"--n {count}: {self._path} has {len(entries)} photographs")
        names = safe_names([folder.name for folder, _, _ in entries])
        chosen = list(zip(names, entries, strict=True))[:count]
        return [
            BenchPicture(name, picture, concepts_of(picture, masks, size))
            for name, (_, picture, masks) in told(chosen, f"reading the photographs of {self._path}")
        ]


def find_photographs(path: Path) -> list[tuple[Path, Path, list[Path]]]:
    """The photographs of a folder in UCE's layout: (its folder, its file, its mask files in their order).

    Raises:
        InputError: there are none, or one has no photograph or no masks, or several photographs.
    """
    folders = sorted((one for one in path.iterdir() if _counts(one)), key=natural_order)
    found = [(folder, *_of_one(folder)) for folder in folders]
    for folder, pictures, masks in found:
        if not pictures and not masks and any(image_files(one) for one in folder.iterdir() if one.is_dir()):
            raise InputError(f"no photograph in {path}, but some further down: give --path {folder}")
        if len(pictures) != 1:
            several = ", ".join(one.name for one in pictures[:3])
            problem = f"has several images that are no masks ({several})" if pictures else "has no photograph"
            raise InputError(f"{folder} {problem}: the photograph is called img.jpg, masks mask0.png, ...")
        if not masks:
            raise InputError(
                f"{folder} has no masks (mask0.png, ...), and UCE's figures are of known objects: "
                f"`icekit bench folder --path {path}` measures what needs none"
            )
    if not found:
        raise InputError(f"no photograph in {path}: UCE is {LAYOUT}")
    return [(folder, pictures[0], masks) for folder, pictures, masks in found]


def _counts(path: Path) -> bool:
    """Whether this is a photograph's folder: archives leave folders like ``__MACOSX``, systems hidden ones."""
    return path.is_dir() and not is_hidden(path) and not path.name.startswith("_")


def _of_one(folder: Path) -> tuple[list[Path], list[Path]]:
    """What may be the photograph of a folder, and its masks."""
    files = image_files(folder)
    masks = [file for file in files if file.stem.lower().startswith(MASK_NAMES)]
    pictures = [file for file in files if file not in masks]
    named = [file for file in pictures if file.stem.lower() in PICTURE_NAMES]
    beside = folder / "masks"
    return named or pictures, masks or (image_files(beside) if beside.is_dir() else [])
