"""``icekit compose``: images from a prompt that mixes concepts of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from icekit.cli.common import low_memory_option, print_json
from icekit.cli.completion import DEVICES
from icekit.cli.parameters import COUNT, SEED, UserPath
from icekit.foreign import aside
from icekit.protocols import InputError


@click.command("compose")
@click.argument("prompt", required=False)
@click.argument("concepts", nargs=-1, metavar="NAME=RUN_DIR[:CONCEPT]...")
@click.option("--n", type=COUNT, metavar="N", help="Number of images [default: 4; 1 of each combination of a sweep]")
@click.option("--seed", type=SEED, metavar="N", help="Every random choice follows from it [default: 0]")
@click.option("--sweep", is_flag=True, help="Make a grid of PROMPT's alternatives, as in '{a|b} in [red|{c.colour}]': "
              "the first are its rows, the second its columns.")  # fmt: skip
@click.option("--remake", type=UserPath(), metavar="DIR", help="Make the composition in DIR again, by its prompt.json; "
              "without PROMPT, and with NAME=RUN_DIR for runs that were moved.")  # fmt: skip
@click.option("--out", type=UserPath(), metavar="DIR", help="[default: a new folder in compositions/]")
@click.option(
    "--device", metavar="auto|cpu|cuda|mps", shell_complete=DEVICES, help="Where the model runs [default: as the run's]"
)
@low_memory_option
@click.option("--overwrite", is_flag=True, help="Replace the composition in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def compose(
    prompt: str | None,
    concepts: Sequence[str],
    n: int | None,
    seed: int | None,
    sweep: bool,
    remake: Path | None,
    out: Path | None,
    device: str | None,
    low_memory: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Generate images from PROMPT, mixing concepts of earlier runs.

    Each NAME=RUN_DIR[:CONCEPT] binds a concept (by index or label; the first one if left out) to a name of the prompt:
    {a} is the object, {a.colour} its colour, {a.category} the kind of thing it is, {a.instance} what makes it this one.
    {a - colour} is the object without its colour, so that words can say another, and {a.colour:1.3} more of it: 0 is
    the plain word "colour", 1 what was learned. Several images come on a sheet, sheet.png, too.
    Runs of one model can be mixed, and of models of one family whose text encoders are the same; the first one's draws.

    icekit compose "a cup, {b.material} {b.colour}" b=runs/photo:bowl

    icekit compose "{a - colour} in black" a=runs/photo

    icekit compose --sweep "a [cup|vase], {a.colour|b.colour}" a=runs/photo b=runs/other

    icekit compose --remake compositions/a-cup --out again
    """
    if remake is not None:
        concepts = [*([prompt] if prompt is not None else []), *concepts]
        if sweep or n is not None or seed is not None:
            raise click.UsageError(
                "--remake takes prompt, number and seed from DIR: leave --n, --seed and --sweep out."
            )
    elif prompt is None:
        raise click.UsageError("Missing argument 'PROMPT'.")
    elif not concepts:
        raise click.UsageError("Missing argument 'NAME=RUN_DIR[:CONCEPT]...'.")
    bindings = {}
    for concept in concepts:
        name, equals, reference = concept.partition("=")
        if not equals or not reference:
            raise InputError(f"{concept!r}: expected NAME=RUN_DIR[:CONCEPT], as in a=runs/photo:cup")
        if name in bindings:
            raise InputError(f"{concept!r}: the name {name!r} is given twice")
        bindings[name] = reference

    from icekit.run import compose as composing
    from icekit.run.progress import ImageProgress

    with aside(), ImageProgress() as progress:
        options: dict[str, Any] = {
            "out": out,
            "device": device,
            "low_memory": low_memory,
            "overwrite": overwrite,
            "on_image": progress.show,
        }
        if remake is not None:
            made = composing.remake(remake, bindings, **options)
        else:
            assert prompt is not None, "refused above"
            made = composing.compose(prompt, bindings, n=n, seed=seed or 0, sweep=sweep, **options)
    if as_json:
        print_json(json.loads((made.out / "prompt.json").read_text(encoding="utf-8")))
    else:
        for path in [*made.images, *([made.sheet] if made.sheet else [])]:
            click.echo(path)
