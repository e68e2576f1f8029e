"""A bench's results as a Markdown table, one line a column: `python benchmarks/comparison.py benchmarks/NAME.json`.

`--row 'xattn-*'` and `--column 'acc*'` show a part of it; `--across` writes a combination a line. Results of several
seeds are taken together, image by image. `--against ROW` adds a table of differences, image by image.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from icekit.bench.results import CEILING, FLOOR, difference, differences, estimate_of


def pooled(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of the same rows on several seeds as if they were of one: all images together."""
    first = parts[0]
    rows = []
    for row in first["rows"]:
        same = [next(one for one in part["rows"] if one["name"] == row["name"]) for part in parts]
        table = {
            f"{part['seed']}/{image}": values
            for part, one in zip(parts, same, strict=True)
            for image, values in one["images"].items()
        }
        values = {}
        for column in first["columns"]:
            numbers = [value for one in table.values() if (value := one.get(column)) is not None]
            if numbers:
                values[column] = estimate_of(numbers, first["seed"])
        rows.append({**row, "images": table, "values": values})
    return {**first, "rows": rows}


def against_markdown(made: Mapping[str, Any], against: str, columns: Sequence[str]) -> str:
    """By how much every row is above one of them, a row a line: mean and 95 % interval."""
    shown = [column for column in made["columns"] if _any(column, columns)]
    other = next(row["images"] for row in made["rows"] if row["name"] == against)
    table = [["", *(f"{one}{'' if made['columns'][one]['higher_is_better'] else ' ↓'}" for one in shown)]]
    for row in made["rows"]:
        if row["name"] not in (against, FLOOR, CEILING):
            found = differences(row["images"], other, shown, made["seed"])
            table.append([row["name"], *(difference(found.get(column)) for column in shown)])
    lines = ["| " + " | ".join(line).strip() + " |" for line in table]
    return "\n".join([lines[0], "| --- " * len(table[0]) + "|", *lines[1:]])


def markdown(
    made: Mapping[str, Any], rows: Sequence[str] = ("*",), columns: Sequence[str] = ("*",), *, across: bool = False
) -> str:
    """The table of a ``results.json``: a combination a column, the floor first and the ceiling last; "±" is half of the
    95 % interval. Where combinations differ the best is bold, where less is better ("↓") the smallest.

    ``rows`` and ``columns`` are patterns (fnmatch) of what is shown; floor and ceiling always are. ``across``: a
    combination a line.
    """
    ends = {FLOOR: -1, CEILING: 1}
    shown = [row for row in made["rows"] if row["name"] in ends or _any(row["name"], rows)]
    shown.sort(key=lambda row: ends.get(row["name"], 0))
    table = [["", *(row["name"] for row in shown)]]
    for column, what in made["columns"].items():
        if not _any(column, columns):
            continue
        numbers = {row["name"]: row["values"].get(column) for row in shown}
        inner = {value["mean"] for name, value in numbers.items() if value and name not in ends}
        best = (max if what["higher_is_better"] else min)(inner) if len(inner) > 1 else None
        cells = []
        for name, value in numbers.items():
            if value is None:
                cells.append("–")
                continue
            text = f"{value['mean']:.2f}"
            text = f"**{text}**" if name not in ends and value["mean"] == best else text
            cells.append(f"{text} ± {(value['high'] - value['low']) / 2:.2f}")
        table.append([f"{column}{'' if what['higher_is_better'] else ' ↓'}", *cells])
    if across:
        table = [list(line) for line in zip(*table, strict=True)]
    lines = ["| " + " | ".join(line).strip() + " |" for line in table]
    return "\n".join([lines[0], "| --- " * len(table[0]) + "|", *lines[1:]])


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def command(made: Mapping[str, Any]) -> str:
    """What was typed, without what only said where and how it goes on."""
    words = shlex.split(made["command"])
    words = [word for word in words if word not in ("--resume", "--overwrite")]
    return shlex.join(words)


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--row", "rows", multiple=True, default=["*"], help="Combinations to show, as in 'xattn-*'.")
@click.option("--column", "columns", multiple=True, default=["*"], help="Columns to show, as in 'acc*'.")
@click.option("--across", is_flag=True, help="A combination a line.")
@click.option("--against", metavar="ROW", help="Add by how much the others are above this row.")
def main(
    results: tuple[Path, ...], rows: tuple[str, ...], columns: tuple[str, ...], across: bool, against: str | None
) -> None:
    """Print the commands and the table of RESULTS, one results.json or several of the same rows."""
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in results]
    made = pooled(parts) if len(parts) > 1 else parts[0]
    for part in parts:
        click.echo(f"`{command(part)}`\n")
    click.echo(markdown(made, rows, columns, across=across))
    if against is not None:
        click.echo(f"\nagainst {against}:\n\n{against_markdown(made, against, columns)}")


if __name__ == "__main__":
    main()
