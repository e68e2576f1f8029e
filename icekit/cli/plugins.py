"""``icekit plugins``: what is installed, and the settings of each."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from icekit import plugins
from icekit.cli.common import CommandGroup, print_table, table_of
from icekit.cli.completion import names, one_of
from icekit.paths import user_path
from icekit.protocols import InputError
from icekit.scaffold import KINDS, check_name, write_plugin
from icekit.settings import Preset, nearest

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


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
    table = table_of("kind", "name", "what it is", "from")
    for kind, name, summary, origin in rows:
        table.add_row(kind, name, summary, f"{origin.distribution} {origin.version}")
    print_table(table)
    for trouble in found.broken:
        click.echo(str(trouble))


@plugins_group.command("show")
@click.argument("name", shell_complete=names(*plugins.KINDS))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show_plugin(name: str, as_json: bool) -> None:
    """Show what NAME is, and its settings: a component's with defaults and meaning, a preset's as they are."""
    found = plugins.installed()
    everything = [one for role in plugins.KINDS for one in found.offered(role).values()]
    matching = [one for one in everything if name in (one.name, *getattr(one.given, "aliases", ()))]
    if not matching:
        suspects = "".join(f"; {broken}" for broken in found.broken)
        raise InputError(f"nothing is called {name!r}: {nearest(name, {one.name for one in everything})}{suspects}")
    if as_json:
        click.echo(json.dumps([_described(found, one) for one in matching], indent=1))
        return
    for one in matching:
        click.echo(f"{one.role} {one.name}: {one.summary}\n{one.origin}")
        if isinstance(one.given, Preset):
            click.echo(f"\n{one.given.text.rstrip()}")
        elif one.settings is None:
            click.echo(f"vocabulary: {', '.join(one.given.vocabulary)}")
        else:
            for row in _described(found, one)["settings"]:
                click.echo(f"\n  {row['key']} = {json.dumps(row['default'], ensure_ascii=False)}  ({row['type']})")
                click.echo(f"      {row['meaning']}")


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
    rows = [
        {
            "key": f"{one.role}.{key}",
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
