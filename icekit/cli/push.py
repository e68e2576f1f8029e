"""``icekit push``: a run or a batch, on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from icekit.cli.parameters import UserPath
from icekit.foreign import aside


@click.command("push")
@click.argument("run_dir", type=UserPath())
@click.argument("repository", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
def push(run_dir: Path, repository: str, private: bool) -> None:
    """Put the run or the batch in RUN_DIR on the Hugging Face hub, and print how it is named from then on.

    Only what icekit wrote goes there, the model card with it. manifest.json and settings.toml name the picture's file
    and the model as they are on this machine. `hf auth login` says who you are.

    icekit push runs/photo user/photo

    icekit compose "a photo of {a}" a=hub:user/photo:0
    """
    from icekit.concept_library.pushing import push as push_run

    with aside():
        pushed = push_run(run_dir, repository, private=private)
    click.echo(f"{pushed.reference}\t{pushed.url}\t{pushed.files} files")
