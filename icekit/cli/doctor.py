"""``icekit doctor``: what is installed, what it can run, and what is wrong; to be pasted into a report of a fault."""

from __future__ import annotations

from typing import Any

import click

from icekit import plugins
from icekit.cli.common import print_json


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, free memory, models on this machine and plugins: what a report of a fault needs.

    Exit status 1 when something is broken.
    """
    from icekit.doctor import examine

    facts = examine(plugins.installed())
    if as_json:
        print_json(facts)
    else:
        for line in _lines(facts):
            click.echo(line)
    problems = [one["problem"] for one in facts["devices"] if "problem" in one]
    if problems or facts["plugins"]["broken"]:
        click.get_current_context().exit(1)


def _lines(facts: dict[str, Any]) -> list[str]:
    versions = facts["versions"]
    lines = [f"icekit {versions['icekit']}, Python {versions['python']}, {versions['platform']}"]
    libraries = [f"{name} {of}" for name, of in versions.items() if name not in ("icekit", "python", "platform")]
    lines += _paragraph("libraries", libraries)
    lines += _paragraph("environment", [f"{name}={value}" for name, value in facts["environment"].items()])
    machine = facts["machine"]
    memory = f"{_gb(machine['free_memory'])} of {_gb(machine['memory'])} memory free"
    disk = [f"{_gb(one['free'])} free in {one['path']}" for one in facts["disk"].values()]
    lines += _paragraph("machine", [f"{machine['cores']} cores", memory, *disk])
    lines += ["devices (--device auto takes the first)", *(f"  {_device(one)}" for one in facts["devices"])]
    lines += ["models of the hub on this machine"]
    lines += [f"  {_model(one)}" for one in facts["cache"]] or ["  none"]
    lines += ["plugins"]
    lines += [f"  {one['plugin']} ({one['distribution']} {one['version']})" for one in facts["plugins"]["loaded"]]
    lines += [
        f"  {one['plugin']} ({one['distribution']} {one['version']}) is BROKEN: {one['reason']}"
        for one in facts["plugins"]["broken"]
    ]
    return lines


def _paragraph(heading: str, items: list[str], width: int = 96) -> list[str]:
    """A heading, and its items in lines of bounded width."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= width:
            lines[-1] += f", {item}"
        else:
            lines.append(f"  {item}")
    return [heading, *lines] if lines else []


def _device(one: dict[str, Any]) -> str:
    if "problem" in one:
        return f"torch cannot be used: {one['problem']}"
    memory = f", {_gb(one['free_memory'])} of {_gb(one['memory'])} free" if "memory" in one else ""
    threads = f", {one['threads']} threads" if "threads" in one else ""
    return f"{one['device']}: {one['name']}{memory}{threads}"


def _model(one: dict[str, Any]) -> str:
    text = f"{one['id']}: {_gb(one['size'])}"
    if "pipeline" not in one:
        return text
    runs = f"backbone {one['backbone']}" if one["backbone"] else "no backbone for it is installed"
    counts = ", ".join(f"{part} {count / 1e6:,.0f}" for part, count in one["parameters"].items())
    text = f"{text}, {one['pipeline']} ({runs}); million weights: {counts or 'none in safetensors'}"
    if "needs" in one:
        text += f"; a run needs about {_gb(one['needs'])}"
    if "needs_low_memory" in one and one["needs_low_memory"] < one["needs"]:
        text += f", with --low-memory {_gb(one['needs_low_memory'])}"
    return text


def _gb(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
