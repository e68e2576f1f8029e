"""Do tokens of an image work in new combinations? Measured on tabletop scenes by a classifier of renders, the probe.

    python benchmarks/recombination.py --scenes 50 --training-scenes 30 --json recombination.json
    python benchmarks/recombination.py --scenes 6 --training-scenes 6 --runs runs/recombination   # keeps the runs
    python benchmarks/recombination.py --scenes 50 --given words --given masks                    # stage two alone

Three kinds of picture are made for every object of every scene:

- new colour: the object's own category and material with a colour that it does not have;
- new object: another thing with the object's colour;
- new object, both: another thing with the object's colour and material.

A picture is right if the probe reads all the words that were asked for. "true words" is the same prompt with the plain
words in place of the tokens: as good as the model gets. "luck" is a probe that reads any word. An object that was not
found has no tokens, and its pictures count as wrong.

How tokens are joined into a prompt is chosen on scenes of the training split; held-out scenes are asked once, with the
form that was right most often there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from held_out_scenes import scene_of, settings_for
from icekit_tabletop import Scene
from icekit_tabletop.metrics import is_right, read
from icekit_tabletop.world import COLOURS, MATERIALS, SHAPES, Split
from tqdm import tqdm

from icekit import Extraction, InputError, RunError, extract, plugins
from icekit.bench.bootstrap import bootstrap
from icekit.bench.matching import match_masks
from icekit.protocols import Backbone
from icekit.randomness import derived_seed
from icekit.run.compose import bind, plan_images, tokens_of
from icekit.run.models import load_backbone, reproducible, resolve_device

Form = Callable[[str, str | None, str | None], str]
"""From a thing, its colour and its material (words or references; None: nothing is said of it) to a prompt."""


def _said(*words: str | None) -> str:
    return " ".join(word for word in words if word)


FORMS: dict[str, Form] = {
    "after": lambda thing, colour, material: _said("a photo of a", thing, colour, material),
    "before": lambda thing, colour, material: _said("a photo of a", colour, material, thing),
    "commas": lambda thing, colour, material: ", ".join(
        part for part in (f"a photo of a {thing}", colour, material) if part
    ),
    "phrases": lambda thing, colour, material: _said(
        "a photo of a", thing, material and f"made of {material}", colour and f"with the colour {colour}"
    ),
}
"""How tokens are joined. "after" is the order in which attributes are learned, "before" that of English."""

KINDS = {
    "new colour": ("shape", "colour", "material"),
    "new object": ("shape", "colour"),
    "new object, both": ("shape", "colour", "material"),
}
"""What the probe must read for a picture to be right."""
WORDS = {"shape": len(SHAPES), "colour": len(COLOURS), "material": len(MATERIALS)}


@dataclass(frozen=True)
class Asked:
    """One prompt, and what its pictures should show. With ``found`` it has references to ``a``, or else none is made.

    scene, thing: the number of the scene, and the object's place in it. learned: with tokens, or with plain words.
    """

    scene: int
    thing: int
    kind: str
    form: str
    learned: bool
    prompt: str
    truth: dict[str, str]


@dataclass(frozen=True)
class Row:
    """What came of it: the share of its pictures with all right, and with each word right; 0 of what was not found."""

    scene: int
    thing: int
    kind: str
    form: str
    learned: bool
    prompt: str
    truth: dict[str, str]
    right: float
    by_word: dict[str, float]


def asked_of(scene: Scene, number: int, seed: int, forms: Sequence[str]) -> list[Asked]:
    """Every prompt that a scene is measured with. The other thing and the new colour follow from seed and scene."""
    asked = []
    for place, spec in enumerate(scene.objects):
        rng = np.random.default_rng([seed, number, place])
        other = str(rng.choice([shape for shape in SHAPES if shape != spec.shape]))
        fresh = str(rng.choice([colour for colour in COLOURS if colour != spec.colour]))
        for form in forms:
            for learned in (True, False):
                category, colour, material = (
                    ("{a.category}", "{a.colour}", "{a.material}")
                    if learned
                    else (spec.shape, spec.colour, spec.material)
                )
                for kind, (thing, its_colour, its_material), truth in (
                    ("new colour", (category, fresh, material), (spec.shape, fresh, spec.material)),
                    ("new object", (other, colour, None), (other, spec.colour, None)),
                    ("new object, both", (other, colour, material), (other, spec.colour, spec.material)),
                ):
                    words = {name: word for name, word in zip(WORDS, truth, strict=True) if word is not None}
                    prompt = FORMS[form](thing, its_colour, its_material)
                    asked.append(Asked(number, place, kind, form, learned, prompt, words))
    return asked


def extraction_of(scene: Scene, folder: Path, given: tuple[str, ...], assignments: dict[str, Any]) -> Extraction | None:
    """The run of a scene, an earlier one's if it is in the folder; None where nothing was found."""
    run = folder / "run"
    if (run / "manifest.json").is_file():
        return Extraction.open(run)
    masks = folder / "masks"
    masks.mkdir(parents=True, exist_ok=True)
    try:
        return extract(scene.image, run, settings_for(scene, given, assignments, masks), overwrite=run.exists())
    except RunError as error:
        tqdm.write(f"{folder}: {error}")
        return None


def measured(
    asked: Sequence[Asked], scene: Scene, found: Extraction | None, backbone: Backbone, seed: int, pictures: int
) -> list[Row]:
    """Make the pictures of one scene and read them."""
    masks = [torch.from_numpy(concept.mask()) for concept in found.concepts] if found else []
    matches = match_masks([torch.from_numpy(mask) for mask in scene.masks], masks)
    indices = [index if overlap > 0 else None for index, overlap in matches]
    rows: list[Row] = []
    tokens: dict[str, dict[str, torch.Tensor]] = {}
    prompts, seeds, made = [], [], []
    for one in asked:
        index = indices[one.thing]
        text = one.prompt
        if one.learned:
            if index is None or found is None:
                rows.append(Row(**asdict(one), right=0.0, by_word=dict.fromkeys(one.truth, 0.0)))
                continue
            bound = bind(f"a{index}", f"{found.run_dir}:{found.concepts[index].index}")
            cell = plan_images(one.prompt, {"a": bound.tokens}, 1).cells[0]
            text = cell.text
            tokens |= tokens_of({"a": bound}, [cell], backbone)
        made.append(one)
        prompts += [text] * pictures
        seeds += [derived_seed(seed, "recombination", one.scene, one.thing, number) for number in range(pictures)]
    with reproducible():
        drawn = backbone.generate(prompts, seeds=seeds, tokens=tokens)
    for place, one in enumerate(made):
        seen = read(drawn[place * pictures : (place + 1) * pictures])
        right = {name: is_right(seen[name], name, word) for name, word in one.truth.items()}
        whole = torch.stack(list(right.values())).all(dim=0).float().mean()
        by_word = {name: float(value.float().mean()) for name, value in right.items()}
        rows.append(Row(**asdict(one), right=float(whole), by_word=by_word))
    return rows


def table(rows: Sequence[Row], title: str) -> list[dict[str, Any]]:
    """Print shares of pictures right, a line a form and kind, and return them."""
    objects = {(row.scene, row.thing) for row in rows}
    click.echo(f"{title}: {len({row.scene for row in rows})} scenes, {len(objects)} objects; pictures right, percent")
    click.echo(f"  {'form':10s}{'kind':20s}{'tokens [95 %]':>24s}{'true words':>12s}{'luck':>7s}")
    lines = []
    for form in dict.fromkeys(row.form for row in rows):
        for kind, words in KINDS.items():
            own = [row for row in rows if (row.form, row.kind) == (form, kind)]
            tokens = bootstrap([row.right for row in own if row.learned])
            plain = bootstrap([row.right for row in own if not row.learned])
            assert tokens is not None and plain is not None, "every object has its prompts"
            luck = 1 / float(np.prod([WORDS[word] for word in words]))
            by_word = {
                word: {
                    what: float(np.mean([row.by_word[word] for row in own if row.learned == learned]))
                    for what, learned in (("tokens", True), ("true_words", False))
                }
                for word in words
            }
            lines.append(
                {
                    "form": form,
                    "kind": kind,
                    "tokens": tokens.mean,
                    "tokens_low": tokens.low,
                    "tokens_high": tokens.high,
                    "true_words": plain.mean,
                    "luck": luck,
                    "by_word": by_word,
                }
            )
            interval = f"{100 * tokens.mean:.1f} [{100 * tokens.low:.1f}, {100 * tokens.high:.1f}]"
            click.echo(f"  {form:10s}{kind:20s}{interval:>24s}{100 * plain.mean:12.1f}{100 * luck:7.2f}")
    return lines


def best_form(lines: Sequence[dict[str, Any]]) -> str:
    """The form whose tokens were right most often, the mean over the kinds; of equals the first."""
    means = {form: np.mean([line["tokens"] for line in lines if line["form"] == form]) for form in FORMS}
    return max(means, key=lambda form: float(means[form]))


@click.command()
@click.option("--scenes", default=50, show_default=True, help="Number of held-out scenes; 0 for none.")
@click.option("--training-scenes", default=30, show_default=True, help="Number of scenes that the form is chosen on.")
@click.option("--seed", default=0, show_default=True, help="Every random choice follows from it.")
@click.option("--pictures", default=4, show_default=True, help="Pictures of each prompt.")
@click.option("--form", type=click.Choice(list(FORMS)), help="Ask with this form, without training scenes.")
@click.option("--given", multiple=True, type=click.Choice(["words", "masks"]), help="Give the pipeline the truth.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting of icekit run.")
@click.option("--runs", type=click.Path(path_type=Path), help="Keep the runs here, and use those that are here.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write tables and every row here.")
def main(
    scenes: int,
    training_scenes: int,
    seed: int,
    pictures: int,
    form: str | None,
    given: tuple[str, ...],
    assignments: tuple[str, ...],
    runs: Path | None,
    out: Path | None,
) -> None:
    """Choose how tokens are joined on training scenes, and measure three kinds of recombination on held-out ones."""
    from icekit.settings import load_settings

    try:
        chosen = {"seed": seed, **load_settings(assignments=assignments).given()}
    except InputError as error:
        raise click.UsageError(str(error)) from error
    if form is None and not training_scenes:
        raise click.UsageError("--training-scenes is 0: say which form to use by --form")
    result: dict[str, Any] = {"seed": seed, "pictures": pictures, "given": given, "settings": chosen}
    with tempfile.TemporaryDirectory() as temporary:
        folder = runs or Path(temporary)

        def rows_of(split: Split, count: int, forms: Sequence[str]) -> list[Row]:
            rows: list[Row] = []
            backbone: Backbone | None = None
            for number in tqdm(range(seed, seed + count), desc=split, unit="scene"):
                scene = scene_of(number, size=64, split=split)
                try:
                    found = extraction_of(scene, folder / f"{split}-{number}", given, chosen)
                    if backbone is None:
                        settings = settings_for(scene, (), chosen, folder)
                        values = settings.values_of("backbone") | {"images_at_once": 16}
                        settings = settings.model_copy(update={"backbone": values})
                        device = resolve_device(settings.device)
                        backbone = load_backbone(plugins.installed(), settings, device, learns=False)
                except InputError as error:
                    raise click.UsageError(str(error)) from error
                asked = asked_of(scene, number, seed, forms)
                rows += measured(asked, scene, found, backbone, seed, pictures)
            return rows

        if form is None:
            rows = rows_of("train", training_scenes, list(FORMS))
            result["training"] = {"table": table(rows, "training scenes"), "rows": [asdict(row) for row in rows]}
            form = best_form(result["training"]["table"])
            click.echo(f"  most often right on training scenes: {form!r}, as in {FORMS[form]('cup', 'red', 'metal')!r}")
        result["form"] = form
        if scenes:
            rows = rows_of("held-out", scenes, [form])
            result["held_out"] = {"table": table(rows, "held-out scenes"), "rows": [asdict(row) for row in rows]}
    if out:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
