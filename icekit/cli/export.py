"""``icekit export``: a run's files in another form, by an exporter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from icekit.cli.completion import names
from icekit.cli.parameters import UserPath
from icekit.foreign import aside


@click.command("export")
@click.argument("run_dir", type=UserPath())
@click.option("--format", "exporter", required=True, metavar="NAME", shell_complete=names("exporter"), help="What to "
              "write: an exporter, see `icekit plugins`.")  # fmt: skip
@click.option("--out", type=UserPath(), metavar="DIR", help="Folder to write into [default: RUN_DIR]")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting of the exporter; `icekit "
              "plugins show NAME` lists them")  # fmt: skip
def export(run_dir: Path, exporter: str, out: Path | None, assignments: Sequence[str]) -> None:
    """Write the run in RUN_DIR in another form, and print the files.

    What was written of this run before in the same form and folder is replaced, and no other file.

    icekit export runs/photo --format report --out pages
    """
    from icekit.run.exporting import export as export_run
    from icekit.settings import merge, parse_assignment

    values: dict[str, Any] = merge(*map(parse_assignment, assignments))
    with aside():
        written = export_run(run_dir, exporter, out, values)
    for path in written:
        click.echo(path)
