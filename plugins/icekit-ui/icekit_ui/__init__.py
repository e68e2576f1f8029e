"""``icekit ui``: a page in the browser to find objects in a picture, learn their tokens and mix them.

What is here is quick to import; Gradio and torch are imported when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from icekit import hookimpl

PORT = 7860
"""Where the page is looked for first; if it is taken, the next one that is free is used."""


@hookimpl
def register_commands(cli: click.Group) -> None:
    """The command ``icekit ui``."""
    cli.add_command(ui)


@click.command("ui")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, metavar="DIR",
              help="Folder of all runs: earlier ones are listed, new ones are made in it, and no file outside of it "
              "is read for the page.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
              help="Address to listen on; with any other than the default, others can use the page.")  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Port to listen on [default: the first free "
              f"one from {PORT}]")  # fmt: skip
@click.option("--no-browser", is_flag=True, help="Print the page's address, and open no browser.")
@click.option("--backbone", metavar="NAME", help="Text-to-image model [default: sd21; `icekit plugins` lists them]")
@click.option("--model", metavar="ID|FOLDER|FILE", help="Model of the hub, folder in diffusers' format or .safetensors "
              "file")  # fmt: skip
@click.option("--preset", metavar="NAME", help="Named settings")
@click.option("--device", metavar="auto|cpu|cuda|mps", help="Where the models run [default: auto]")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE.toml", help="Settings file")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting, as in learner.steps=400")
def ui(
    runs: Path,
    host: str,
    port: int | None,
    no_browser: bool,
    backbone: str | None,
    model: str | None,
    preset: str | None,
    device: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Open a page to find objects in a picture, learn their tokens, and mix them.

    The settings are those of new runs, as in `icekit run`. One model works for one run at a time, and is loaded once.
    The page has no password: it is for this machine alone unless --host says otherwise.
    """
    from icekit import load_settings

    given: dict[str, Any] = {"preset": preset, "device": device}
    given |= {
        "components": {"backbone": backbone} if backbone else None,
        "backbone": {"model": model} if model else None,
    }
    settings = load_settings(config, assignments, {key: value for key, value in given.items() if value is not None})

    from icekit_ui.serving import serve

    serve(runs, settings, host=host, port=port, browser=not no_browser)
