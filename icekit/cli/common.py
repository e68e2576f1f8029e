"""What the commands share: what ``main`` wants to know of them, options and tables."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from icekit import plugins
from icekit.cli.completion import names
from icekit.cli.parameters import COUNT
from icekit.foreign import is_of_the_machine, said
from icekit.protocols import InputError, RunError
from icekit.settings import shown

if TYPE_CHECKING:
    from rich.table import Table

    from icekit.run.extraction import Extraction


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


def typed_again(arguments: Sequence[str]) -> str:
    """The command that was typed, as it goes on by itself where it was interrupted."""
    return shlex.join(["icekit", *(argument for argument in arguments if argument not in ("--resume", "--overwrite"))])


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


def executor_options(command: Any) -> Any:
    """``--executor`` and ``--workers`` of a command that has workers."""
    workers = click.option(
        "--workers",
        type=COUNT,
        metavar="N",
        help="Workers, each with the models loaded; short for --set executor.workers=N [default: one for each GPU, or "
        "for each core and what memory holds]",
    )
    executor = click.option(
        "--executor",
        metavar="NAME",
        shell_complete=names("executor"),
        help="What does the work; `icekit plugins` lists them [default: local]",
    )
    return executor(workers(command))


def executor_values(table: Any, workers: int | None) -> dict[str, Any]:
    """Settings of an executor: a table of settings, and ``--workers`` over it.

    Raises:
        InputError: it is no table.
    """
    if not isinstance(table, Mapping):
        raise InputError(f"setting 'executor' cannot be {shown(table)}: it should be a table, as in executor.workers=2")
    return {**table, **({} if workers is None else {"workers": workers})}


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


def print_table(table: Table, at_most: int | None = None) -> None:
    """Print a table of texts on stdout. No word is broken over lines, so that tokens and names can be copied.

    On a terminal cells are wrapped between words; where a row's longest words have no room beside one another, each row
    becomes a list. A file or a pipe has no width: a row stays a line.

    at_most: columns of the terminal that are used.
    """
    from rich.console import Console

    if not sys.stdout.isatty():
        Console(file=sys.stdout, width=10_000, markup=False).print(table)
        return
    width = min(shutil.get_terminal_size().columns, at_most or 10_000)
    headings = [str(column.header) for column in table.columns]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    # Of this box: a space on both sides of what is within, three between columns.
    widths = _widths(headings, cells, width - 2 - 3 * (len(headings) - 1))
    if widths is None:
        for row in zip(*cells, strict=True):
            click.echo("\n".join(_as_list(headings, row, width)))
        return
    for column, one in zip(table.columns, widths, strict=True):
        column.width = one
    Console(file=sys.stdout, width=width, markup=False, highlight=False).print(table)


def _widths(headings: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """How wide each column is, so that no word is broken; None where there is no room for that."""
    from rich.cells import cell_len

    texts = [[heading, *column] for heading, column in zip(headings, cells, strict=True)]
    least = [max(1, *(cell_len(word) for text in column for word in text.split() or [""])) for column in texts]
    wanted = [max(1, *(cell_len(text) for text in column)) for column in texts]
    left = room - sum(least)
    if left < 0:
        return None
    widths = list(least)
    while left > 0 and (narrow := [i for i, one in enumerate(widths) if one < wanted[i]]):
        widths[max(narrow, key=lambda i: wanted[i] / widths[i])] += 1
        left -= 1
    return widths


def _as_list(headings: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """A row of a table as lines, a heading and its cell each; what has no heading comes first, before the second."""
    own = [(heading, cell) for heading, cell in zip(headings, row, strict=True) if cell]
    bare = " ".join(cell for heading, cell in own if not heading)
    lines: list[str] = []
    for number, (heading, cell) in enumerate((heading, cell) for heading, cell in own if heading):
        begin = f"{bare} ".lstrip() if number == 0 else f"   {heading}: "
        lines += textwrap.wrap(
            cell, width, initial_indent=begin, subsequent_indent="     ", break_long_words=False, break_on_hyphens=False
        )
    return lines


def print_concepts(extraction: Extraction) -> None:
    """A complete run on stdout: its concepts, and where it is."""
    from icekit.protocols.errors import printable

    record = extraction.record
    attributes = record.attributes
    table = table_of("", "concept", "score", "area", *attributes, "tokens")
    for concept in extraction.concepts:
        words = [printable(", ".join(concept.words.get(attribute, [])) or "–") for attribute in attributes]
        tokens = " ".join(concept.tokens.values())
        table.add_row(str(concept.index), concept.label, f"{concept.score:.2f}", f"{concept.area:.0%}", *words, tokens)
    print_table(table)
    if record.learning_steps is not None:
        click.echo(f"{record.learning_steps} learning steps; presets: {', '.join(record.presets or []) or 'none'}")
    report = extraction.run_dir / "report.html"
    click.echo(f"{extraction.run_dir} (report: {report})" if report.is_file() else extraction.run_dir)
