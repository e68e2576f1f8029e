"""Makes the pictures of the pages from what icekit left; see CONTRIBUTING.md.

python docs/pictures.py runs/demo runs/texture compositions/cup
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LABEL = 160, 10, 22
IMAGES = Path(__file__).parent / "images"
MASK_COLOUR = (230, 159, 0)
Tile = tuple[Image.Image, str]


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture as a tile."""
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def tiled(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Rows of pictures, each with a label below it."""
    width = max(map(len, rows))
    sheet = Image.new("RGB", (width * (SIDE + GAP) - GAP, len(rows) * (SIDE + LABEL)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for y, row in enumerate(rows):
        for x, (picture, label) in enumerate(row):
            corner = (x * (SIDE + GAP), y * (SIDE + LABEL))
            sheet.paste(enlarged(picture), corner)
            pen.text((corner[0] + SIDE / 2, corner[1] + SIDE + 2), label, fill=(60, 60, 60), font=font, anchor="ma")
    return sheet


def masked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture with a mask in colour."""
    pixels = np.asarray(enlarged(picture), dtype=float)
    inside = np.asarray(mask.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=float)[..., None] / 255
    pixels += 0.7 * inside * (np.array(MASK_COLOUR) - pixels)
    return Image.fromarray(pixels.round().astype(np.uint8))


def looked_at(picture: Image.Image, attention: Image.Image) -> Image.Image:
    """A picture, dark where a token does not look."""
    weight = np.asarray(attention.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=float) / 255
    pixels = np.asarray(enlarged(picture), dtype=float) * (0.15 + 0.85 * weight[..., None])
    return Image.fromarray(pixels.round().astype(np.uint8))


def samples(run: Path, concept: int, parts: Sequence[str], words: bool = False) -> list[Tile]:
    """Two samples of each part, of the tokens or of the words alone."""
    record = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["concepts"][concept]
    middle, labels = ("words-", record["words_alone"]) if words else ("", {})
    return [
        (Image.open(run / f"samples/{concept}-{part}-{middle}{number}.png"), labels.get(part, part))
        for part in parts
        for number in (0, 1)
    ]


def save(sheet: Image.Image, name: str) -> None:
    """Write a picture of the pages."""
    sheet.save(IMAGES / name, quality=88, optimize=True)


def main(demo: Path, texture: Path, composition: Path) -> None:
    """Make all pictures.

    demo: a run of examples/tabletop.png with colour, material and texture. texture: one with the texture alone.
    composition: its cups in the bottle's colour.
    """
    picture = Image.open(demo / "image.png")
    masks = sorted((demo / "masks").glob("*.png"))
    found = [(masked(picture, Image.open(path)), path.stem.partition("-")[2]) for path in masks]
    save(tiled([[(picture, "the picture"), *found]]), "walk-masks.jpg")

    parts = ("category", "instance", "colour", "material", "texture")
    looks = [(looked_at(picture, Image.open(demo / f"attention/0-{part}.png")), part) for part in parts]
    save(tiled([looks]), "walk-attention.jpg")

    shown = ("object", "colour", "material")
    save(tiled([samples(demo, 0, shown)]), "walk-samples.jpg")
    save(tiled([samples(demo, 0, shown, words=True)]), "walk-words.jpg")
    made = sorted(one for one in composition.glob("*.png") if one.stem != "sheet")
    save(tiled([[(Image.open(one), "a cup, {a.colour}") for one in made]]), "walk-cups.jpg")

    look = looked_at(Image.open(texture / "image.png"), Image.open(texture / "attention/0-texture.png"))
    row = [(Image.open(texture / "image.png"), "the picture"), (look, "where the token looks")]
    save(tiled([row + samples(texture, 0, ("texture",))]), "tutorial-texture.jpg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
