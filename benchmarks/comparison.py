"""A bench's results as a Markdown table, one line a column: `python benchmarks/comparison.py benchmarks/NAME.json`.

`--row 'xattn-*'` and `--column 'acc*'` show a part of it; `--across` writes a combination a line.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from icekit.bench.results import CEILING, FLOOR


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
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--row", "rows", multiple=True, default=["*"], help="Combinations to show, as in 'xattn-*'.")
@click.option("--column", "columns", multiple=True, default=["*"], help="Columns to show, as in 'acc*'.")
@click.option("--across", is_flag=True, help="A combination a line.")
def main(results: Path, rows: tuple[str, ...], columns: tuple[str, ...], across: bool) -> None:
    """Print the command and the table of RESULTS, a results.json."""
    made = json.loads(results.read_text(encoding="utf-8"))
    click.echo(f"`{command(made)}`\n\n{markdown(made, rows, columns, across=across)}")


if __name__ == "__main__":
    main()
