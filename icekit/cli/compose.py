"""``icekit compose``: images from a prompt that mixes concepts of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from icekit.cli.common import low_memory_option, print_json
from icekit.cli.completion import DEVICES
from icekit.cli.parameters import COUNT, SEED, UserPath
from icekit.foreign import aside
from icekit.protocols import InputError


@click.command("compose")
@click.argument("prompt")
@click.argument("concepts", nargs=-1, required=True, metavar="NAME=RUN_DIR[:CONCEPT]...")
@click.option("--n", type=COUNT, default=4, show_default=True, metavar="N", help="Number of images.")
@click.option(
    "--seed", type=SEED, default=0, show_default=True, metavar="N", help="Every random choice follows from it."
)
@click.option("--out", type=UserPath(), metavar="DIR", help="[default: a new folder in compositions/]")
@click.option(
    "--device", metavar="auto|cpu|cuda|mps", shell_complete=DEVICES, help="Where the model runs [default: as the run's]"
)
@low_memory_option
@click.option("--overwrite", is_flag=True, help="Replace the composition in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def compose(
    prompt: str,
    concepts: Sequence[str],
    n: int,
    seed: int,
    out: Path | None,
    device: str | None,
    low_memory: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Generate images from PROMPT, mixing concepts of earlier runs.

    Each NAME=RUN_DIR[:CONCEPT] binds a concept (by index or label; the first one if left out) to a name of the prompt:
    {a} is the object, {a.colour} its colour, {a.category} the kind of thing it is, {a.instance} what makes it this one.
    Runs of one model can be mixed, and of models of one family whose text encoders are the same; the first one's draws.

    icekit compose "a cup, {b.material} {b.colour}" b=runs/photo:bowl
    """
    bindings = {}
    for concept in concepts:
        name, equals, reference = concept.partition("=")
        if not equals or not reference:
            raise InputError(f"{concept!r}: expected NAME=RUN_DIR[:CONCEPT], as in a=runs/photo:cup")
        if name in bindings:
            raise InputError(f"{concept!r}: the name {name!r} is given twice")
        bindings[name] = reference

    from icekit.cli.progress import ImageProgress
    from icekit.run.compose import compose as compose_images

    with aside(), ImageProgress() as progress:
        made = compose_images(
            prompt,
            bindings,
            n=n,
            seed=seed,
            out=out,
            device=device,
            low_memory=low_memory,
            overwrite=overwrite,
            on_image=progress.show,
        )
    if as_json:
        print_json(json.loads((made.out / "prompt.json").read_text(encoding="utf-8")))
    else:
        for path in made.images:
            click.echo(path)
