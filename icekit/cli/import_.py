"""``icekit import``: embeddings of other programs as a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from icekit import plugins
from icekit.cli.common import LOW_MEMORY, low_memory_option, preset_option, print_json
from icekit.cli.completion import DEVICES, complete_setting, names
from icekit.cli.parameters import UserPath
from icekit.foreign import aside
from icekit.settings import load_settings


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=UserPath(), metavar="FILE...")
@click.option("--out", required=True, type=UserPath(), metavar="DIR", help="Run directory to make")
@click.option("--word", "words", multiple=True, metavar="WORD", help="What the concept of a file is called; once for "
              "each file, in their order [default: the files' names]")  # fmt: skip
@preset_option
@click.option("--backbone", metavar="NAME", shell_complete=names("backbone"), help="Text-to-image model that they are "
              "for [default: sd21; `icekit plugins` lists them]")  # fmt: skip
@click.option("--model", metavar="ID|FOLDER|FILE", help="Model of the hub, folder in diffusers' format or "
              ".safetensors file; says by itself which backbone it needs")  # fmt: skip
@click.option(
    "--device", metavar="auto|cpu|cuda|mps", shell_complete=DEVICES, help="Where the model runs [default: auto]"
)
@low_memory_option
@click.option("--config", type=UserPath(), metavar="FILE.toml", help="Settings file; the settings.toml "
              "of a run directory is one, and names its model")  # fmt: skip
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", shell_complete=complete_setting,
              help="One setting, as in samples=4")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the run in DIR. Files that are not icekit's stay.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def import_files(
    files: Sequence[Path],
    out: Path,
    words: Sequence[str],
    preset: str | None,
    backbone: str | None,
    model: str | None,
    device: str | None,
    low_memory: bool,
    config: Path | None,
    assignments: Sequence[str],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a run of textual-inversion FILEs (.safetensors) of other programs, a concept each.

    Each is held against the model that it is to be used with, which draws a picture with it. `icekit compose` takes the
    run as any other; a file of several rows becomes as many tokens, and {a} stands for all of them.

    icekit import watercolour.safetensors --out runs/watercolour --model FOLDER
    """
    options: dict[str, Any] = {"preset": preset, "device": device}
    options["components"] = {"backbone": backbone} if backbone is not None else {}
    options["backbone"] = ({"model": model} if model is not None else {}) | (LOW_MEMORY if low_memory else {})
    settings = load_settings(config, assignments, {key: one for key, one in options.items() if one not in (None, {})})

    plugins.installed().check_within_reach(settings)  # before torch is imported
    from icekit.run.exporting import ExportError
    from icekit.run.importing import import_embeddings
    from icekit.run.progress import ImageProgress

    failed: ExportError | None = None
    with aside(), ImageProgress() as progress:
        try:
            made = import_embeddings(files, out, settings, words=words, overwrite=overwrite, on_image=progress.show)
        except ExportError as error:  # the run is complete
            made, failed = error.extraction, error
    if as_json:
        print_json(made.manifest)
    else:
        for concept in made.concepts:
            click.echo(f"{concept.index}: {concept.label}: {' '.join(concept.tokens.values())}")
        click.echo(made.run_dir)
    if failed is not None:
        raise failed
