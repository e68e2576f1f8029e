"""``icekit report``: the report of a run, written anew."""

from __future__ import annotations

from pathlib import Path

import click

from icekit.cli.parameters import UserPath
from icekit.foreign import aside


@click.command("report")
@click.argument("run_dir", type=UserPath())
@click.option("--out", type=UserPath(), metavar="DIR", help="Folder to write into [default: RUN_DIR]")
def report(run_dir: Path, out: Path | None) -> None:
    """Write the report of RUN_DIR anew, and print its path: short for `icekit export RUN_DIR --format report`."""
    from icekit.run.exporting import export

    with aside():
        [path] = export(run_dir, "report", out)
    click.echo(path)
