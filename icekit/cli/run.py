"""``icekit run``: an image's concepts into a run directory."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from icekit import plugins
from icekit.cli.common import Invocation, print_concepts, print_json, with_resume
from icekit.cli.parameters import UserPath
from icekit.cli.settings_options import layers_of, settings_options
from icekit.foreign import aside
from icekit.hookspecs import hookimpl
from icekit.settings import load_settings


@click.command("run")
@click.argument("image", type=UserPath())
@click.option("--out", type=UserPath(), metavar="DIR", help="Run directory [default: runs/<image stem>]")
@settings_options
@click.option("--resume", is_flag=True, help="Go on with the run in DIR where it was interrupted, with its settings.")
@click.option("--overwrite", is_flag=True, help="Replace the run in DIR. Files that are not icekit's stay.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.pass_context
def run(
    context: click.Context,
    image: Path,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Extract the concepts of IMAGE into a run directory.

    Settings come in layers, later ones win: defaults, the backbone's own preset, --preset, --config, --set, the
    options above.
    An interrupted run keeps what it has done; --resume goes on with it.
    """
    settings = load_settings(*layers_of(options))
    found = plugins.installed()

    from icekit.run.directory import RunDirectory
    from icekit.run.images import load_image
    from icekit.run.ownership import refuse_if_busy

    # All that can be wrong and be said at once, before torch is imported.
    source = load_image(image)
    folder = out or Path("runs") / source.stem
    refuse_if_busy(folder)
    RunDirectory(folder).check_usable(resume=resume, overwrite=overwrite)
    if not resume:  # whose settings are in its directory
        found.check_within_reach(settings)

    from icekit.run.exporting import ExportError
    from icekit.run.orchestrator import extract
    from icekit.run.progress import Progress

    observers: list[object] = [Progress(found.broken)]
    if isinstance(invocation := context.find_root().obj, Invocation):
        invocation.resume = with_resume(sys.argv[1:])  # as long as the run keeps no settings of its own
        chosen_plugins = invocation.choice.as_options()
        begun = shlex.join(["icekit", "run", str(image), "--out", str(folder), "--resume", *chosen_plugins])
        observers.append(_Begun(invocation, begun))
    failed: ExportError | None = None
    try:
        with aside():
            extraction = extract(
                source, folder, settings, resume=resume, overwrite=overwrite, observers=observers, installed=found
            )
    except ExportError as error:  # the run is complete
        extraction, failed = error.extraction, error
    if as_json:
        print_json(extraction.manifest)
    else:
        print_concepts(extraction)
    if failed is not None:
        raise failed


class _Begun:
    """An observer that notes how a run that has begun can go on."""

    def __init__(self, invocation: Invocation, resume: str) -> None:
        self._invocation = invocation
        self._resume = resume

    @hookimpl
    def run_started(self) -> None:
        """From here on the run's settings are kept with it."""
        self._invocation.resume = self._resume
