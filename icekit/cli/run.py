"""``icekit run``: an image's concepts into a run directory."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from icekit import plugins
from icekit.cli.common import (
    LOW_MEMORY,
    Invocation,
    low_memory_option,
    preset_option,
    print_concepts,
    print_json,
    with_resume,
)
from icekit.cli.completion import DEVICES, complete_setting, names
from icekit.cli.parameters import COUNT, SEED, UserPath
from icekit.foreign import aside
from icekit.hookspecs import hookimpl
from icekit.settings import load_settings


def component_option(role: str, what: str, default: str) -> Callable[[Any], Any]:
    help_ = f"{what} [default: {default}; `icekit plugins` lists them]"
    return click.option(f"--{role}", metavar="NAME", help=help_, shell_complete=names(role))


@click.command("run")
@click.argument("image", type=UserPath())
@click.option("--out", type=UserPath(), metavar="DIR", help="Run directory [default: runs/<image stem>]")
@preset_option
@component_option("backbone", "Text-to-image model", "sd21")
@click.option("--model", type=str, metavar="ID|FOLDER|FILE", help="Model of the hub, folder in "
              "diffusers' format or .safetensors file; says by itself which backbone it needs")  # fmt: skip
@component_option("retriever", "What finds words for the image", "clip")
@component_option("segmentor", "What finds a word's place in the image", "xattn")
@component_option("learner", "What learns the tokens", "ice")
@click.option("--attribute", "attributes", multiple=True, metavar="NAME", shell_complete=names("attribute"),
              help="Learn this attribute; give it once for "
              "each [default: colour and material]")  # fmt: skip
@click.option("--max-concepts", type=COUNT, metavar="N", help="Stop looking after this many concepts [default: 10]")
@click.option("--seed", type=SEED, metavar="N", help="Every random choice follows from it [default: 0]")
@click.option(
    "--device", metavar="auto|cpu|cuda|mps", shell_complete=DEVICES, help="Where the models run [default: auto]"
)
@low_memory_option
@click.option("--config", type=UserPath(), metavar="FILE.toml", help="Settings file; the settings.toml "
              "of a run directory is one")  # fmt: skip
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE",
              shell_complete=complete_setting, help="One setting, as in learner.steps=400; "
              "`icekit plugins show NAME` lists a component's")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the run in DIR where it was interrupted, with its settings.")
@click.option("--overwrite", is_flag=True, help="Replace the run in DIR. Files that are not icekit's stay.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.pass_context
def run(
    context: click.Context,
    image: Path,
    out: Path | None,
    preset: str | None,
    model: str | None,
    attributes: Sequence[str],
    max_concepts: int | None,
    seed: int | None,
    device: str | None,
    low_memory: bool,
    config: Path | None,
    assignments: Sequence[str],
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **components: str | None,
) -> None:
    """Extract the concepts of IMAGE into a run directory.

    Settings come in layers, later ones win: defaults, the backbone's own preset, --preset, --config, --set, the
    options above.
    An interrupted run keeps what it has done; --resume goes on with it.
    """
    chosen = {role: name for role, name in components.items() if name is not None}
    options: dict[str, Any] = {"preset": preset, "attributes": attributes, "max_concepts": max_concepts, "seed": seed}
    options |= {"device": device}
    options["backbone"] = ({"model": model} if model is not None else {}) | (LOW_MEMORY if low_memory else {})
    given = {key: value for key, value in (options | {"components": chosen}).items() if value not in (None, (), {})}
    settings = load_settings(config, assignments, given)
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
