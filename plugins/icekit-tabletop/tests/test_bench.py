"""The tabletop as a data set, and the metrics that read generated images, against rendered ones and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from icekit_tabletop import metrics, render_scene
from icekit_tabletop.dataset import TabletopDataset
from icekit_tabletop.world import ObjectSpec, is_held_out
from PIL import Image

from icekit import Region
from icekit.pixels import fit
from icekit.protocols import BenchImage, FoundConcept, Match, TrueConcept


def pictures(count: int, seed: int = 7, size: tuple[int, int] = (64, 64), **settings: Any) -> list[Any]:
    return list(TabletopDataset(TabletopDataset.Settings(**settings)).pictures(count, seed, size))


def test_scenes():
    three = pictures(3)
    assert [one.name for one in three] == ["scene-000", "scene-001", "scene-002"]
    assert [len(one.concepts) for one in three] == [1, 2, 3]
    for one in three:
        assert one.picture.size == (64, 64)
        assert len({concept.word for concept in one.concepts}) == len(one.concepts)
        for concept in one.concepts:
            assert concept.mask.dtype == torch.bool and concept.mask.shape == (64, 64) and concept.mask.any()
            assert is_held_out(concept.word, concept.attributes["colour"], concept.attributes["material"])
    again = pictures(2)
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(again, three, strict=False))
    assert not np.array_equal(pictures(1, seed=8)[0].picture, three[0].picture)
    assert [len(one.concepts) for one in pictures(2, objects=2)] == [2, 2]


def test_scenes_of_two_sides():
    """The middle of the square scene: its masks are those of the picture as the bench fits it."""
    for whole, one in zip(pictures(3), pictures(3, size=(64, 48)), strict=True):
        assert np.array_equal(fit(one.picture, (64, 48)), np.asarray(whole.picture)[:, 8:56])
        masks = {concept.word: concept.mask for concept in whole.concepts}
        for concept in one.concepts:
            assert torch.equal(concept.mask, masks[concept.word][:, 8:56])


@dataclass
class FakeOutcome:
    """An outcome whose generated images are given."""

    image: BenchImage
    matches: list[Match]
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    parts: tuple[str, ...] = ("category", "instance", "colour", "material")

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part not in ("category", "instance"))

    def generate(self, prompt: str) -> list[Image.Image]:
        return self.pictures[prompt]


def rendered(*looks: tuple[str, str, str], seed: int = 3_100_000_000) -> list[Image.Image]:
    """Pictures of single objects (shape, colour, material)."""
    return [render_scene(seed + number, [ObjectSpec(*look)]).image for number, look in enumerate(looks)]


TRUTH = TrueConcept(torch.ones(64, 64, dtype=torch.bool), "cube", {"colour": "red", "material": "rubber"})
FOUND = FoundConcept(
    Region(0, "cube", 1.0, TRUTH.mask),
    {"category": "<cube-0>", "instance": "<cube-0-instance>", "colour": "<cube-0-colour>", "material": "<cube-0-m>"},
    {"colour": ["red", "pink"], "material": ["wood", "rubber"]},
)
OTHER = metrics.other_shape("scene", 0, "cube")


def outcome(found: FoundConcept | None = FOUND, **pictures: list[Image.Image]) -> FakeOutcome:
    prompts = {
        "colour": "a photo of a <cube-0> <cube-0-colour>",
        "material": "a photo of a <cube-0> <cube-0-m>",
        "category": "a photo of a <cube-0>",
        "word": "a photo of a cube",
        "all": "a photo of a <cube-0> <cube-0-colour> <cube-0-m>",
        "moved": f"a photo of a {OTHER} <cube-0-colour>",
        "plain": f"a photo of a {OTHER} red",
    }
    image = BenchImage("scene", torch.zeros(3, 64, 64), (TRUTH,))
    match = Match(TRUTH.mask, TRUTH, found, 0.9 if found else 0.0)
    return FakeOutcome(image, [match], {prompts[key]: value for key, value in pictures.items()})


def measure(metric: type, what: FakeOutcome) -> dict[str, float | None]:
    scores = metric(metric.Settings(), SimpleNamespace()).measure(what)
    return {column: score.value for column, score in scores.items()}


def test_probe_reads_renders():
    looks = [("cube", "red", "rubber"), ("ball", "blue", "metal"), ("vase", "green", "wood"), ("ring", "pink", "stone")]
    seen = metrics.read(rendered(*looks))
    assert all(torch.allclose(p.sum(dim=1), torch.ones(4), atol=1e-5) for p in seen.values())
    for place, name in enumerate(metrics.READABLE):
        words = [metrics.READABLE[name][int(i)] for i in seen[name].argmax(dim=1)]
        assert words == [look[place] for look in looks]


def test_attribute_words():
    assert measure(metrics.AttributeWords, outcome()) == {"words_colour": 1.0, "words_material": 0.0}
    assert measure(metrics.AttributeWords, outcome(found=None)) == {"words_colour": 0.0, "words_material": 0.0}


def test_attribute_images():
    what = outcome(
        colour=rendered(("cube", "red", "metal"), ("cube", "blue", "rubber")),
        material=rendered(("cube", "green", "rubber"), ("cube", "blue", "rubber")),
    )
    assert measure(metrics.AttributeImages, what) == {"images_colour": 0.5, "images_material": 1.0}
    assert measure(metrics.AttributeImages, outcome(found=None)) == {"images_colour": 0.0, "images_material": 0.0}


def test_transfer():
    what = outcome(moved=rendered((OTHER, "red", "rubber"), (OTHER, "blue", "rubber")))
    assert measure(metrics.Transfer, what) == {"transfer_colour": 0.5, "transfer_shape": 1.0}
    assert OTHER != "cube"


def test_leakage():
    assert metrics.total_variation(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])) == pytest.approx(0.4)
    same = rendered((OTHER, "red", "wood"))
    cube = rendered(("cube", "white", "stone"))
    pure = measure(metrics.Leakage, outcome(moved=same, plain=same, category=cube, word=cube))
    assert pure == {"leak_colour_material": 0.0, "leak_category_colour": 0.0}
    leaking = measure(
        metrics.Leakage,
        outcome(
            moved=rendered((OTHER, "red", "metal")), plain=same, category=rendered(("cube", "red", "stone")), word=cube
        ),
    )
    assert leaking["leak_colour_material"] > 0.5 and leaking["leak_category_colour"] > 0.5
    assert set(measure(metrics.Leakage, outcome(found=None)).values()) == {None}


def test_recompose():
    what = outcome(all=rendered(("cube", "red", "rubber"), ("cube", "red", "metal"), ("ball", "blue", "rubber")))
    found = measure(metrics.Recompose, what)
    assert found["recompose"] == pytest.approx(1 / 3)
    assert found["recompose_parts"] == pytest.approx((3 + 2 + 1) / 9)


def test_no_value_without_the_token_that_a_metric_needs():
    """For a method of one token, and for one of an instance and a class noun: also where the object was missed."""
    one = replace(FOUND, tokens={"instance": "<cube-0-instance>"}, words={})
    noun = replace(FOUND, tokens={"category": "<cube-0>", "instance": "<cube-0-instance>"}, words={})
    cube = rendered(("cube", "white", "stone"))
    for found, parts in ((one, ("instance",)), (noun, ("category", "instance")), (None, ("instance",))):
        what = replace(outcome(found, category=cube, word=cube), parts=parts)
        for metric in (metrics.AttributeWords, metrics.AttributeImages, metrics.Transfer, metrics.Recompose):
            assert measure(metric, what) == {}
        leaked = measure(metrics.Leakage, what)
        assert leaked["leak_colour_material"] is None
        assert leaked["leak_category_colour"] == (0.0 if found is noun else None)


@pytest.mark.slow
def test_bench_on_two_scenes(tmp_path):
    """The program on the real models, with a learner that learns nothing: the ends of the scale are in their place."""
    arguments = ["bench", "tabletop", "--n", "2", "--seed", "7", "--learner", "words", "--out", str(tmp_path / "bench")]
    quick = ["--set", "bench.images=1", "--set", "sample_steps=2", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "icekit", *arguments, *quick], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    rows = {row["name"]: row["values"] for row in made["rows"]}
    assert list(rows) == ["xattn-words", "floor", "ceiling"]
    for column in ("miou", "recall", "word_accuracy", "words_colour", "words_material"):
        assert rows["ceiling"][column]["mean"] == 1
    assert rows["floor"]["miou"]["mean"] < 0.5
    assert {"sim_i", "acc3", "images_colour", "transfer_shape", "leak_category_colour", "recompose"} <= rows[
        "ceiling"
    ].keys()
    assert made["settings"]["run"]["backbone"] == "tabletop"
    assert "scene-001" in (tmp_path / "bench" / "bench.html").read_text()
