"""What the package gives icekit: backbone and data set ``tabletop``, metrics, and the command ``icekit tabletop``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from icekit.hookspecs import hookimpl
from icekit.protocols import InputError


@hookimpl
def register_backbones(register: Callable[[str, type], None]) -> None:
    """The tabletop's own text-to-image model."""
    from icekit_tabletop.backbone import Tabletop

    register("tabletop", Tabletop)


@hookimpl
def register_datasets(register: Callable[[str, type], None]) -> None:
    """Held-out scenes with all that is true of them."""
    from icekit_tabletop.dataset import TabletopDataset

    register("tabletop", TabletopDataset)


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    """What the truth of a rendered scene allows to measure."""
    from icekit_tabletop import metrics

    register("attribute_words", metrics.AttributeWords)
    register("attribute_images", metrics.AttributeImages)
    register("transfer", metrics.Transfer)
    register("leakage", metrics.Leakage)
    register("recompose", metrics.Recompose)


@hookimpl
def register_presets(register: Callable[[str, Path], None]) -> None:
    """What suits the model and the data set, and the published method with the numbers that belong to this model."""
    for name in ("tabletop", "tabletop-bench", "published-tabletop"):
        register(name, Path(__file__).parent / "presets" / f"{name}.toml")


@hookimpl
def register_commands(cli: click.Group) -> None:
    """``icekit tabletop render``."""
    cli.add_command(tabletop)


@click.group()
def tabletop() -> None:
    """A small rendered world of objects on a table."""


@tabletop.command()
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same scene.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write to.")
@click.option("--n-objects", type=int, default=None, help="Number of objects, 1 to 4; drawn from the seed by default.")
@click.option(
    "--size", type=click.IntRange(min=8), default=64, show_default=True, help="Side of the picture in pixels."
)
def render(seed: int, out: Path, n_objects: int | None, size: int) -> None:
    """Render one scene: image.png, masks/ (visible pixels of each object) and scene.json."""
    try:
        write_scene(seed, out, n_objects=n_objects, size=size)
    except ValueError as error:
        raise InputError(str(error)) from error
    click.echo(out / "image.png")


def write_scene(seed: int, out: Path, *, n_objects: int | None = None, size: int = 64) -> None:
    """Render a scene into a folder: image.png, ``masks/<index>-<shape>.png`` (8-bit, 0 or 255) and scene.json.

    Raises ``ValueError`` for a wrong number of objects.
    """
    from PIL import Image

    from icekit_tabletop.render import render_scene

    scene = render_scene(seed, n_objects=n_objects, size=size)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    scene.image.save(out / "image.png")
    objects = []
    for index, (spec, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
        path = f"masks/{index}-{spec.shape}.png"
        Image.fromarray(mask.astype("uint8") * 255).save(out / path)
        look = {"shape": spec.shape, "colour": spec.colour, "material": spec.material, "texture": spec.texture}
        objects.append({"index": index} | look | {"mask": path})
    description = {
        "seed": seed,
        "size": size,
        "caption": scene.caption,
        "objects": objects,
        "table": scene.spec.table,
        "wall": scene.spec.wall,
    }
    (out / "scene.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
