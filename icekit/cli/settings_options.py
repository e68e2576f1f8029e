"""The options that say a run's settings, for every command that makes runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from icekit.cli.common import LOW_MEMORY, low_memory_option, preset_option
from icekit.cli.completion import DEVICES, complete_setting, names
from icekit.cli.parameters import COUNT, SEED, UserPath


def component_option(role: str, what: str, default: str) -> Callable[[Any], Any]:
    """The option that names the component of a role."""
    help_ = f"{what} [default: {default}; `icekit plugins` lists them]"
    return click.option(f"--{role}", metavar="NAME", help=help_, shell_complete=names(role))


_OPTIONS = (
    preset_option,
    component_option("backbone", "Text-to-image model", "sd21"),
    click.option("--model", type=str, metavar="ID|FOLDER|FILE", help="Model of the hub, folder in diffusers' format or "
                 ".safetensors file; says by itself which backbone it needs"),
    component_option("retriever", "What finds words for an image", "clip"),
    component_option("segmentor", "What finds a word's place in an image", "xattn"),
    component_option("learner", "What learns the tokens", "ice"),
    click.option("--attribute", "attributes", multiple=True, metavar="NAME", shell_complete=names("attribute"),
                 help="Learn this attribute; give it once for each [default: colour and material]"),
    click.option("--max-concepts", type=COUNT, metavar="N", help="Stop looking after this many concepts [default: 10]"),
    click.option("--seed", type=SEED, metavar="N", help="Every random choice follows from it [default: 0]"),
    click.option("--device", metavar="auto|cpu|cuda|mps", shell_complete=DEVICES,
                 help="Where the models run [default: auto]"),
    low_memory_option,
    click.option("--config", type=UserPath(), metavar="FILE.toml", help="Settings file; the settings.toml of a run "
                 "directory is one"),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", shell_complete=complete_setting,
                 help="One setting, as in learner.steps=400; `icekit plugins show NAME` lists a component's"),
)  # fmt: skip


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with them: it takes them as ``**options``, which ``layers_of`` reads."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def layers_of(options: Mapping[str, Any]) -> tuple[Path | None, Sequence[str], dict[str, Any]]:
    """The layers of settings that were typed, the lowest first: the file, the assignments, and what options say."""
    components = {role: options[role] for role in ("backbone", "retriever", "segmentor", "learner") if options[role]}
    of_backbone = {"model": options["model"]} if options["model"] is not None else {}
    said = {key: options[key] for key in ("preset", "attributes", "max_concepts", "seed", "device")}
    said |= {"backbone": of_backbone | (LOW_MEMORY if options["low_memory"] else {}), "components": components}
    return options["config"], options["assignments"], {k: v for k, v in said.items() if v not in (None, (), {})}
