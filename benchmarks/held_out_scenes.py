"""How well does `icekit run` see? Measured on rendered tabletop scenes whose objects no model was trained on.

    python benchmarks/held_out_scenes.py --scenes 50                              # the whole pipeline
    python benchmarks/held_out_scenes.py --scenes 50 --given words                # the true words, no retriever
    python benchmarks/held_out_scenes.py --scenes 50 --given masks                # the true masks, no segmentor
    python benchmarks/held_out_scenes.py --scenes 50 --given words --given masks  # what is left is stage two
    python benchmarks/held_out_scenes.py --retriever splice --segmentor diffseg
    python benchmarks/held_out_scenes.py --split train --seed 1000                # scenes to choose settings on
    python benchmarks/held_out_scenes.py --two-of-a-kind                          # each has two objects of one shape

What a stage loses is the difference between two of these. Every object of every scene counts: one that was not found
has IoU 0 and is named wrong. The last line is what chance would reach.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from icekit_tabletop import Scene, render_scene
from icekit_tabletop.dataset import distinct_scene
from icekit_tabletop.world import COLOURS, MATERIALS, Split
from PIL import Image
from tqdm import tqdm

from icekit import Extraction, InputError, RunError, Settings, extract
from icekit.bench.bootstrap import bootstrap
from icekit.bench.matching import match_masks

FIRST_SEED = 2_000_000_000
"""Scenes of this benchmark start here: beyond the training's seeds and the models' own evaluation."""


def scene_of(seed: int, size: int, split: Split = "held-out", two_of_a_kind: bool = False) -> Scene:
    """A scene of 1 to 3 objects, all of held-out combinations (or none, ``train``), no two of the same shape.

    With ``two_of_a_kind`` it has 2 or 3 objects, and two of them are of one shape.
    """
    if not two_of_a_kind:
        return distinct_scene([seed], (FIRST_SEED, 2**31), 1 + seed % 3, size, split)
    objects, attempt = 2 + seed % 2, 0
    while True:
        rng = np.random.default_rng([seed, attempt])
        scene = render_scene(int(rng.integers(FIRST_SEED, 2**31)), n_objects=objects, size=size, split=split)
        if len({spec.shape for spec in scene.objects}) == objects - 1:
            return scene
        attempt += 1


def settings_for(scene: Scene, given: tuple[str, ...], assignments: dict[str, Any], folder: Path) -> Settings:
    """Settings of one run; `given` replaces components by the truth."""
    values: dict[str, Any] = {"samples": 0, **assignments}
    components = {"backbone": "tabletop", **values.pop("components", {})}
    if "words" in given:
        components["retriever"] = "words"
        values["retriever"] = {"words": [spec.shape for spec in scene.objects]}
    if "masks" in given:
        components["segmentor"] = "masks"
        for index, mask in enumerate(scene.masks):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{index}.png")
        values["segmentor"] = {"files": [str(folder)]}
        if "words" in given:
            values["segmentor"]["words"] = [spec.shape for spec in scene.objects]
    return Settings.model_validate({**values, "components": components})


def judge(scene: Scene, found: Extraction | None) -> list[dict[str, Any]]:
    """One row per true object: its match among the concepts (best total IoU) and what was said of it."""
    concepts = found.concepts if found else []
    masks = [torch.from_numpy(concept.mask()) for concept in concepts]
    rows = []
    matches = match_masks([torch.from_numpy(mask) for mask in scene.masks], masks)
    for spec, (index, overlaps) in zip(scene.objects, matches, strict=True):
        concept = None if index is None else concepts[index]
        words = concept.words if concept else {}
        rows.append(
            {
                "object": f"{spec.colour} {spec.material} {spec.shape}",
                "texture": spec.texture,
                "label": concept.label if concept else None,
                "iou": overlaps,
                "word": bool(concept and concept.label == spec.shape),
                "found": bool(concept and concept.label == spec.shape and overlaps >= 0.5),
                "colour": (words.get("colour") or [None])[0],
                "material": (words.get("material") or [None])[0],
                "colour_right": (words.get("colour") or [None])[0] == spec.colour,
                "material_right": (words.get("material") or [None])[0] == spec.material,
            }
        )
    return rows


def share(rows: list[dict[str, Any]], key: str) -> str:
    """Mean of a column and its 95 % bootstrap interval, in percent."""
    found = bootstrap([float(row[key]) for row in rows])
    assert found is not None, "there is a scene, and an object in it"
    return f"{100 * found.mean:5.1f} %  [{100 * found.low:.1f}, {100 * found.high:.1f}]"


@click.command()
@click.option("--scenes", default=50, show_default=True, help="Number of scenes.")
@click.option("--seed", default=0, show_default=True, help="Number of the first scene.")
@click.option("--given", multiple=True, type=click.Choice(["words", "masks"]), help="Give the pipeline the truth.")
@click.option("--retriever", help="In place of the default.")
@click.option("--segmentor", help="In place of the default.")
@click.option("--split", default="held-out", show_default=True, type=click.Choice(["held-out", "train"]))
@click.option("--two-of-a-kind", is_flag=True, help="Scenes of which each has two objects of one shape.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting of icekit run.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write every object's row here.")
def main(
    scenes: int,
    seed: int,
    given: tuple[str, ...],
    retriever: str | None,
    segmentor: str | None,
    split: Split,
    two_of_a_kind: bool,
    assignments: tuple[str, ...],
    out: Path | None,
) -> None:
    """Run the pipeline on held-out scenes and print what it got right."""
    from icekit.settings import load_settings

    components = {role: name for role, name in (("retriever", retriever), ("segmentor", segmentor)) if name}
    try:
        chosen = load_settings(assignments=assignments, options={"components": components}).given()
    except InputError as error:
        raise click.UsageError(str(error)) from error
    rows: list[dict[str, Any]] = []
    extra = 0
    seconds: list[float] = []
    for number in tqdm(range(seed, seed + scenes), unit="scene"):
        scene = scene_of(number, size=64, split=split, two_of_a_kind=two_of_a_kind)
        with tempfile.TemporaryDirectory() as folder:
            masks = Path(folder) / "masks"
            masks.mkdir()
            try:
                found = extract(scene.image, Path(folder) / "run", settings_for(scene, given, chosen, masks))
                seconds.append(sum(found.manifest["timings"].values()))
            except InputError as error:
                raise click.UsageError(str(error)) from error
            except RunError as error:
                tqdm.write(f"scene {number}: {error}")
                found = None
            judged = judge(scene, found)
            extra += max(0, len(found.concepts) - len(judged)) if found else 0
        rows += [{"scene": number, **row} for row in judged]
    kind = ", two of a kind in each" if two_of_a_kind else ""
    click.echo(f"{scenes} {split} scenes{kind}, {len(rows)} objects; given: {', '.join(given) or 'nothing'}")
    for key, label in {
        "found": "found, right word, IoU >= 0.5",
        "word": "right word on the best mask",
        "iou": "mean IoU",
        "colour_right": "colour named right",
        "material_right": "material named right",
    }.items():
        click.echo(f"  {label:32s} {share(rows, key)}")
    click.echo(f"  {'concepts beyond the objects':32s} {extra / scenes:.2f} a scene")
    click.echo(f"  {'time':32s} {f'{np.mean(seconds):.1f} s a scene' if seconds else '-'}")
    click.echo(f"  (chance: colour {100 / len(COLOURS):.1f} %, material {100 / len(MATERIALS):.1f} %)")
    if out:
        out.write_text(json.dumps({"given": given, "settings": chosen, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
