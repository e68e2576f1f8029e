"""``icekit batch``: the concepts of many pictures, a run directory each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    typed_again,
)
from icekit.cli.completion import DEVICES, complete_setting, names
from icekit.cli.parameters import COUNT, SEED, UserPath
from icekit.cli.run import component_option
from icekit.foreign import aside
from icekit.settings import Settings, merge, parse_assignment, read_settings_file, validate


@click.command("batch")
@click.argument("pictures", type=UserPath(), nargs=-1, required=True, metavar="IMAGE|FOLDER|LIST.txt|GLOB...")
@click.option("--out", type=UserPath(), required=True, metavar="DIR", help="Batch directory")
@executor_options
@preset_option
@component_option("backbone", "Text-to-image model", "sd21")
@click.option("--model", type=str, metavar="ID|FOLDER|FILE", help="Model of the hub, folder in "
              "diffusers' format or .safetensors file; says by itself which backbone it needs")  # fmt: skip
@component_option("retriever", "What finds words for the images", "clip")
@component_option("segmentor", "What finds a word's place in an image", "xattn")
@component_option("learner", "What learns the tokens", "ice")
@click.option("--attribute", "attributes", multiple=True, metavar="NAME", shell_complete=names("attribute"),
              help="Learn this attribute; give it once for "
              "each [default: colour and material]")  # fmt: skip
@click.option("--max-concepts", type=COUNT, metavar="N", help="Stop looking after this many concepts [default: 10]")
@click.option("--seed", type=SEED, metavar="N", help="Every random choice follows from it [default: 0]")
@click.option(
    "--device", metavar="auto|cpu|cuda|mps", shell_complete=DEVICES, help="Where the models run [default: auto]"
)
@low_memory_option
@click.option("--config", type=UserPath(), metavar="FILE.toml", help="Settings file, of all runs; the settings.toml "
              "of a run directory is one")  # fmt: skip
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE",
              shell_complete=complete_setting, help="One setting, as in learner.steps=400 or executor.threads=2; "
              "`icekit plugins show NAME` lists a component's")  # fmt: skip
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
    preset: str | None,
    model: str | None,
    attributes: Sequence[str],
    max_concepts: int | None,
    seed: int | None,
    device: str | None,
    low_memory: bool,
    config: Path | None,
    assignments: Sequence[str],
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **components: str | None,
) -> int:
    """Extract the concepts of many pictures, a run directory each, with the models loaded once a worker.

    Pictures are files, folders (with all below them), lists (.txt, a path a line) and quoted patterns. A picture that
    fails stops no other: DIR/failures.jsonl says why, and the exit status is 1. The same command goes on where a batch
    was interrupted, and does pictures that were added or have failed. DIR/index.html shows all runs.

    icekit batch photos --workers 2 --out runs/photos
    """
    chosen = {role: name for role, name in components.items() if name is not None}
    options: dict[str, Any] = {"preset": preset, "attributes": attributes, "max_concepts": max_concepts, "seed": seed}
    options |= {"device": device, "components": chosen}
    options["backbone"] = ({"model": model} if model is not None else {}) | (LOW_MEMORY if low_memory else {})
    given = {key: value for key, value in options.items() if value not in (None, (), {})}
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
