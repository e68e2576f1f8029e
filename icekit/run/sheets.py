"""Contact sheets: many pictures on one, in rows and columns with labels."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

LEAST_CELL, MOST_CELL = 256, 512
"""How wide a picture is on a sheet, pixels: small ones are enlarged by a whole number, large ones made smaller."""
MAX_SIDE = 8192
"""A sheet's sides, pixels, at most."""
MAX_LINES = 3
"""Lines of a label."""
GAP = 0.03
"""Between pictures, as a share of one's width."""
INK, PAPER = "black", "white"


@dataclass(frozen=True)
class Layout:
    """How pictures lie on a sheet.

    rows, columns: their labels; one empty label for a side without. across, down: how many pictures a cell has side by
    side and one below the other.
    """

    rows: tuple[str, ...] = ("",)
    columns: tuple[str, ...] = ("",)
    across: int = 1
    down: int = 1

    @property
    def count(self) -> int:
        """Of pictures: row by row, in each column by column, in each cell line by line."""
        return len(self.rows) * len(self.columns) * self.across * self.down


def plain_layout(count: int) -> Layout:
    """So many pictures without labels, in about as many lines as columns."""
    across = math.ceil(math.sqrt(count))
    return Layout(across=across, down=math.ceil(count / across))


class Sheet:
    """A sheet that is being filled: pictures may come in any order, and none is kept.

    layout: of it. size: (height, width) of a picture, pixels.
    """

    def __init__(self, layout: Layout, size: tuple[int, int]) -> None:
        self.layout = layout
        height, width = size
        wide, high = len(layout.columns) * layout.across, len(layout.rows) * layout.down
        scale: float = max(1, math.ceil(LEAST_CELL / width)) if width < LEAST_CELL else min(1.0, MOST_CELL / width)
        # A fifth is left for labels and gaps.
        scale = min(scale, 0.8 * MAX_SIDE / (wide * width), 0.8 * MAX_SIDE / (high * height))
        self._cell = width, height = max(1, round(scale * width)), max(1, round(scale * height))
        self._gap = max(1, round(GAP * width))
        self._between = 3 * self._gap if max(layout.across, layout.down) > 1 else self._gap
        """Between cells of several pictures."""
        self._font = ImageFont.load_default(max(10, min(round(width / 8), 40)))
        self._line = round(1.25 * _height(self._font))
        group = layout.across * width + (layout.across - 1) * self._gap
        above = [wrapped(label, self._font, group) for label in layout.columns]
        beside = [wrapped(label, self._font, max(width, LEAST_CELL)) for label in layout.rows]
        self._top = self._gap + max(len(lines) for lines in above) * self._line + (self._gap if any(above) else 0)
        longest = max((self._font.getlength(line) for lines in beside for line in lines), default=0)
        self._left = self._gap + (math.ceil(longest) + 2 * self._gap if longest else 0)
        right, bottom = self._corner(layout.count - 1)
        self.image = Image.new("RGB", (right + width + self._gap, bottom + height + self._gap), PAPER)
        self._label(above, beside, group)

    def put(self, number: int, picture: Image.Image) -> None:
        """Put a picture on its place, in the order of ``Layout.count``."""
        whole = self._cell[0] % picture.width == 0 and self._cell[0] >= picture.width
        resample = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
        self.image.paste(picture.convert("RGB").resize(self._cell, resample), self._corner(number))

    def _corner(self, number: int) -> tuple[int, int]:
        """Left and upper edge of a picture."""
        layout, (width, height) = self.layout, self._cell
        cell, inside = divmod(number, layout.across * layout.down)
        row, column = divmod(cell, len(layout.columns))
        down, across = divmod(inside, layout.across)
        x, y = column * layout.across + across, row * layout.down + down
        extra = self._between - self._gap
        return (
            self._left + x * (width + self._gap) + column * extra,
            self._top + y * (height + self._gap) + row * extra,
        )

    def _label(self, above: Sequence[Sequence[str]], beside: Sequence[Sequence[str]], group: int) -> None:
        """Draw the labels: columns' above them and centred, rows' to the left of them and at half their height."""
        layout, draw = self.layout, ImageDraw.Draw(self.image)
        each, height = layout.across * layout.down, self._cell[1]
        for column, lines in enumerate(above):
            left, _ = self._corner(column * each)
            for line, text in enumerate(lines):
                upper = self._top - self._gap - (len(lines) - line) * self._line
                draw.text((left + group / 2, upper), text, INK, self._font, anchor="ma")
        tall = layout.down * height + (layout.down - 1) * self._gap
        for row, lines in enumerate(beside):
            _, top = self._corner(row * len(layout.columns) * each)
            for line, text in enumerate(lines):
                y = top + tall / 2 + (line - len(lines) / 2) * self._line
                draw.text((self._left - 2 * self._gap, y), text, INK, self._font, anchor="ra")


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """A label in lines no longer than so many pixels, ``MAX_LINES`` at most; what is too long ends with dots.

    Pillow's own font has the letters of ASCII: others lose their accents, or are question marks.
    """
    lines: list[str] = []
    for word in _drawable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    shown = lines[:MAX_LINES]
    if len(lines) > MAX_LINES:
        shown[-1] += " ..."
    return [_cut(line, font, width) for line in shown]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    kept = line
    while font.getlength(line) > width and len(kept) > 1:
        kept = kept[:-1]
        line = f"{kept.rstrip(' .')}..."
    return line


def _drawable(text: str) -> str:
    bare = "".join(one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one))
    return bare.encode("ascii", "replace").decode()


def _height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    _, top, _, bottom = font.getbbox("Ag")
    return bottom - min(0, top)
