"""Vocabulary and scene description of the tabletop world.

Lengths are in world units (a ball of scale 1 has diameter 1), angles in radians. The table is the plane ``y = 0``,
``y`` points up, the camera stands on the ``+z`` side and the wall is a plane of constant, negative ``z``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from icekit_tabletop.settings import Split

RGB = tuple[int, int, int]

SHAPES: tuple[str, ...] = (
    "ball",
    "cube",
    "cylinder",
    "cone",
    "ring",
    "cup",
    "bowl",
    "bottle",
    "vase",
    "pyramid",
)
COLOURS: dict[str, RGB] = {
    "red": (212, 24, 28),
    "orange": (246, 118, 8),
    "yellow": (250, 212, 20),
    "green": (28, 150, 50),
    "blue": (24, 82, 216),
    "purple": (122, 40, 168),
    "pink": (252, 132, 186),
    "white": (244, 244, 242),
}
MATERIALS: tuple[str, ...] = ("metal", "rubber", "glass", "wood", "stone")
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")

MAX_OBJECTS = 4


@dataclass(frozen=True)
class Surface:
    """Look of the table or the wall: two sRGB tones (0..255) and the pattern that mixes them."""

    base: RGB
    accent: RGB
    pattern: Literal["plain", "planks", "cloth", "speckle", "tiles"]


TABLES: dict[str, Surface] = {
    "grey": Surface((138, 138, 136), (126, 126, 126), "speckle"),
    "tan planks": Surface((188, 152, 108), (150, 114, 76), "planks"),
    "walnut planks": Surface((106, 76, 56), (74, 52, 38), "planks"),
    "dark slate": Surface((66, 70, 76), (54, 58, 64), "speckle"),
    "pale cloth": Surface((204, 198, 184), (184, 178, 164), "cloth"),
    "stone tiles": Surface((168, 166, 158), (120, 118, 112), "tiles"),
}
WALLS: dict[str, Surface] = {
    "warm grey": Surface((172, 166, 158), (166, 160, 152), "plain"),
    "dusty blue": Surface((132, 148, 164), (126, 142, 158), "plain"),
    "sage": Surface((146, 158, 138), (140, 152, 132), "plain"),
    "beige": Surface((196, 182, 160), (190, 176, 154), "plain"),
    "charcoal": Surface((84, 84, 90), (78, 78, 84), "plain"),
}


@dataclass(frozen=True)
class ShapeBounds:
    """Extent of a shape at scale 1, standing on the table with its axis at the origin.

    ``centre`` is the height of the bounding sphere's centre, ``radius`` that sphere's radius, ``footprint`` the radius
    of the vertical cylinder that holds the shape, ``height`` its top.
    """

    centre: float
    radius: float
    footprint: float
    height: float


SHAPE_BOUNDS: dict[str, ShapeBounds] = {
    "ball": ShapeBounds(0.5, 0.502, 0.5, 1.0),
    "cube": ShapeBounds(0.42, 0.715, 0.58, 0.84),
    "cylinder": ShapeBounds(0.475, 0.6, 0.36, 0.95),
    "cone": ShapeBounds(0.424, 0.628, 0.46, 1.05),
    "ring": ShapeBounds(0.5, 0.502, 0.5, 1.0),
    "cup": ShapeBounds(0.4, 0.625, 0.54, 0.8),
    "bowl": ShapeBounds(0.4, 0.602, 0.56, 0.5),
    "bottle": ShapeBounds(0.6, 0.665, 0.27, 1.2),
    "vase": ShapeBounds(0.55, 0.635, 0.4, 1.1),
    "pyramid": ShapeBounds(0.2526, 0.7, 0.65, 0.95),
}


def _check_word(kind: str, word: str, allowed: Iterable[str]) -> None:
    words = tuple(allowed)
    if word not in words:
        raise ValueError(f"unknown {kind} {word!r}: choose one of {', '.join(words)}")


@dataclass(frozen=True)
class ObjectSpec:
    """What an object is, in words.

    Raises ``ValueError`` for a word outside ``SHAPES``, ``COLOURS``, ``MATERIALS`` or ``TEXTURES``; the message names
    the wrong word and the right ones.
    """

    shape: str
    colour: str
    material: str
    texture: str = "plain"

    def __post_init__(self) -> None:
        _check_word("shape", self.shape, SHAPES)
        _check_word("colour", self.colour, COLOURS)
        _check_word("material", self.material, MATERIALS)
        _check_word("texture", self.texture, TEXTURES)


@dataclass(frozen=True)
class PlacedObject:
    """An object standing at ``(x, 0, z)``, turned by ``yaw`` about the vertical and scaled by ``scale``."""

    spec: ObjectSpec
    x: float
    z: float
    yaw: float
    scale: float


@dataclass(frozen=True)
class Camera:
    """Perspective camera looking at ``(0, target_height, 0)``.

    ``azimuth`` is measured from ``+z`` towards ``+x``, ``elevation`` above the table, ``fov`` is the full vertical
    opening angle.
    """

    azimuth: float = 0.0
    elevation: float = 0.4
    distance: float = 3.5
    target_height: float = 0.38
    fov: float = 0.62

    def basis(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Eye position and the unit right, up and forward vectors, each float64 ``[3]``."""
        ca, sa, ce, se = (
            math.cos(self.azimuth),
            math.sin(self.azimuth),
            math.cos(self.elevation),
            math.sin(self.elevation),
        )
        forward = np.array([-sa * ce, -se, -ca * ce])
        right = np.array([ca, 0.0, -sa])
        up = np.cross(right, forward)
        eye = np.array([0.0, self.target_height, 0.0]) - self.distance * forward
        return eye, right, up, forward

    def project(self, point: Sequence[float]) -> tuple[float, float, float]:
        """Image-plane ``(u, v, depth)`` of a world point; ``u`` and ``v`` run from -1 to 1 over a square picture."""
        eye, right, up, forward = self.basis()
        offset = np.asarray(point, dtype=float) - eye
        depth = float(offset @ forward)
        focal = 1.0 / math.tan(self.fov / 2)
        return float(offset @ right) * focal / depth, float(offset @ up) * focal / depth, depth


@dataclass(frozen=True)
class Light:
    """Key light: a large lamp far away.

    ``azimuth`` as for the camera, ``elevation`` above the table, ``intensity`` and ``ambient`` in linear radiance,
    ``warmth`` from -1 (bluish) to 1 (yellowish).
    """

    azimuth: float = -0.6
    elevation: float = 0.9
    intensity: float = 0.85
    ambient: float = 0.42
    warmth: float = 0.0


@dataclass(frozen=True)
class SceneSpec:
    """Everything the renderer needs. Raises ``ValueError`` for unknown surfaces or a wrong number of objects."""

    objects: tuple[PlacedObject, ...]
    table: str = "grey"
    wall: str = "warm grey"
    camera: Camera = Camera()
    light: Light = Light()
    wall_z: float = -2.0

    def __post_init__(self) -> None:
        _check_word("table", self.table, TABLES)
        _check_word("wall", self.wall, WALLS)
        if not 0 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"a scene holds 0 to {MAX_OBJECTS} objects, not {len(self.objects)}")


def is_held_out(shape: str, colour: str, material: str) -> bool:
    """Whether a (shape, colour, material) combination is kept out of training.

    A Latin-square-like rule holds out 40 of the 400 combinations: 4 for every shape, 5 for every colour and 8 for
    every material. Raises ``ValueError`` for an unknown word.
    """
    _check_word("shape", shape, SHAPES)
    _check_word("colour", colour, COLOURS)
    _check_word("material", material, MATERIALS)
    i, j, k = SHAPES.index(shape), list(COLOURS).index(colour), MATERIALS.index(material)
    return (i + 3 * j + 2 * k) % 10 == 0


def _sample_object(rng: np.random.Generator, split: Split) -> ObjectSpec:
    colours = tuple(COLOURS)
    while True:
        shape = SHAPES[rng.integers(len(SHAPES))]
        colour = colours[rng.integers(len(colours))]
        material = MATERIALS[rng.integers(len(MATERIALS))]
        # Half of all objects are plain, the rest is shared by the patterns.
        texture = "plain" if rng.random() < 0.5 else TEXTURES[1 + rng.integers(len(TEXTURES) - 1)]
        if split == "any" or is_held_out(shape, colour, material) == (split == "held-out"):
            return ObjectSpec(shape, colour, material, texture)


def _sample_yaw(rng: np.random.Generator, shape: str, azimuth: float) -> float:
    if shape == "ring":  # the hole has to show
        return azimuth + float(rng.uniform(-0.7, 0.7))
    if shape == "cup":  # the handle has to show at the left or the right
        return azimuth + float(rng.uniform(-0.6, 0.6)) + (math.pi if rng.random() < 0.5 else 0.0)
    return float(rng.uniform(-math.pi, math.pi))


_SCALES = {1: (0.95, 1.25), 2: (0.76, 0.98), 3: (0.64, 0.82), 4: (0.56, 0.72)}


def _fits(candidate: PlacedObject, placed: Sequence[PlacedObject], camera: Camera) -> bool:
    """Whether the candidate stays in the picture, clear of the others and mostly visible."""
    focal = 1.0 / math.tan(camera.fov / 2)

    def disc(thing: PlacedObject) -> tuple[float, float, float, float]:
        bounds = SHAPE_BOUNDS[thing.spec.shape]
        u, v, depth = camera.project((thing.x, bounds.height / 2 * thing.scale, thing.z))
        wide = bounds.footprint * thing.scale * focal / depth
        tall = (0.5 * bounds.height + 0.3 * bounds.footprint) * thing.scale * focal / depth
        return u, v, wide, tall

    u, v, wide, tall = disc(candidate)
    if abs(u) + wide > 1.0 or abs(v) + tall > 0.98:
        return False
    foot = SHAPE_BOUNDS[candidate.spec.shape].footprint * candidate.scale
    for other in placed:
        other_foot = SHAPE_BOUNDS[other.spec.shape].footprint * other.scale
        if math.hypot(candidate.x - other.x, candidate.z - other.z) < foot + other_foot + 0.03:
            return False
        ou, ov, owide, otall = disc(other)
        # Distance in units in which the two projected ellipses would just touch at 1.
        if math.hypot((u - ou) / (wide + owide), (v - ov) / (tall + otall)) < 0.82:
            return False
    return True


def _place(rng: np.random.Generator, specs: Sequence[ObjectSpec], camera: Camera) -> tuple[PlacedObject, ...]:
    low, high = _SCALES[len(specs)]
    shrink = 1.0
    while True:
        placed: list[PlacedObject] = []
        for spec in specs:
            for _ in range(24):
                scale = float(rng.uniform(low, high)) * shrink
                if spec.shape == "bowl":  # low: a little larger keeps sizes even
                    scale *= 1.1
                spread = 0.25 if len(specs) == 1 else 0.95
                candidate = PlacedObject(
                    spec,
                    float(rng.uniform(-spread, spread)),
                    float(rng.uniform(-spread, 0.7 * spread)),
                    _sample_yaw(rng, spec.shape, camera.azimuth),
                    scale,
                )
                if _fits(candidate, placed, camera):
                    placed.append(candidate)
                    break
            else:
                break
        if len(placed) == len(specs):
            return tuple(placed)
        shrink *= 0.985  # crowded: try again with slightly smaller objects


def sample_scene(
    seed: int,
    objects: Sequence[ObjectSpec] | None = None,
    n_objects: int | None = None,
    split: Split = "any",
) -> SceneSpec:
    """Draw a scene; the same arguments give the same scene.

    With ``objects`` (1 to 4) their look is given and only placement, table, wall, camera and light are drawn;
    otherwise ``n_objects`` objects (1 to 4, drawn too when ``None``) are drawn from the split: ``"train"`` uses no
    held-out combination, ``"held-out"`` only those. Raises ``ValueError`` for a wrong count or split, or when
    ``n_objects`` contradicts ``objects``.
    """
    _check_word("split", split, ("train", "held-out", "any"))
    rng = np.random.default_rng(seed)
    if objects is not None:
        if n_objects is not None and n_objects != len(objects):
            raise ValueError(f"n_objects is {n_objects} but {len(objects)} objects are given")
        specs = list(objects)
    else:
        count = int(rng.integers(1, MAX_OBJECTS + 1)) if n_objects is None else n_objects
        specs = []
        while len(specs) < min(count, MAX_OBJECTS + 1):
            spec = _sample_object(rng, split)
            if spec not in specs:  # identical twins would make the caption ambiguous
                specs.append(spec)
    if not 1 <= len(specs) <= MAX_OBJECTS:
        raise ValueError(
            f"a scene holds 1 to {MAX_OBJECTS} objects, not {n_objects if objects is None else len(specs)}"
        )
    camera = Camera(
        azimuth=float(rng.uniform(-0.35, 0.35)),
        elevation=float(rng.uniform(0.3, 0.52)),
        distance=float(rng.uniform(3.3, 3.7)),
        target_height=0.42 if len(specs) == 1 else 0.3,
        fov=float(rng.uniform(0.56, 0.62)),
    )
    side = 1.0 if rng.random() < 0.5 else -1.0
    light = Light(
        azimuth=camera.azimuth + side * float(rng.uniform(0.35, 1.1)),
        elevation=float(rng.uniform(0.75, 1.1)),
        intensity=float(rng.uniform(0.75, 0.95)),
        ambient=float(rng.uniform(0.36, 0.46)),
        warmth=float(rng.uniform(-0.6, 0.8)),
    )
    tables, walls = tuple(TABLES), tuple(WALLS)
    return SceneSpec(
        _place(rng, specs, camera),
        tables[rng.integers(len(tables))],
        walls[rng.integers(len(walls))],
        camera,
        light,
        float(rng.uniform(-2.4, -1.7)),
    )
