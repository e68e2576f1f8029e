"""What the package gives icekit: backbone and data set ``tabletop``, metrics, and the command ``icekit tabletop``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from icekit.cli.parameters import SEED, UserPath, Whole
from icekit.files import read_bytes
from icekit.hookspecs import hookimpl
from icekit.protocols import InputError
from icekit.run.atomic import write_image_atomically, write_json_atomically
from icekit.run.ownership import cannot_write, check_way, delete_files, delete_half_written, writing_into

if TYPE_CHECKING:
    from icekit.hookspecs import Register

IMAGE, SCENE = "image.png", "scene.json"
METRICS = {
    "attribute_words": ("AttributeWords", "Share of objects whose attribute token was named with the true word."),
    "attribute_images": ("AttributeImages", "Share of an attribute's images in which the probe reads the true one."),
    "transfer": ("Transfer", "An object's colour token on another thing: does the colour come, the cup stay?"),
    "leakage": ("Leakage", "What a token changes that is not its business: 0 is ideal, 1 the worst."),
    "recompose": ("Recompose", "All of a concept's tokens together: is it the object again?"),
}
"""The metrics by name: their classes, and what each measures."""


@hookimpl
def register_backbones(register: Register) -> None:
    """The tabletop's own text-to-image model."""
    from icekit_tabletop.settings import TabletopSettings

    register(
        "tabletop",
        "icekit_tabletop.backbone:Tabletop",
        settings=TabletopSettings,
        summary="Stable Diffusion in small: 64-pixel scenes of objects on a table, some hundred words.",
    )


@hookimpl
def register_datasets(register: Register) -> None:
    """Held-out scenes with all that is true of them."""
    from icekit_tabletop.settings import DatasetSettings

    register(
        "tabletop",
        "icekit_tabletop.dataset:TabletopDataset",
        settings=DatasetSettings,
        summary="Rendered scenes of one to three objects, all of combinations that no model was trained on.",
    )


@hookimpl
def register_metrics(register: Register) -> None:
    """What the truth of a rendered scene allows to measure."""
    from icekit_tabletop.settings import MetricSettings

    for name, (component, summary) in METRICS.items():
        register(name, f"icekit_tabletop.metrics:{component}", settings=MetricSettings, summary=summary)


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
@click.option("--seed", type=SEED, default=0, show_default=True, help="The same seed, the same scene.")
@click.option("--out", type=UserPath(), required=True, help="Folder to write to.")
@click.option(
    "--n-objects",
    type=Whole(min=1, max=4),
    default=None,
    help="Number of objects, 1 to 4; drawn from the seed by default.",
)
@click.option(
    "--size", type=Whole(min=8, max=2048), default=64, show_default=True, help="Side of the picture in pixels."
)
def render(seed: int, out: Path, n_objects: int | None, size: int) -> None:
    """Render one scene: image.png, masks/ (visible pixels of each object) and scene.json.

    A scene that is there already is replaced; files that are not a scene's stay.
    """
    try:
        write_scene(seed, out, n_objects=n_objects, size=size)
    except ValueError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise cannot_write(out, error) from error
    click.echo(out / "image.png")


def write_scene(seed: int, out: Path, *, n_objects: int | None = None, size: int = 64) -> None:
    """Render a scene into a folder: image.png, ``masks/<index>-<shape>.png`` (8-bit, 0 or 255) and scene.json.

    It replaces a scene that was rendered there before.

    Raises ``ValueError`` for a wrong number of objects, ``InputError`` where somebody else's file is in the way.
    """
    from PIL import Image

    from icekit_tabletop.render import render_scene

    scene = render_scene(seed, n_objects=n_objects, size=size)
    pictures, objects = {IMAGE: scene.image}, []
    for index, (spec, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
        path = f"masks/{index}-{spec.shape}.png"
        pictures[path] = Image.fromarray(mask.astype("uint8") * 255)
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
    with writing_into(out):
        own = _scene_files(out)
        check_way(out, own, [*pictures, SCENE])
        # The description comes first: it says which files are a scene's, whenever the process may be killed.
        delete_files(out, own - pictures.keys() - {SCENE})
        delete_half_written(out, {*own, *pictures, SCENE})
        write_json_atomically(out / SCENE, description, indent=2)
        for path, picture in pictures.items():
            write_image_atomically(out / path, picture)


def _scene_files(folder: Path) -> set[str]:
    """The files of the scene that was rendered into a folder, by its description; none where there is none of ours."""
    try:
        scene = json.loads(read_bytes(folder / SCENE, 2**20))
        names = {one["mask"] for one in scene["objects"]} if {"seed", "caption", "table"} <= scene.keys() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()
    masks = {name for name in names if isinstance(name, str) and re.fullmatch(r"masks/\d+-\w+\.png", name)}
    return {IMAGE, SCENE} | masks if names else set()
