"""From values to results: means, intervals, the table's cells, the CSV."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from icekit.bench.bootstrap import bootstrap
from icekit.bench.published import Published
from icekit.protocols import Column

FLOOR, CEILING = "floor", "ceiling"
"""The rows that are no combination of components."""
SCHEMA_VERSION = 1


def portable(settings: Any) -> Any:
    """Nested settings in which a folder of an imported package is named from the package on.

    ``local-dir:/home/me/icekit_tabletop/models`` -> ``local-dir:icekit_tabletop/models``: results are for others to
    read, and a bench may go on where the package lies elsewhere.
    """
    if isinstance(settings, Mapping):
        return {key: portable(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [portable(value) for value in settings]
    if isinstance(settings, str) and os.sep in settings:
        for name, module in list(sys.modules.items()):
            for folder in [] if "." in name else getattr(module, "__path__", []):
                settings = settings.replace(f"{folder}{os.sep}", f"{name}{os.sep}")
    return settings


def summarise(
    *,
    values: Mapping[str, Mapping[str, Mapping[str, Any]]],
    columns: Mapping[str, Mapping[str, Column]],
    images: Sequence[str],
    components: Mapping[str, Mapping[str, str]],
    seed: int,
    record: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    against: str | None = None,
    published: Published | None = None,
) -> dict[str, Any]:
    """Put everything that was measured together, as in ``results.json``.

    Args:
        values: row -> image -> what ``BenchDirectory.load_values`` gives.
        columns: metric -> its columns by name.
        images: names, in order.
        components: combination -> role -> name.
        seed: of the bootstrap.
        record: what was measured and how; comes first.
        overrides: named row -> its own settings, nested.
        against: the row that every other is held against.
        published: figures of others on this data set.

    Returns:
        ``record`` with ``columns`` (name -> metric, meaning, higher_is_better, says_nothing) and ``rows``: name,
        components (None for floor and ceiling), overrides (None but for named rows),
        ``values`` (column -> mean, low, high, n), ``images`` (image -> column
        -> value), ``errors`` (image -> why its run failed) and ``seconds`` (means over images). Columns that nobody has
        a value for are left out. With ``against`` every other row has ``differences``, too: as ``values``, of its value
        less that row's in the images in which both have one. With ``published`` figures in any of the columns there are
        those, too: ``images``, ``notes`` and ``rows`` of name, source and ``values`` (column -> number).
    """
    rows: list[dict[str, Any]] = []
    for name, by_image in values.items():
        table = {image: _scores(by_image[image], columns) for image in images}
        estimates = {}
        for metric in columns.values():
            for column in metric:
                numbers = [value for image in images if (value := table[image].get(column)) is not None]
                if numbers:
                    estimates[column] = estimate_of(numbers, seed)
        seconds = [by_image[image]["seconds"] for image in images if by_image[image].get("seconds")]
        rows.append(
            {
                "name": name,
                "components": components.get(name),
                "overrides": (overrides or {}).get(name),
                "values": estimates,
                "images": table,
                "errors": {image: by_image[image]["error"] for image in images if by_image[image].get("error")},
                "seconds": _mean_seconds(seconds) if name in components else {},
            }
        )
    if against is not None:
        other = next(row["images"] for row in rows if row["name"] == against)
        names = [column for metric in columns.values() for column in metric]
        for row in rows:
            if row["name"] != against:
                row["differences"] = differences(row["images"], other, names, seed)
    by_name = {row["name"]: row["values"] for row in rows}
    described = {}
    for metric_name, metric in columns.items():
        for column, what in metric.items():
            if any(column in row["values"] for row in rows):
                described[column] = {
                    "metric": metric_name,
                    "meaning": what.meaning,
                    "higher_is_better": what.higher_is_better,
                    "says_nothing": says_nothing(by_name, column, what.higher_is_better),
                }
    made = {"schema_version": SCHEMA_VERSION, **record, "columns": described, "rows": rows}
    of_others = published.of_columns(described) if published else {}
    return made | ({"published": of_others} if of_others.get("rows") else {})


def estimate_of(numbers: Sequence[float], seed: int) -> dict[str, float]:
    """The mean of one number or more and its interval, JSON-able."""
    estimate = bootstrap(numbers, seed)
    assert estimate is not None
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.count}


def differences(
    table: Mapping[str, Mapping[str, float | None]],
    other: Mapping[str, Mapping[str, float | None]],
    columns: Iterable[str],
    seed: int,
) -> dict[str, dict[str, float]]:
    """By how much one row's values are above another's, image by image: column -> mean, low, high, n.

    table, other: image -> column -> value.
    """
    found = {}
    for column in columns:
        pairs = [(values.get(column), other[image].get(column)) for image, values in table.items()]
        numbers = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
        if numbers:
            found[column] = estimate_of(numbers, seed)
    return found


def says_nothing(rows: Mapping[str, Mapping[str, Any]], column: str, higher_is_better: bool) -> bool:
    """Whether a column's ceiling is not better than its floor, where both were measured."""
    floor, ceiling = (rows.get(name, {}).get(column) for name in (FLOOR, CEILING))
    if floor is None or ceiling is None:
        return False
    better = ceiling["mean"] > floor["mean"] if higher_is_better else ceiling["mean"] < floor["mean"]
    return not better


def cell(estimate: Mapping[str, float] | None) -> str:
    """``0.62 [0.55, 0.70]``; a dash where nothing was measured."""
    if estimate is None:
        return "–"
    return f"{estimate['mean']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def published_rows(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of others' figures: name, source, values."""
    rows: list[dict[str, Any]] = made.get("published", {}).get("rows", [])
    return rows


def published_name(row: Mapping[str, Any]) -> str:
    """What a row of others' figures is called wherever it stands beside measured ones."""
    return f"{row['name']} (published)"


def published_cell(value: float | None) -> str:
    """``0.738``, with the decimals that publications have; a dash where nothing was published."""
    return "–" if value is None else f"{value:.3f}"


def difference(estimate: Mapping[str, float] | None) -> str:
    """``+0.06 [+0.02, +0.10]``; a dash where nothing was measured."""
    if estimate is None:
        return "–"
    return f"{estimate['mean']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"


def heading(column: str, what: Mapping[str, Any]) -> str:
    """A column's name; ``↓`` where less is better, ``!`` where it says nothing."""
    return column + ("" if what["higher_is_better"] else " ↓") + (" !" if what["says_nothing"] else "")


def notes(made: Mapping[str, Any]) -> list[str]:
    """What must be said under the table."""
    lines = []
    by_name = {row["name"]: row["values"] for row in made["rows"]}
    for column, what in made["columns"].items():
        if what["says_nothing"]:
            floor, ceiling = (by_name[name][column]["mean"] for name in (FLOOR, CEILING))
            lines.append(
                f"! {column} says nothing here: its ceiling ({ceiling:.2f}) is no better than its floor ({floor:.2f})"
            )
    for row in made["rows"]:
        if row["errors"]:
            [first, *_] = row["errors"].items()
            lines.append(
                f"{row['name']}: nothing came of {len(row['errors'])} of {made['n']} images ({first[0]}: {first[1]})"
            )
    if of_others := made.get("published"):
        if of_others["images"] != made["n"]:
            lines.append(
                f"published figures are of {of_others['images']} images and these of {made['n']}: no comparison"
            )
        lines += [f"{published_name(row)}: {row['source']}" for row in of_others["rows"]]
        lines += of_others["notes"]
    return lines


def to_csv(made: Mapping[str, Any]) -> str:
    """One line a row: its name, its components, and mean, low, high and n of every column.

    Others' figures come last, as means alone, with their source in a last column of their own.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    roles = ["backbone", "retriever", "segmentor", "learner"]
    parts = ("mean", "low", "high", "n")
    of_others = published_rows(made)
    last = [["published_in"], [""]] if of_others else [[], []]
    writer.writerow(["row", *roles, *(f"{column}_{part}" for column in made["columns"] for part in parts), *last[0]])
    for row in made["rows"]:
        cells = [row["values"].get(column, {}).get(part, "") for column in made["columns"] for part in parts]
        writer.writerow([row["name"], *((row["components"] or {}).get(role, "") for role in roles), *cells, *last[1]])
    for row in of_others:
        cells = [
            row["values"].get(column, "") if part == "mean" else "" for column in made["columns"] for part in parts
        ]
        writer.writerow([published_name(row), *("" for _ in roles), *cells, row["source"]])
    return file.getvalue()


def _scores(kept: Mapping[str, Any], columns: Mapping[str, Mapping[str, Column]]) -> dict[str, float | None]:
    return {column: score["value"] for metric in columns for column, score in kept["metrics"].get(metric, {}).items()}


def _mean_seconds(seconds: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    means = {}
    for key in ("localise_s", "learn_s"):
        numbers = [value for one in seconds if (value := one.get(key)) is not None]
        if numbers:
            means[key] = round(sum(numbers) / len(numbers), 2)
    return means
