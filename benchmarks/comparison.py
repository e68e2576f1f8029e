"""A bench's results as a Markdown table, one line a column: `python benchmarks/comparison.py benchmarks/NAME.json`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from icekit.bench.results import CEILING, FLOOR


def markdown(made: Mapping[str, Any]) -> str:
    """The table of a ``results.json``: a combination a column, the floor first and the ceiling last; "±" is half of the
    95 % interval. Where combinations differ the best is bold, where less is better ("↓") the smallest.
    """
    ends = {FLOOR: -1, CEILING: 1}
    rows = sorted(made["rows"], key=lambda row: ends.get(row["name"], 0))
    lines = [
        "| | " + " | ".join(row["name"] for row in rows) + " |",
        "| --- " * (len(rows) + 1) + "|",
    ]
    for column, what in made["columns"].items():
        numbers = {row["name"]: row["values"].get(column) for row in rows}
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
        lines.append(f"| {column}{'' if what['higher_is_better'] else ' ↓'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command(made: Mapping[str, Any]) -> str:
    """What was typed, without what only said where and how it goes on."""
    words = shlex.split(made["command"])
    words = [word for word in words if word not in ("--resume", "--overwrite")]
    return shlex.join(words)


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(results: Path) -> None:
    """Print the command and the table of RESULTS, a results.json."""
    made = json.loads(results.read_text(encoding="utf-8"))
    click.echo(f"`{command(made)}`\n\n{markdown(made)}")


if __name__ == "__main__":
    main()
