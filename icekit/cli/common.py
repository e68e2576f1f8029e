"""What the commands share: what ``main`` wants to know of them, options and tables."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from icekit import plugins
from icekit.cli.completion import names
from icekit.foreign import is_of_the_machine, said
from icekit.protocols import InputError, RunError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Invocation:
    """What ``main`` wants to know of the command line, wherever in it it stands."""

    traceback: bool = False
    resume: str = ""
    """The command that goes on with the run, once there is one."""
    choice: plugins.Choice = field(default_factory=plugins.Choice)
    """The plugins that are loaded."""


def with_resume(arguments: Sequence[str]) -> str:
    """The command that was typed, as it goes on."""
    again = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    return shlex.join(["icekit", *again, "--resume"])


def _note_traceback(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(context.find_root().obj, Invocation):
        context.find_root().obj.traceback = True


PLUGIN_FILE, NO_PLUGIN = "--plugin-file", "--no-plugin"


def common_options() -> list[click.Parameter]:
    """Which plugins there are, read before any command by ``choice_in``; and ``--traceback``."""
    return [
        click.Option(
            [PLUGIN_FILE],
            multiple=True,
            expose_value=False,
            metavar="FILE",
            shell_complete=lambda context, parameter, typed: [CompletionItem(typed, type="file")],
            help="Load this plugin, a .py file or a .toml file of attributes; give it once for each.",
        ),
        click.Option(
            [NO_PLUGIN],
            multiple=True,
            expose_value=False,
            metavar="NAME",
            help="Leave this plugin out; give it once for each.",
        ),
        click.Option(
            ["--traceback"],
            is_flag=True,
            expose_value=False,
            callback=_note_traceback,
            help="Show where an error came from.",
        ),
    ]


def choice_in(arguments: Sequence[str]) -> plugins.Choice:
    """Which plugins the command line and the environment choose: to be known before there is a command to ask.

    Raises:
        InputError: a path that no file can have.
    """
    given: dict[str, list[str]] = {PLUGIN_FILE: [], NO_PLUGIN: []}
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if word == "--":
            break
        if option in given and (value := value if equals else next(words, "")):
            given[option].append(value)
    return plugins.Choice.of(tuple(map(Path, given[PLUGIN_FILE])), tuple(given[NO_PLUGIN]))


class CommandGroup(click.Group):
    """A group whose commands, a plugin's too, all take ``common_options``."""

    origin: plugins.Origin | None = None
    """The plugin that adds commands."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._origins: dict[str, plugins.Origin] = {}

    def of(self, origin: plugins.Origin) -> CommandGroup:
        """This group, to which a plugin adds commands from now on."""
        self.origin = origin
        return self

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, and the options to it that it has not itself.

        Raises:
            PluginError: a plugin adds one that is there.
        """
        called = name or cmd.name or ""
        if self.origin is not None:
            if called in self.commands and self._origins.get(called) != self.origin:
                raise plugins.PluginError(f"there is a command {called!r} already")
            self._origins[called] = self.origin
        own = {name for parameter in cmd.params for name in parameter.opts}
        cmd.params += [option for option in common_options() if own.isdisjoint(option.opts)]
        super().add_command(cmd, name)

    @property
    def of_plugins(self) -> dict[str, tuple[click.Command, plugins.Origin]]:
        """The commands that plugins have added, by name."""
        return {name: (self.commands[name], origin) for name, origin in self._origins.items() if name in self.commands}

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what a plugin's raises is the plugin's. It may exit with a status of its own.

        Raises:
            ComponentError: a plugin's command failed.
        """
        try:
            return super().invoke(ctx)
        except (InputError, RunError, SystemExit, click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except BaseException as error:
            origin = self._origins.get(ctx.invoked_subcommand or "")
            if origin is None or isinstance(error, KeyboardInterrupt) or is_of_the_machine(error):
                raise
            raise plugins.ComponentError(
                f"command {ctx.invoked_subcommand!r} of {origin} failed: {said(error)}"
            ) from error


class PresetOption(click.Option):
    """``--preset``, whose help names the presets that are installed."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help."""
        names = ", ".join(plugins.installed().offered("preset"))
        self.help = f"Named settings: {names} (`icekit plugins show NAME` prints them)"
        return super().get_help_record(ctx)


preset_option = click.option("--preset", cls=PresetOption, metavar="NAME", shell_complete=names("preset"))


low_memory_option = click.option(
    "--low-memory",
    is_flag=True,
    help="Hold only the part of the model that is in use on the device, and compute twice what would have to be kept: "
    "slower, the same result.",
)
LOW_MEMORY: dict[str, Any] = {"low_memory": "on"}
"""What it sets of the backbone."""


def print_json(value: Any) -> None:
    """Print JSON on stdout, in characters that it can print."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(value, indent=1, ensure_ascii=not unicode))


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
