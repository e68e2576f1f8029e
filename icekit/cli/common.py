"""What the commands share: what ``main`` wants to know of them, options and tables."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from icekit import plugins

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Invocation:
    """What ``main`` wants to know of the command line, wherever in it it stands."""

    traceback: bool = False
    resume: str = ""
    """The command that goes on with the run, once there is one."""


def _note_traceback(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(context.find_root().obj, Invocation):
        context.find_root().obj.traceback = True


def traceback_option() -> click.Option:
    """``--traceback``."""
    return click.Option(
        ["--traceback"],
        is_flag=True,
        expose_value=False,
        callback=_note_traceback,
        help="Show where an error came from.",
    )


class CommandGroup(click.Group):
    """A group whose commands, a plugin's too, all take ``--traceback``."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, and the option to it."""
        if not any("--traceback" in parameter.opts for parameter in cmd.params):
            cmd.params.append(traceback_option())
        super().add_command(cmd, name)


class PresetOption(click.Option):
    """``--preset``, whose help names the presets that are installed."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help."""
        names = ", ".join(plugins.installed().offered("preset"))
        self.help = f"Named settings: {names} (`icekit plugins show NAME` prints them)"
        return super().get_help_record(ctx)


preset_option = click.option("--preset", cls=PresetOption, metavar="NAME")


def table_of(*columns: str) -> Table:
    """An empty table with these headings."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table on stdout."""
    from rich.console import Console

    # A file or a pipe has no width: a row stays a line.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000, markup=False).print(table)
