"""``icekit plugins``: what is installed, and the settings of each."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from icekit import plugins
from icekit.cli.checks import check_plugin, registered
from icekit.cli.common import CommandGroup, print_table, table_of
from icekit.cli.completion import complete_setting, names, one_of
from icekit.foreign import aside
from icekit.paths import user_path
from icekit.protocols import Attribute, InputError
from icekit.scaffold import KINDS, check_name, write_plugin
from icekit.settings import Preset, load_settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

WIDTH, LONGEST = 100, 30
"""Most columns of the list, and of a name and a distribution in it."""
MARGINS = 6
"""Columns between those of a table."""


@click.group("plugins", cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def plugins_group(context: click.Context) -> None:
    """What is installed: components, attributes, presets, commands and observers, and plugins that are broken."""
    if context.invoked_subcommand is None:
        context.invoke(list_plugins, as_json=False)


@plugins_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def list_plugins(context: click.Context, as_json: bool) -> None:
    """List components, attributes and presets by name, commands and observers, and plugins that are broken."""
    found = plugins.installed()
    rows = [
        (one.role, one.name, one.summary, one.origin) for role in plugins.KINDS for one in found.offered(role).values()
    ]
    root = context.find_root().command
    if isinstance(root, CommandGroup):
        rows += [
            ("command", name, command.get_short_help_str(limit=100), origin)
            for name, (command, origin) in root.of_plugins.items()
        ]
    rows += [("observer", origin.plugin, summary, origin) for origin, summary in found.observers()]
    if as_json:
        listed = [
            {"kind": kind, "name": name, "summary": summary, **vars(origin)} for kind, name, summary, origin in rows
        ]
        broken = [{**vars(one.origin), "reason": one.reason} for one in found.broken]
        click.echo(json.dumps({"plugins": listed, "broken": broken}, indent=1))
        return
    _print_rows([(kind, name, summary, _source(origin)) for kind, name, summary, origin in rows])
    for trouble in found.broken:
        click.echo(str(trouble))
    if found.broken:
        click.echo("--no-plugin NAME leaves one out; `icekit plugins list --traceback` shows where each one broke")


def _source(origin: plugins.Origin) -> str:
    """Where a plugin is from, short: a file without its folder."""
    return f"{origin.distribution} {origin.version}" if origin.version else Path(origin.distribution).name


def _print_rows(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """A table of at most ``WIDTH`` columns. What is too long is wrapped on a terminal, and cut elsewhere."""
    from rich.cells import cell_len

    table = table_of("kind", "name", "what it is", "from")
    for row in rows:
        table.add_row(*row)
    if not sys.stdout.isatty():
        kind, name, summary, source = table.columns
        left = WIDTH - MARGINS
        for number, column in ((0, kind), (1, name), (3, source)):
            column.width = min(LONGEST, max(len(str(column.header)), *(cell_len(row[number]) for row in rows)))
            left -= column.width
        summary.width, summary.no_wrap, summary.overflow = max(left, len("what it is")), True, "ellipsis"
    print_table(table, WIDTH)


@plugins_group.command("show")
@click.argument("name", shell_complete=names(*plugins.KINDS))
@click.option(
    "--backbone",
    metavar="NAME",
    shell_complete=names("backbone"),
    help="Of an attribute: which of its words this model knows. It is loaded for it.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE",
              shell_complete=complete_setting, help="One setting of that run, as in backbone.model=FOLDER")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show_plugin(name: str, backbone: str | None, assignments: Sequence[str], as_json: bool) -> None:
    """Show what NAME is, and its settings: a component's with defaults and meaning, a preset's as they are."""
    found = plugins.installed()
    matching = registered(found, name)
    known: list[str] | None = None
    if backbone is not None:
        matching = [one for one in matching if isinstance(one.given, Attribute)]
        if not matching:
            raise InputError(f"{name!r} is no attribute: --backbone says which of an attribute's words a model knows")
        known = _known_words(found, matching[0].given, backbone, assignments)
    elif assignments:
        raise InputError("--set is for the model that --backbone names")
    if as_json:
        rows = [_described(found, one) for one in matching]
        click.echo(json.dumps([one | ({} if known is None else {"known": known}) for one in rows], indent=1))
        return
    for one in matching:
        click.echo(f"{one.role} {one.name}: {one.summary}\n{one.origin}")
        if isinstance(one.given, Preset):
            click.echo(f"\n{one.given.text.rstrip()}")
        elif one.settings is None:
            click.echo(f"vocabulary: {', '.join(one.given.vocabulary)}")
            if known is not None:
                click.echo(_say_known(str(backbone), one.given, known))
        else:
            for row in _described(found, one)["settings"]:
                click.echo(f"\n  {row['key']} = {json.dumps(row['default'], ensure_ascii=False)}  ({row['type']})")
                click.echo(f"      {row['meaning']}")


def _known_words(found: plugins.Plugins, attribute: Attribute, backbone: str, assignments: Sequence[str]) -> list[str]:
    """The words of an attribute that a model knows, loaded on the CPU."""
    from icekit.run.models import load_backbone, resolve_device
    from icekit.run.naming import known_words

    settings = load_settings(None, assignments, {"components": {"backbone": backbone}})
    with aside():
        loaded = load_backbone(found, found.resolve(settings), resolve_device("cpu"))
        with found.naming("load", [("backbone", backbone)], by=("backbone", backbone)):
            return known_words(loaded, attribute)


def _say_known(backbone: str, attribute: Attribute, known: Sequence[str]) -> str:
    unknown = [word for word in attribute.vocabulary if word not in known]
    if not known:
        return f"backbone {backbone} knows none of its words: a token of it could not be named"
    if not unknown:
        return f"backbone {backbone} knows all of them"
    return (
        f"backbone {backbone} knows {len(known)} of {len(attribute.vocabulary)}: {', '.join(known)}; "
        f"it does not know {', '.join(unknown)}"
    )


plugins_group.add_command(check_plugin)


@plugins_group.command("new")
@click.argument("name")
@click.option(
    "--kind",
    required=True,
    metavar="KIND",
    shell_complete=one_of(*KINDS),
    help=f"What it is to be: {', '.join(KINDS)}.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Empty or new folder [default: icekit-NAME]"
)
@click.pass_context
def new_plugin(context: click.Context, name: str, kind: str, out: Path | None) -> None:
    """Write a new plugin: a distribution icekit-NAME that works as it stands, with tests, to be installed and changed.

    icekit plugins new gloss --kind attribute
    """
    check_name(name, kind, plugins.installed())
    root = context.find_root().command
    if kind == "command" and isinstance(root, click.Group) and name in root.commands:
        raise InputError(f"there is a command {name!r} already: choose another name")
    folder = Path(f"icekit-{name}") if out is None else user_path(out, "--out")
    for file in write_plugin(name, kind, folder):
        click.echo(folder / file.relative_to(folder.absolute()))
    click.echo(
        f'next: cd {shlex.quote(str(folder))} && pip install --editable ".[dev]" && python -m pytest; '
        "README.md says the rest",
        err=True,
    )


def _described(found: plugins.Plugins, one: plugins.Registered) -> dict[str, Any]:
    with found.naming("settings", [], by=(one.role, one.name)):
        return _describe(one)


def _describe(one: plugins.Registered) -> dict[str, Any]:
    description: dict[str, Any] = {"kind": one.role, "name": one.name, "summary": one.summary, **vars(one.origin)}
    if isinstance(one.given, Preset):
        return description | {"settings": one.given.values}
    if one.settings is None:
        return description | {"anchor": one.given.anchor, "vocabulary": list(one.given.vocabulary)}
    properties = one.settings.model_json_schema()["properties"] if one.settings.model_fields else {}
    table = f"{one.role}.{one.name}" if one.role == "exporter" else one.role  # a run may have several exporters
    rows = [
        {
            "key": f"{table}.{key}",
            "type": _type_name(field),
            "default": None if field.is_required() else properties[key].get("default"),
            "meaning": field.description or "",
        }
        for key, field in one.settings.model_fields.items()
    ]
    return description | {"settings": rows}


def _type_name(field: FieldInfo) -> str:
    kind: Any = field.annotation
    name = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    return name.replace("typing.", "").replace("pathlib.", "")
