"""The results for people: ``bench.html``, one self-contained page in the manner of a run's report.

Whatever comes from the data set or the plugins (names, words, messages) is escaped by the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from icekit.bench import results
from icekit.bench.directory import BenchDirectory
from icekit.report.page import COLOURS, Picture, duration, mask_outline, to_picture
from icekit.run.directory import RunDirectory
from icekit.run.extraction import Extraction
from icekit.settings import flatten

SHOWN_IMAGES = 4
"""Of a prompt's images."""
SHOWN_PROMPTS = 3
"""Of an example's prompts."""
SOURCE_SIDE, STRIP_SIDE = 256, 640
"""Longest sides of the pictures in the page, pixels."""
KINDS = ("best", "median", "worst")


@dataclass(frozen=True)
class Example:
    """The pictures behind one image's value.

    kind: best, median or worst. outlines: SVG path data of the found masks, in pixels of the image.
    strips: (prompt, its first images side by side).
    """

    kind: str
    image: str
    value: float
    source: Picture
    size: tuple[int, int]
    outlines: list[tuple[str, str, str]]
    strips: list[tuple[str, Picture]]


@dataclass(frozen=True)
class Bar:
    """One row in a column's chart: the interval and the mean as shares of the chart's width, percent.

    kind: measured, end (floor and ceiling) or published, which has no interval: low and high are the mean then.
    """

    row: str
    kind: str
    text: str
    low: float
    mean: float
    high: float


def render_page(directory: BenchDirectory, made: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        directory: where the pictures are.
        made: the results, as ``results.summarise`` gives them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icekit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["cell"] = results.cell
    environment.filters["difference"] = results.difference
    environment.filters["published_name"] = results.published_name
    environment.filters["published_cell"] = results.published_cell
    environment.filters["settings"] = _settings
    folder = Path(__file__).parents[1] / "report" / "templates"
    style = Markup("\n".join((folder / name).read_text(encoding="utf-8") for name in ("report.css", "bench.css")))
    columns = [
        {
            "name": name,
            **what,
            "bars": _bars(made, name),
            "examples": _examples(directory, made, name, what),
        }
        for name, what in made["columns"].items()
    ]
    return environment.get_template("bench.html.jinja").render(
        style=style, made=made, columns=columns, published=results.published_rows(made), notes=results.notes(made)
    )


def _settings(nested: Mapping[str, Any]) -> str:
    """``naming = "alone", learner.steps = 400``."""
    return ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in flatten(nested).items())


def _bars(made: Mapping[str, Any], column: str) -> list[Bar]:
    rows = [(row, row["values"][column]) for row in made["rows"] if column in row["values"]]
    of_others = [(row, row["values"][column]) for row in results.published_rows(made) if column in row["values"]]
    start = min(0.0, *(value["low"] for _, value in rows), *(value for _, value in of_others))
    end = max(1.0, *(value["high"] for _, value in rows), *(value for _, value in of_others))

    def place(value: float) -> float:
        return round(100 * (value - start) / (end - start), 2)

    return [
        Bar(
            row["name"],
            "measured" if row["components"] else "end",
            results.cell(value),
            place(value["low"]),
            place(value["mean"]),
            place(value["high"]),
        )
        for row, value in rows
    ] + [
        Bar(
            results.published_name(row),
            "published",
            results.published_cell(value),
            place(value),
            place(value),
            place(value),
        )
        for row, value in of_others
    ]


def choose(values: Mapping[str, float], higher_is_better: bool) -> list[tuple[str, str]]:
    """The best, the median and the worst image, each once: (kind, image), for values by image."""
    ranked = sorted(values, key=lambda image: values[image], reverse=higher_is_better)
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
    chosen: dict[str, str] = {}
    for kind in ("best", "worst", "median"):
        if ranked and ranked[places[kind]] not in chosen.values():
            chosen[kind] = ranked[places[kind]]
    return [(kind, chosen[kind]) for kind in KINDS if kind in chosen]


def _examples(
    directory: BenchDirectory, made: Mapping[str, Any], column: str, what: Mapping[str, Any]
) -> list[tuple[str, list[Example]]]:
    """Row -> its examples, for the rows that are combinations of components."""
    found = []
    for row in made["rows"]:
        if not row["components"]:
            continue
        values = {image: table[column] for image, table in row["images"].items() if table.get(column) is not None}
        examples = [
            _example(directory, made, row["name"], kind, image, values[image], what["metric"], column)
            for kind, image in choose(values, what["higher_is_better"])
        ]
        found.append((row["name"], examples))
    return found


def _example(
    directory: BenchDirectory,
    made: Mapping[str, Any],
    row: str,
    kind: str,
    image: str,
    value: float,
    metric: str,
    column: str,
) -> Example:
    files = directory.files
    picture = files.picture((directory.data(image) / "image.png").relative_to(directory.path).as_posix())
    source = picture.convert("RGB") if picture else Image.new("RGB", (1, 1))
    score = directory.load_values(row, image)["metrics"][metric][column]
    strips = []
    for prompt, name in list(zip(score["prompts"], score["strips"], strict=True))[:SHOWN_PROMPTS]:
        strip = files.picture(name)
        if strip is not None:
            first = _first(strip.convert("RGB"), made["settings"]["bench"]["images"])
            strips.append((prompt, to_picture(first, STRIP_SIDE)))
    return Example(
        kind, image, value, to_picture(source, SOURCE_SIDE), source.size, _outlines(directory, row, image), strips
    )


def _first(strip: Image.Image, count: int) -> Image.Image:
    """The first images of a strip of so many."""
    return strip.crop((0, 0, strip.width // count * min(count, SHOWN_IMAGES), strip.height))


def _outlines(directory: BenchDirectory, row: str, image: str) -> list[tuple[str, str, str]]:
    """(label, colour, path data) of every mask of a run; none where the run failed."""
    place = directory.run(row, image)
    if not RunDirectory(place).is_complete:
        return []
    return [
        (f"{one.index}-{one.label}", COLOURS[number % len(COLOURS)], mask_outline(one.mask()))
        for number, one in enumerate(Extraction.open(place).concepts)
    ]
