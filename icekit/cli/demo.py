"""``icekit demo``: the whole method on a small model that is installed, and the page that it makes."""

from __future__ import annotations

import os
import shlex
import sys
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from icekit import plugins
from icekit.cli.common import Invocation, print_concepts
from icekit.cli.completion import names
from icekit.cli.parameters import UserPath
from icekit.foreign import aside
from icekit.hookspecs import hookimpl
from icekit.paths import package_path
from icekit.protocols import InputError
from icekit.settings import Settings, nearest

if TYPE_CHECKING:
    from icekit.protocols import Demo, Step

OUT = Path("runs") / "demo"
SEEN = 5
"""Learning steps after which it is said how long the rest will take here."""


@click.command("demo")
@click.option("--out", type=UserPath(), default=OUT, show_default=True, metavar="DIR", help="Run directory")
@click.option(
    "--backbone",
    metavar="NAME",
    shell_complete=names("backbone"),
    help="Which model, where several that are installed bring a demo.",
)
@click.option("--open/--no-open", "opens", default=None, help="Show the page in a browser, or leave it [default: where "
              "there is a browser and this is a terminal]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Make the demo in DIR anew.")
@click.pass_context
def demo(context: click.Context, out: Path, backbone: str | None, opens: bool | None, overwrite: bool) -> None:
    """Run the whole method on a picture that is shipped, with a small model that needs no GPU and no download.

    `pip install "icekit[demo]"` brings the model. It says first how long it takes, and last where the page is. A demo
    that was interrupted goes on; one that is there already is shown.
    """
    found = plugins.installed()
    name, shown = _chosen(found, backbone)
    again = shlex.join(["icekit", "demo", "--out", str(out), *([] if backbone is None else ["--backbone", name])])
    if isinstance(context.find_root().obj, Invocation):
        context.find_root().obj.resume = again
    picture = Path(package_path(shown.picture, "demo"))
    click.echo(
        f"the whole method with backbone {name} on {picture.name}: {_about(sum(shown.seconds.values()))} "
        f"(measured on {shown.machine})",
        err=True,
    )

    from icekit.run.orchestrator import extract
    from icekit.run.progress import Progress

    with aside():
        made = extract(
            picture,
            out,
            Settings(components={"backbone": name}),
            resume=not overwrite,
            overwrite=overwrite,
            observers=[Progress(found.broken), _Pace(shown)],
            installed=found,
        )
    print_concepts(made)
    page = made.run_dir / "report.html"
    if page.is_file():
        _show(page, opens)
    first = made.concepts[0]
    attribute = next((part for part in first.tokens if part not in ("category", "instance")), "category")
    prompt = f"a photo of a cup {{a.{attribute}}}"
    click.echo(f"next: {shlex.join(['icekit', 'compose', prompt, f'a={made.run_dir}'])}", err=True)


def _chosen(found: plugins.Plugins, backbone: str | None) -> tuple[str, Demo]:
    """The backbone that is shown, and what it brings for it.

    Raises:
        InputError: none that is installed brings anything.
    """
    offers = {name: getattr(one.settings, "demo", None) for name, one in found.offered("backbone").items()}
    demos: dict[str, Demo] = {name: one for name, one in offers.items() if one is not None}
    if not demos:
        raise InputError(
            'no model that is small enough for a demo is installed: `pip install "icekit[demo]"` brings one; '
            "`icekit run IMAGE --model FOLDER` takes a model of yours"
        )
    if backbone is not None and backbone not in demos:
        if backbone in offers:
            raise InputError(f"backbone {backbone!r} brings no demo: choose from {', '.join(demos)}")
        raise InputError(f"no backbone {backbone!r}: {nearest(backbone, demos)}")
    name = backbone or next(iter(demos))
    return name, demos[name]


class _Pace:
    """An observer that says after some learning steps how long the rest will take on this machine."""

    def __init__(self, shown: Demo) -> None:
        self._shown = shown
        self._begun: tuple[int, float] | None = None
        self._said = False

    @hookimpl
    def step_done(self, step: Step) -> None:
        """Look at the clock."""
        if self._begun is None:
            self._begun = step.step, time.monotonic()
        elif not self._said and step.step - self._begun[0] >= SEEN:
            self._said = True
            pace = (time.monotonic() - self._begun[1]) / (step.step - self._begun[0])
            slower = pace * step.total / self._shown.seconds["learn"]
            left = pace * (step.total - step.step) + slower * self._shown.seconds["generate"]
            click.echo(f"at this machine's pace {_about(left)} to go", err=True)


def _about(seconds: float) -> str:
    """A time as people say it: whole minutes and halves, tens of seconds below one."""
    if seconds < 55:
        return f"about {max(10, round(seconds / 10) * 10)} seconds"
    halves = round(seconds / 30)
    return "about a minute" if halves <= 2 else f"about {halves // 2}{'½' * (halves % 2)} minutes"


def _show(page: Path, opens: bool | None) -> None:
    """Say where the page is, and open it in a browser if that is wanted, or if nobody said and there is one."""
    click.echo(f"page: {page}")
    if opens is False or (opens is None and not (sys.stdout.isatty() and _has_browser())):
        return
    with aside():
        opened = webbrowser.open(page.absolute().as_uri())
    if opens and not opened:
        click.echo(f"no browser was found to open it: {page.absolute().as_uri()}", err=True)


def _has_browser() -> bool:
    """Whether there is a browser with a window: one that works in the terminal would take its place."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True
