"""``icekit bench``: combinations of components, measured on a data set."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from icekit import plugins
from icekit.cli.common import (
    LOW_MEMORY,
    Invocation,
    executor_options,
    executor_values,
    low_memory_option,
    preset_option,
    print_json,
    print_table,
    table_of,
    with_resume,
)
from icekit.cli.completion import DEVICES, complete_setting, names
from icekit.cli.parameters import COUNT, SEED, UserPath
from icekit.foreign import aside
from icekit.settings import merge, parse_assignment, read_settings_file


def _several(role: str, what: str) -> Callable[[Any], Any]:
    return click.option(f"--{role}", f"{role}s", multiple=True, metavar="NAME", help=what, shell_complete=names(role))


@click.command("bench")
@click.argument("dataset", metavar="DATASET", shell_complete=names("dataset"))
@click.option("--out", type=UserPath(), required=True, metavar="DIR", help="Bench directory")
@click.option("--n", "count", type=COUNT, metavar="N", help="Number of images [default: the data set's]")
@executor_options
@click.option("--seed", type=SEED, default=0, show_default=True, metavar="N", help="Which "
              "images, where there is a choice, and every other random choice.")  # fmt: skip
@preset_option
@_several("retriever", "Measure this retriever; give it once for each")
@_several("segmentor", "Measure this segmentor; give it once for each")
@_several("learner", "Measure this learner; give it once for each")
@_several("attribute", "Learn this attribute; give it once for each")
@_several("metric", "Measure this; give it once for each [default: all that suit the data set]")
@click.option(
    "--backbone",
    metavar="NAME",
    shell_complete=names("backbone"),
    help="Text-to-image model [default: the data set's, or sd21]",
)
@click.option("--config", type=UserPath(), metavar="FILE", help="Settings file (TOML); a table "
              "[rows.NAME] in it is a row of its own, with settings over the others")  # fmt: skip
@click.option("--path", type=UserPath(), metavar="FOLDER", help="The pictures, for the data sets folder and uce")
@click.option(
    "--device", metavar="auto|cpu|cuda|mps", shell_complete=DEVICES, help="Where the models run [default: auto]"
)
@low_memory_option
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE",
              shell_complete=complete_setting, help="One setting, as in learner.steps=400 "
              "(all learners that have it), learner.ice.steps=400 (one), bench.images=4")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the bench in DIR, with the same settings.")
@click.option("--overwrite", is_flag=True, help="Replace the bench in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_context
def run_bench(
    context: click.Context,
    dataset: str,
    out: Path,
    count: int | None,
    executor: str | None,
    workers: int | None,
    seed: int,
    preset: str | None,
    retrievers: Sequence[str],
    segmentors: Sequence[str],
    learners: Sequence[str],
    attributes: Sequence[str],
    metrics: Sequence[str],
    backbone: str | None,
    config: Path | None,
    path: Path | None,
    device: str | None,
    low_memory: bool,
    assignments: Sequence[str],
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure every combination of the components given on DATASET, a floor and a ceiling.

    Prints a table of means with their 95 % bootstrap intervals over images, and writes results.json, results.csv and
    bench.html into DIR. Figures that others published on DATASET stand below. What was measured is kept: --resume goes
    on where a bench was interrupted, and measures learners, metrics or images that were added. With --workers or
    --executor several processes measure, an image of a row at a time; without, this one alone.

    icekit bench tabletop --n 8 --learner ice --learner textual-inversion --out runs/bench
    """
    settings = read_settings_file(config) if config is not None else {}
    for assignment in assignments:
        settings = merge(settings, parse_assignment(assignment))
    of_executor = executor_values(settings.pop("executor", {}), workers)
    executor = executor or ("local" if of_executor else None)
    options = {"preset": preset, "attributes": list(attributes), "device": device}
    settings = merge(settings, {key: value for key, value in options.items() if value})
    if low_memory:
        settings = merge(settings, {"backbone": LOW_MEMORY})
    if path is not None:
        settings = merge(settings, {"dataset": {"path": str(path)}})
    components = {"retriever": retrievers, "segmentor": segmentors, "learner": learners}
    components |= {"backbone": [backbone] if backbone else []}

    typed = shlex.join(["icekit", *sys.argv[1:]])
    if isinstance(context.find_root().obj, Invocation):
        context.find_root().obj.resume = with_resume(sys.argv[1:])
    from icekit.bench import bench
    from icekit.bench.results import (
        cell,
        difference,
        heading,
        notes,
        published_cell,
        published_name,
        published_rows,
    )
    from icekit.cli.progress import BenchProgress

    found = plugins.installed()
    with aside(), BenchProgress([broken.warning for broken in found.broken]) as progress:
        made = bench(
            dataset,
            out,
            count=count,
            seed=seed,
            components=components,
            metrics=metrics,
            settings=settings,
            resume=resume,
            overwrite=overwrite,
            executor=executor,
            executor_settings=of_executor,
            command=typed,
            on_progress=progress.show,
            installed=found,
        )
    if as_json:
        print_json(made)
        return
    columns = list(made["columns"])
    at_once = max(1, (shutil.get_terminal_size().columns - 20) // 21) if sys.stdout.isatty() else len(columns)
    for start in range(0, len(columns), at_once):
        shown = columns[start : start + at_once]
        table = table_of("", *(heading(column, made["columns"][column]) for column in shown))
        for row in made["rows"]:
            table.add_row(row["name"], *(cell(row["values"].get(column)) for column in shown))
        for row in published_rows(made):
            table.add_row(published_name(row), *(published_cell(row["values"].get(column)) for column in shown))
        print_table(table)
    against = made["settings"]["bench"]["against"]
    if against is not None:
        click.echo(f"against {against}, image by image:")
        for start in range(0, len(columns), at_once):
            shown = columns[start : start + at_once]
            table = table_of("", *(heading(column, made["columns"][column]) for column in shown))
            for row in made["rows"]:
                if "differences" in row and row["components"]:
                    table.add_row(row["name"], *(difference(row["differences"].get(column)) for column in shown))
            print_table(table)
    for note in notes(made):
        click.echo(note)
    click.echo(f"{out} (page: {out / 'bench.html'})")
