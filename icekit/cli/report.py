"""``icekit report``: the report of a run, written anew."""

from __future__ import annotations

from pathlib import Path

import click

from icekit.cli.parameters import UserPath


@click.command("report")
@click.argument("run_dir", type=UserPath())
def report(run_dir: Path) -> None:
    """Write the report of RUN_DIR anew, and print its path."""
    from icekit.report.page import write_report

    click.echo(write_report(run_dir))
