"""Tests of the tabletop world's vocabulary, distance fields and renderer."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from icekit_tabletop.render import render_batch, render_scene
from icekit_tabletop.sdf import SDFS
from icekit_tabletop.world import (
    COLOURS,
    MATERIALS,
    SHAPE_BOUNDS,
    SHAPES,
    Camera,
    ObjectSpec,
    PlacedObject,
    SceneSpec,
    is_held_out,
    sample_scene,
)


def _distance(shape: str, *point: float) -> float:
    x, y, z = (torch.tensor([c], dtype=torch.float32) for c in point)
    return float(SDFS[shape](x, y, z))


def test_same_seed_same_scene() -> None:
    first, second = render_scene(7), render_scene(7)
    assert first.spec == second.spec
    assert first.image.tobytes() == second.image.tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(first.masks, second.masks, strict=True))
    assert render_scene(8).image.tobytes() != first.image.tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_masks_are_disjoint_and_one_per_object(count: int) -> None:
    scene = render_scene(100 + count, n_objects=count)
    assert scene.image.size == (64, 64) and scene.image.mode == "RGB"
    assert len(scene.masks) == len(scene.objects) == count
    assert all(mask.shape == (64, 64) and mask.dtype == bool and mask.sum() > 20 for mask in scene.masks)
    assert np.sum(scene.masks, axis=0).max() == 1


def test_batch_equals_single_scenes_and_pads_masks() -> None:
    specs = [sample_scene(seed) for seed in range(10)]
    images, masks = render_batch(specs, 32)
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.uint8
    assert masks.shape == (10, 4, 32, 32) and masks.dtype == torch.bool
    for index, spec in enumerate(specs):
        image, mask = render_batch([spec], 32)
        assert (image[0].int() - images[index].int()).abs().float().mean() < 0.5
        assert (mask[0] ^ masks[index]).sum() <= 4
        assert not masks[index, len(spec.objects) :].any()


def test_held_out_share_is_a_balanced_tenth() -> None:
    held = [(s, c, m) for s in SHAPES for c in COLOURS for m in MATERIALS if is_held_out(s, c, m)]
    assert len(held) == 40
    assert Counter(s for s, _, _ in held) == dict.fromkeys(SHAPES, 4)
    assert Counter(c for _, c, _ in held) == dict.fromkeys(COLOURS, 5)
    assert Counter(m for _, _, m in held) == dict.fromkeys(MATERIALS, 8)


def test_splits_keep_their_promise() -> None:
    for seed in range(40):
        for split, expected in (("train", False), ("held-out", True)):
            for thing in sample_scene(seed, split=split).objects:  # type: ignore[arg-type]
                assert is_held_out(thing.spec.shape, thing.spec.colour, thing.spec.material) is expected


def test_objects_do_not_intersect() -> None:
    for seed in range(60):
        things = sample_scene(seed, n_objects=4).objects
        for i, a in enumerate(things):
            for b in things[:i]:
                reach = sum(SHAPE_BOUNDS[t.spec.shape].footprint * t.scale for t in (a, b))
                assert math.hypot(a.x - b.x, a.z - b.z) > reach


def test_given_objects_are_kept_in_order() -> None:
    wanted = [ObjectSpec("cup", "red", "glass"), ObjectSpec("ball", "white", "metal", "striped")]
    assert render_scene(3, wanted, size=16).objects == wanted


@pytest.mark.parametrize(
    ("words", "wrong", "right"),
    [
        (("sphere", "red", "metal"), "sphere", "ball"),
        (("ball", "teal", "metal"), "teal", "purple"),
        (("ball", "red", "cheese"), "cheese", "rubber"),
        (("ball", "red", "metal", "tartan"), "tartan", "checkered"),
    ],
)
def test_wrong_words_are_named(words: tuple[str, ...], wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}.*{right}"):
        ObjectSpec(*words)


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4"):
        sample_scene(0, n_objects=5)
    with pytest.raises(ValueError, match="1 to 4"):
        sample_scene(0, objects=[])
    with pytest.raises(ValueError, match="n_objects"):
        sample_scene(0, objects=[ObjectSpec("ball", "red", "metal")], n_objects=2)


def test_ball_and_cube_distances() -> None:
    assert _distance("ball", 0, 0.5, 0) == pytest.approx(-0.5, abs=1e-6)
    assert _distance("ball", 3, 4.5, 0) == pytest.approx(4.5, abs=1e-6)  # 3-4-5 triangle, less the radius
    assert _distance("cube", 1.42, 0.42, 0) == pytest.approx(1.0, abs=1e-6)  # face
    assert _distance("cube", 0, 0.42, 0) == pytest.approx(-0.42, abs=1e-6)  # centre
    # Edge: 3 and 4 from the core's faces (half edge 0.39), less the rounding 0.03.
    assert _distance("cube", 3.39, 4.81, 0) == pytest.approx(4.97, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bounding_sphere_holds_the_shape(shape: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, 3, generator=generator) * torch.tensor([2.0, 1.6, 2.0]) - torch.tensor([1.0, 0.2, 1.0])
    inside = p[SDFS[shape](*p.unbind(1)) < 0]
    bounds = SHAPE_BOUNDS[shape]
    assert len(inside) > 500
    assert (inside - torch.tensor([0, bounds.centre, 0])).norm(dim=1).max() <= bounds.radius
    assert inside[:, [0, 2]].norm(dim=1).max() <= bounds.footprint + 1e-3
    assert inside[:, 1].max() <= bounds.height + 1e-3
    assert inside[:, 1].min() >= -1e-3


def test_ball_silhouette_has_the_projected_area() -> None:
    camera = Camera(azimuth=0.0, elevation=0.3, distance=4.0, target_height=0.5, fov=0.5)
    ball = PlacedObject(ObjectSpec("ball", "red", "rubber"), 0.0, 0.0, 0.0, 1.0)
    _, masks = render_batch([SceneSpec((ball,), camera=camera)], 128)
    # A sphere seen along the optical axis is a disc: tan of its half angle over tan of the half field of view.
    radius = math.tan(math.asin(0.5 / 4.0)) / math.tan(0.25) * 64
    assert int(masks[0, 0].sum()) == pytest.approx(math.pi * radius**2, rel=0.02)
    assert not masks[0, 1:].any()
