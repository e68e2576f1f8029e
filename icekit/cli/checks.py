"""``icekit plugins check``: the conformance checks on what is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from icekit import plugins
from icekit.cli.common import print_json, print_table, table_of
from icekit.cli.completion import names, one_of
from icekit.protocols import InputError
from icekit.scaffold import a
from icekit.settings import merge, nearest, parse_assignment

if TYPE_CHECKING:
    from icekit.testing import CheckResult

SAID = {
    "passed": ("holds", "hold"),
    "failed": ("does not hold", "do not hold"),
    "skipped": ("does not apply", "do not apply"),
}
"""What came of a check, and of several."""


def registered(found: plugins.Plugins, name: str) -> list[plugins.Registered]:
    """All that is called so, of any kind.

    Raises:
        InputError: nothing is.
    """
    everything = [one for kind in plugins.KINDS for one in found.offered(kind).values()]
    matching = [one for one in everything if name in (one.name, *getattr(one.given, "aliases", ()))]
    if not matching:
        close = nearest(name, {one.name for one in everything})
        raise InputError(f"nothing is called {name!r}: {close}{found.suspects(name)}")
    return matching


@click.command("check")
@click.argument("name", shell_complete=names(*plugins.KINDS))
@click.option(
    "--kind",
    metavar="KIND",
    shell_complete=one_of(*plugins.KINDS),
    help=f"Where several are called NAME, which one: {', '.join(plugins.KINDS)}.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting of the component, as in model=FOLDER, or backbone.model=FOLDER where several are called NAME.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def check_plugin(name: str, kind: str | None, assignments: Sequence[str], as_json: bool) -> int:
    """Check what is installed as NAME against all that icekit asks of its kind, and print what holds and what does not.

    A component is checked on a small model of random weights and on drawn pictures, in seconds and without a GPU; these
    are the checks that a plugin's own tests import from icekit.testing. Exit status 1: something does not hold.
    """
    found = plugins.installed()
    matching = registered(found, name)
    kinds = [one.role for one in matching]
    if kind is not None and kind not in plugins.KINDS:
        raise InputError(f"there are no checks of {kind!r}: choose from {', '.join(plugins.KINDS)}")
    if kind is not None:
        matching = [one for one in matching if one.role == kind]
        if not matching:
            raise InputError(f"no {kind} is called {name!r}, but {' and '.join(map(a, kinds))}: --kind {kinds[0]}")
    values = merge(*(parse_assignment(one) for one in assignments))
    tables = {key: value for key, value in values.items() if key in plugins.KINDS and isinstance(value, Mapping)}
    bare = {key: value for key, value in values.items() if key not in tables}
    if strange := sorted(tables.keys() - {one.role for one in matching}):
        raise InputError(f"--set {strange[0]}....: {name!r} is {' and '.join(map(a, kinds))}")
    if bare and len(matching) > 1:
        raise InputError(
            f"{name!r} is {' and '.join(map(a, kinds))}: say whose setting it is, as in --set {kinds[0]}.KEY=VALUE"
        )

    from icekit.testing.installed import check_installed

    made = [(one, list(check_installed(found, one, merge(bare, tables.get(one.role, {}))))) for one in matching]
    if as_json:
        print_json([_described(one, results) for one, results in made])
    else:
        for one, results in made:
            _print(one, results)
    return int(any(result.outcome == "failed" for _, results in made for result in results))


def _described(one: plugins.Registered, results: Sequence[CheckResult]) -> dict[str, Any]:
    return {"kind": one.role, "name": one.name, **vars(one.origin), "checks": [vars(result) for result in results]}


def _print(one: plugins.Registered, results: Sequence[CheckResult]) -> None:
    click.echo(f"{one.role} {one.name} of {one.origin}")
    table = table_of("", "what must hold", "what was found")
    for result in results:
        table.add_row(SAID[result.outcome][0], result.holds.replace("``", ""), " ".join(result.found.split()))
    print_table(table)
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in SAID}
    click.echo(", ".join(f"{count} {SAID[outcome][count > 1]}" for outcome, count in counts.items() if count))
