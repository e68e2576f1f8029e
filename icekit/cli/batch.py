"""``icekit batch``: the concepts of many pictures, a run directory each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from icekit import plugins
from icekit.cli.common import Invocation, executor_options, executor_values, print_json, typed_again
from icekit.cli.parameters import UserPath
from icekit.cli.settings_options import layers_of, settings_options
from icekit.foreign import aside
from icekit.settings import Settings, merge, parse_assignment, read_settings_file, validate


@click.command("batch")
@click.argument("pictures", type=UserPath(), nargs=-1, required=True, metavar="IMAGE|FOLDER|LIST.txt|GLOB...")
@click.option("--out", type=UserPath(), required=True, metavar="DIR", help="Batch directory")
@executor_options
@settings_options
@click.option("--resume", is_flag=True, help="Go on with the batch in DIR: what happens without it, too.")
@click.option("--overwrite", is_flag=True, help="Replace the batch in DIR, each run when its new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print what is in batch.json, and the failures, as JSON.")
@click.pass_context
def batch(
    context: click.Context,
    pictures: Sequence[Path],
    out: Path,
    executor: str | None,
    workers: int | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Extract the concepts of many pictures, a run directory each, with the models loaded once a worker.

    Pictures are files, folders (with all below them), lists (.txt, a path a line) and quoted patterns. A picture that
    fails stops no other: DIR/failures.jsonl says why, and the exit status is 1. The same command goes on where a batch
    was interrupted, and does pictures that were added or have failed. DIR/index.html shows all runs.

    icekit batch photos --workers 2 --out runs/photos
    """
    config, assignments, given = layers_of(options)
    values = read_settings_file(config) if config is not None else {}
    for assignment in assignments:
        values = merge(values, parse_assignment(assignment))
    of_executor = executor_values(values.pop("executor", {}), workers)
    validate(Settings, values)  # what an option replaces must be right as well
    settings = validate(Settings, merge(values, given))

    invocation = context.find_root().obj
    command = typed_again(sys.argv[1:])
    if isinstance(invocation, Invocation):
        invocation.resume = command
    from icekit.batch import extract_batch
    from icekit.cli.progress import BatchProgress

    found = plugins.installed()
    with aside(), BatchProgress([broken.warning for broken in found.broken]) as progress:
        made = extract_batch(
            pictures,
            out,
            settings,
            executor=executor or "local",
            executor_settings=of_executor,
            overwrite=overwrite,
            command=command,
            traceback=isinstance(invocation, Invocation) and invocation.traceback,
            on_progress=progress.show,
        )
    if as_json:
        print_json(made.record.model_dump() | {"failures": [one.model_dump() for one in made.failures]})
        return int(bool(made.failures))
    summary = made.record.summary
    assert summary is not None, "it is finished"
    before = f" ({summary.before} of them before)" if summary.before else ""
    failed = f", {summary.failed} failed: {out / 'failures.jsonl'}" if summary.failed else ""
    click.echo(f"{summary.pictures} pictures: {summary.done} done{before}{failed}")
    click.echo(f"{out} (page: {out / 'index.html'})")
    return int(bool(made.failures))
