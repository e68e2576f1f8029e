"""Ray-marched pictures and exact masks of tabletop scenes.

Objects are sphere-traced signed distance fields; the table and the wall are analytic planes. All scenes of a batch
are rendered together: the work list is the flat list of (object, ray) pairs whose ray meets the object's bounding
sphere, so that Python loops run over shapes and march steps only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icekit_tabletop.sdf import SDFS, Sdf
from icekit_tabletop.world import (
    COLOURS,
    MATERIALS,
    MAX_OBJECTS,
    RGB,
    SHAPE_BOUNDS,
    SHAPES,
    TABLES,
    TEXTURES,
    WALLS,
    ObjectSpec,
    PlacedObject,
    SceneSpec,
    Split,
    Surface,
    sample_scene,
)

__all__ = ["Scene", "render_batch", "render_scene"]

_COLOUR_NAMES = tuple(COLOURS)
_METAL, _RUBBER, _GLASS, _WOOD, _STONE = range(len(MATERIALS))
_PLAIN, _STRIPED, _DOTTED, _CHECKERED = range(len(TEXTURES))
_CUBE, _RING, _CYLINDER, _PYRAMID, _BALL = (
    SHAPES.index(name) for name in ("cube", "ring", "cylinder", "pyramid", "ball")
)
# Shapes that can throw a shadow on themselves beyond what the surface's angle to the light already says.
_HOLLOW = frozenset(SHAPES.index(name) for name in ("ring", "cup", "bowl", "vase", "bottle"))
# Colours so light that a dark second tone shows better than a whitish one.
_LIGHT_COLOURS = frozenset(("orange", "yellow", "pink", "white"))
_PATTERNS = ("plain", "planks", "cloth", "speckle", "tiles")
# How domed the faces of each shape look in a mirror, [10, 1].
_DOME = torch.tensor([1.0 if name in ("cube", "pyramid") else 0.25 for name in SHAPES])[:, None]
_FAR = 1e9
_CHUNK = 8  # scenes rendered together: keeps temporaries in cache on a CPU


def _linear(rgb: RGB) -> list[float]:
    return [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in rgb]


def _second_tone(colour: str) -> list[float]:
    base = _linear(COLOURS[colour])
    if colour in _LIGHT_COLOURS:
        return [0.02 + 0.10 * c for c in base]
    return [0.82 + 0.1 * c for c in base]


@dataclass
class _Stage:
    """The scenes of a chunk as tensors: B scenes, M objects (sorted by shape), on one device."""

    scene: Tensor  # int64 [M], scene of each object
    slot: Tensor  # int64 [M], place of each object in its scene
    shape: Tensor  # int64 [M]
    shapes: list[int]  # the same on the host
    pos: Tensor  # [M, 3], foot point
    cos: Tensor  # [M]
    sin: Tensor  # [M]
    scale: Tensor  # [M]
    centre: Tensor  # [M, 3], bounding sphere, world
    radius: Tensor  # [M], world
    footprint: Tensor  # [M], world
    colour: Tensor  # [M, 3] linear
    tone: Tensor  # [M, 3] linear, second tone of textures
    material: Tensor  # int64 [M]
    texture: Tensor  # int64 [M]
    seed: Tensor  # [M] shifts procedural noise
    eye: Tensor  # [B, 3]
    basis: Tensor  # [B, 3, 3] rows right, up, forward
    tan: Tensor  # [B]
    light: Tensor  # [B, 3], unit vector towards the lamp
    key: Tensor  # [B, 3] lamp colour
    ambient: Tensor  # [B, 3]
    wall_z: Tensor  # [B]
    table: Tensor  # [B, 2, 3] linear tones
    table_pattern: Tensor  # int64 [B]
    wall: Tensor  # [B, 2, 3]


def _stage(scenes: Sequence[SceneSpec], device: torch.device) -> _Stage:
    rows: list[tuple[int, int, int, PlacedObject]] = sorted(
        (
            (SHAPES.index(thing.spec.shape), scene, slot, thing)
            for scene, spec in enumerate(scenes)
            for slot, thing in enumerate(spec.objects)
        ),
        key=lambda row: row[:3],
    )
    things = [row[3] for row in rows]
    bounds = [SHAPE_BOUNDS[thing.spec.shape] for thing in things]

    def real(values: list[list[float]] | list[float], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).reshape(shape)

    def whole(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    eyes, bases = [], []
    for spec in scenes:
        eye, right, up, forward = spec.camera.basis()
        eyes.append(eye.tolist())
        bases.append(np.concatenate([right, up, forward]).tolist())
    light, key, ambient = [], [], []
    for spec in scenes:
        lamp = spec.light
        ce = math.cos(lamp.elevation)
        light.append([math.sin(lamp.azimuth) * ce, math.sin(lamp.elevation), math.cos(lamp.azimuth) * ce])
        tint = [1 + 0.06 * lamp.warmth, 1.0, 1 - 0.09 * lamp.warmth]
        key.append([lamp.intensity * c for c in tint])
        ambient.append([lamp.ambient * (2 - c) for c in tint])

    def tones(surfaces: list[Surface]) -> Tensor:
        return real([_linear(s.base) + _linear(s.accent) for s in surfaces], len(scenes), 2, 3)

    tables = [TABLES[spec.table] for spec in scenes]
    m, b = len(rows), len(scenes)
    return _Stage(
        scene=whole([row[1] for row in rows]),
        slot=whole([row[2] for row in rows]),
        shape=whole([row[0] for row in rows]),
        shapes=[row[0] for row in rows],
        pos=real([[t.x, 0.0, t.z] for t in things], m, 3),
        cos=real([math.cos(t.yaw) for t in things], m),
        sin=real([math.sin(t.yaw) for t in things], m),
        scale=real([t.scale for t in things], m),
        centre=real([[t.x, e.centre * t.scale, t.z] for t, e in zip(things, bounds, strict=True)], m, 3),
        radius=real([e.radius * t.scale for t, e in zip(things, bounds, strict=True)], m),
        footprint=real([e.footprint * t.scale for t, e in zip(things, bounds, strict=True)], m),
        colour=real([_linear(COLOURS[t.spec.colour]) for t in things], m, 3),
        tone=real([_second_tone(t.spec.colour) for t in things], m, 3),
        material=whole([MATERIALS.index(t.spec.material) for t in things]),
        texture=whole([TEXTURES.index(t.spec.texture) for t in things]),
        seed=real([(t.x * 17.3 + t.z * 9.1 + t.yaw * 3.7) % 5.0 for t in things], m),
        eye=real(eyes, b, 3),
        basis=real(bases, b, 3, 3),
        tan=real([math.tan(spec.camera.fov / 2) for spec in scenes], b),
        light=real(light, b, 3),
        key=real(key, b, 3),
        ambient=real(ambient, b, 3),
        wall_z=real([spec.wall_z for spec in scenes], b),
        table=tones(tables),
        table_pattern=whole([_PATTERNS.index(s.pattern) for s in tables]),
        wall=tones([WALLS[spec.wall] for spec in scenes]),
    )


def _runs(stage: _Stage, owner: Tensor) -> Iterator[tuple[int, slice]]:
    """Contiguous runs of one shape in a list of pairs whose ``owner`` (object index) is ascending."""
    counts = torch.bincount(owner, minlength=len(stage.shapes)).tolist()
    start, total = 0, 0
    for index, count in enumerate(counts):
        total += count
        if index + 1 == len(counts) or stage.shapes[index + 1] != stage.shapes[index]:
            if total > start:
                yield stage.shapes[index], slice(start, total)
            start = total


def _to_local(stage: _Stage, owner: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn world vectors into the owners' frames (rotation only)."""
    c, s = stage.cos[owner], stage.sin[owner]
    return c * x - s * z, y, s * x + c * z


def _to_world(stage: _Stage, owner: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, s = stage.cos[owner], stage.sin[owner]
    return c * x + s * z, y, c * z - s * x


def _trace(sdf: Sdf, o: Tensor, d: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Sphere-trace N rays (``o``, ``d`` [3, N], local); returns the hit distance [N], ``_FAR`` for a miss."""
    result = torch.full_like(start, _FAR)
    index = torch.arange(start.numel(), device=start.device)
    t = start.clone()
    for rounds in (5, 5, 6, 8, 12):
        for _ in range(rounds):
            distance = sdf(o[0] + d[0] * t, o[1] + d[1] * t, o[2] + d[2] * t)
            t = t + distance
        hit = distance < 0.0015
        result[index[hit]] = t[hit]
        keep = (~hit & (t < end)).nonzero().squeeze(1)
        if keep.numel() == 0:
            return result
        index, t, end, o, d, distance = index[keep], t[keep], end[keep], o[:, keep], d[:, keep], distance[keep]
    # Grazing rays converge slowly: what is left this close counts as a hit.
    near = distance < 0.01
    result[index[near]] = t[near]
    return result


def _normal(sdf: Sdf, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit gradient of the field by differences along the corners of a tetrahedron."""
    e = 0.004
    a = sdf(x + e, y - e, z - e)
    b = sdf(x - e, y - e, z + e)
    c = sdf(x - e, y + e, z - e)
    d = sdf(x + e, y + e, z + e)
    nx, ny, nz = a - b - c + d, c + d - a - b, b + d - a - c
    inverse = torch.rsqrt(nx * nx + ny * ny + nz * nz + 1e-14)
    return nx * inverse, ny * inverse, nz * inverse


def _occlusion(sdf: Sdf, o: Tensor, d: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Soft shadow of one object on N rays towards the lamp: 1 lit .. 0 dark, [N]."""
    t = start.clone()
    light = torch.ones_like(t)
    for _ in range(14):
        distance = sdf(o[0] + d[0] * t, o[1] + d[1] * t, o[2] + d[2] * t)
        # Past the far side the factor no longer counts.
        light = torch.where(t < end, torch.minimum(light, 9.0 * distance / t), light)
        t = t + distance.clamp(0.025, 0.3)
    light = light.clamp(0.0, 1.0)
    return light * light * (3 - 2 * light)


def _hash(x: Tensor, y: Tensor, z: Tensor | float = 0.0) -> Tensor:
    """Pseudo-random value in [0, 1) of cell coordinates."""
    return torch.frac(torch.sin(x * 12.9898 + y * 78.233 + z * 37.719) * 4375.8545).abs()


def _table_colour(stage: _Stage, scene: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Linear colour [N, 3] of the table at world (x, z)."""
    pattern = stage.table_pattern[scene]
    mix = torch.zeros_like(x)
    plank = torch.floor(x / 0.42)
    grain = 0.5 + 0.5 * torch.sin(z * 2.3 + 9.0 * torch.sin(x * 31.0 + plank * 5.0 + 0.6 * torch.sin(z * 3.0)))
    seam = (torch.frac(x / 0.42).abs() - 0.5).abs() > 0.46
    planks = torch.where(seam, 1.0, 0.35 * grain + 0.4 * _hash(plank, plank * 0.37))
    cloth = 0.5 + 0.5 * torch.sin(x * 60.0) * torch.sin(z * 60.0)
    speckle = _hash(torch.floor(x * 40), torch.floor(z * 40))
    joint = torch.maximum((torch.frac(x / 0.7 + 50) - 0.5).abs(), (torch.frac(z / 0.7 + 50) - 0.5).abs())
    tiles = torch.where(joint > 0.48, 1.0, 0.15 * speckle)
    for index, value in ((1, planks), (2, cloth), (3, speckle), (4, tiles)):
        mix = torch.where(pattern == index, value, mix)
    tones = stage.table[scene]
    return torch.lerp(tones[:, 0], tones[:, 1], mix[:, None])


def _background(stage: _Stage, scene: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What N world rays (``o``, ``d`` [N, 3]) see of table and wall: albedo [N, 3], point [N, 3], on_wall [N]."""
    down = d[:, 1].clamp(max=-1e-4)
    t_table = torch.where(d[:, 1] < -1e-4, -o[:, 1] / down, _FAR)
    back = d[:, 2].clamp(max=-1e-4)
    t_wall = torch.where(d[:, 2] < -1e-4, (stage.wall_z[scene] - o[:, 2]) / back, 20.0)
    on_wall = t_wall < t_table
    t = torch.minimum(t_wall, t_table).clamp(0.0, 30.0)
    point = o + d * t[:, None]
    albedo = _table_colour(stage, scene, point[:, 0], point[:, 2])
    fade = (point[:, 1] / 3).clamp(0.0, 1.0)[:, None]
    wall = stage.wall[scene]
    # A thin dark skirting where wall and table meet.
    skirting = torch.where(point[:, 1] < 0.05, 0.55, 1.0)[:, None]
    return torch.where(on_wall[:, None], torch.lerp(wall[:, 0], wall[:, 1], fade) * skirting, albedo), point, on_wall


def _environment(stage: _Stage, scene: Tensor, d: Tensor, o: Tensor) -> Tensor:
    """Surroundings mirrored in polished things, linear [N, 3], for world directions ``d`` [N, 3] leaving ``o``."""
    dy = d[:, 1]
    light = stage.light[scene]
    # A window beside the lamp and a pale ceiling over a dark room.
    towards = (d * light).sum(1)
    window = torch.sigmoid((towards - 0.80) * 40)
    ceiling = torch.sigmoid((dy - 0.55) * 9)
    side = torch.sigmoid((-(d[:, 0] * light[:, 0]) - 0.45) * 12) * torch.sigmoid((dy + 0.05) * 20)
    # Tall lamps around the room: upright streaks in everything round, bands on flat faces.
    turn = torch.atan2(d[:, 0], d[:, 2]) - torch.atan2(light[:, 0], light[:, 2])
    upright = torch.sigmoid((torch.cos(turn * 3.0) - 0.2) * 3.5) * (1 - dy * dy)
    strips = upright * torch.sigmoid((dy + 0.12) * 14)
    room = 0.05 + 0.70 * ceiling + 1.9 * window + 0.4 * side + 0.8 * strips * (1 - ceiling)
    reach = (-o[:, 1] / dy.clamp(max=-1e-3)).clamp(0.0, 6.0)
    # The lamps also glare on the table, so upright walls, which mirror only the table, get their streaks too.
    table = stage.table[scene, 0] * ((0.2 + 0.5 * reach / (reach + 0.6)) * (0.45 + 0.8 * upright))[:, None]
    table = table + (0.42 * upright)[:, None]
    below = torch.sigmoid((-dy - 0.03) * 30)[:, None]
    return torch.lerp(room[:, None].expand(-1, 3), table, below)


def _pattern(shape: Tensor, texture: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """Share of the second tone [N] in {0, 1} at local points ``p`` with local normals ``n`` ([N, 3])."""
    x, y, z = p.unbind(1)
    ax, ay, az = n.abs().unbind(1)
    angle = torch.atan2(x, z) / (2 * math.pi)
    u, v = angle * 8, y / 0.25
    box = (shape == _CUBE) | (shape == _PYRAMID)
    sideways = ax > az
    u = torch.where(box, torch.where(sideways, z, x) / 0.25 + 0.5, u)
    top = (ay > 0.8) & ((shape == _CUBE) | (shape == _CYLINDER))
    u = torch.where(top, x / 0.25 + 0.5, u)
    v = torch.where(top, z / 0.25 + 0.5, v)
    on_ring = shape == _RING
    around = torch.atan2(x, y - 0.5) / (2 * math.pi)
    tube = torch.atan2(z, torch.hypot(x, y - 0.5) - 0.36) / (2 * math.pi)
    u = torch.where(on_ring, tube * 4, u)
    v = torch.where(on_ring, around * 10 + 20, v)
    v = v + 8.0
    u = u + 40.0
    striped = torch.frac(v) < 0.5
    row = torch.floor(v)
    du = torch.frac(u + 0.5 * torch.remainder(row, 2.0)) - 0.5
    dv = torch.frac(v) - 0.5
    dotted = du * du + dv * dv < 0.105
    checkered = torch.remainder(torch.floor(u) + row, 2.0) > 0.5
    on = ((texture == _STRIPED) & striped) | ((texture == _DOTTED) & dotted) | ((texture == _CHECKERED) & checkered)
    return on.to(torch.float32)


def _grain(p: Tensor, seed: Tensor) -> Tensor:
    """Wood: darkness of growth rings [N] in 0..1 about a tilted trunk axis."""
    x, y, z = p.unbind(1)
    wobble = 0.05 * torch.sin(y * 5.0 + seed) + 0.04 * torch.sin(z * 7.0 + y * 3.0)
    ring = torch.hypot(x + 0.55 + wobble + 0.22 * y, z * 0.9 + 0.3 + wobble) * 8.5
    saw = torch.frac(ring)
    return saw * saw


def _shade_objects(
    stage: _Stage,
    owner: Tensor,
    p: Tensor,
    local: Tensor,
    n: Tensor,
    local_n: Tensor,
    d: Tensor,
    shadow: Tensor,
    ao: Tensor,
) -> Tensor:
    """Linear colour [N, 3] of visible object points.

    ``p``/``n``/``d``: world point, normal and ray direction [N, 3]; ``local``/``local_n``: the same in the object's
    frame; ``shadow`` and ``ao``: lamp and ambient light let through, [N] in 0..1.
    """
    scene = stage.scene[owner]
    material = stage.material[owner]
    light, key, ambient = stage.light[scene], stage.key[scene], stage.ambient[scene]
    share = _pattern(stage.shape[owner], stage.texture[owner], local, local_n)
    albedo = torch.lerp(stage.colour[owner], stage.tone[owner], share[:, None])
    ndl = (n * light).sum(1)
    view = -(d * n).sum(1).clamp(max=0.0)
    fresnel = (1 - view).clamp(0.0, 1.0) ** 4
    reflected = d + 2 * view[:, None] * n
    gloss = (reflected * light).sum(1).clamp(min=0.0)
    # Polished faces are slightly domed, so that flat ones mirror more than a single direction.
    domed = (
        reflected + 0.9 * (p - stage.centre[owner]) / stage.radius[owner, None] * _DOME.to(p.device)[stage.shape[owner]]
    )
    domed = domed * torch.rsqrt((domed * domed).sum(1, keepdim=True) + 1e-9)
    hemi = (0.62 + 0.38 * n[:, 1]) * ao
    # Light thrown back from the table onto the underside.
    bounce = stage.table[scene, 0] * (0.20 * (0.5 - 0.5 * n[:, 1]) * ao)[:, None]
    lit = key * (ndl.clamp(min=0.0) * shadow)[:, None] + ambient * hemi[:, None] + bounce
    colour = torch.empty_like(albedo)

    def pick(index: int) -> Tensor:
        return (material == index).nonzero().squeeze(1)

    i = pick(_RUBBER)
    if i.numel():
        wrap = ((ndl[i] + 0.35) / 1.35).clamp(min=0.0) * (0.35 + 0.65 * shadow[i])
        soft = key[i] * (0.8 * wrap)[:, None] + ambient[i] * hemi[i, None] + bounce[i]
        base = albedo[i] * 0.72 + 0.012
        colour[i] = base * soft + (0.07 * fresnel[i] * ao[i])[:, None]
    i = pick(_WOOD)
    if i.numel():
        grain = _grain(local[i], stage.seed[owner[i]])[:, None]
        # Stained wood: the colour over a warm brown, growth rings darker.
        brown = torch.tensor([0.50, 0.27, 0.11], device=p.device)
        stained = albedo[i] * (0.66 + 0.38 * brown / 0.5) + 0.07 * brown
        base = torch.lerp(stained, stained * torch.tensor([0.30, 0.22, 0.18], device=p.device), grain)
        satin = 0.10 * gloss[i] ** 10 * shadow[i]
        colour[i] = base * lit[i] + satin[:, None]
    i = pick(_STONE)
    if i.numel():
        q = local[i] * 19.0 + stage.seed[owner[i], None]
        cell = torch.floor(q)
        speck = _hash(cell[:, 0], cell[:, 1], cell[:, 2])[:, None]
        x, y, z = (q / 19.0).unbind(1)
        cloud = torch.sin(7 * x + 2.5 * torch.sin(6 * y + z)) * torch.sin(6 * z + 2.0 * torch.sin(5 * x + y))
        vein = torch.sin(9 * y + 5 * x + 3.0 * torch.sin(5 * z + 4 * x)).abs() < 0.10
        grey = albedo[i].mean(1, keepdim=True)
        base = torch.lerp(albedo[i], 0.5 * grey + 0.12, 0.32) * (0.85 + 0.18 * cloud[:, None])
        # Specks and veins are weaker under a pattern, which has to stay readable.
        strong = torch.where(stage.texture[owner[i]] == _PLAIN, 1.0, 0.5)[:, None]
        base = torch.where(speck > 0.82, base * (1 - 0.66 * strong), base)
        base = torch.where(speck < 0.12, torch.lerp(base, base * 0.5 + 0.36, strong), base)
        base = torch.where(vein[:, None], torch.lerp(base, base * 0.5 + 0.25, strong), base)
        colour[i] = base * lit[i] * 0.95
    i = pick(_METAL)
    if i.numel():
        mirror = _environment(stage, scene[i], domed[i], p[i])
        tint = torch.lerp(albedo[i], torch.ones_like(albedo[i]), (0.7 * fresnel[i])[:, None])
        # The shaded share keeps the hue readable where the mirror looks into the dark.
        body = 0.22 * albedo[i] * lit[i]
        flash = 1.6 * gloss[i] ** 60 * shadow[i]
        shade = (0.35 + 0.65 * ao[i])[:, None]
        colour[i] = (tint * mirror * 1.1 + body) * shade + flash[:, None]
    i = pick(_GLASS)
    if i.numel():
        # Rays bend at the front; what they then meet of table and wall shows through, tinted.
        eta = 1 / 1.30
        k = (1 - eta * eta * (1 - view[i] ** 2)).clamp(min=0.0)
        bent = eta * d[i] + (eta * view[i] - torch.sqrt(k))[:, None] * n[i]
        through, _, on_wall = _background(stage, scene[i], p[i], bent)
        through = through * (ambient[i] * 0.9 + key[i] * torch.where(on_wall, 0.45, 0.75)[:, None])
        filtered = albedo[i] * 0.92 + 0.06
        thick = (0.25 + 0.75 * view[i])[:, None]
        clear = through * filtered * (0.55 + 0.55 * thick) + filtered * 0.10
        # Opaque paint for the pattern, or it would vanish in white glass.
        paint = stage.tone[owner[i]] * (lit[i] * 0.6 + 0.2)
        clear = torch.lerp(clear, paint, (0.75 * share[i])[:, None])
        edge = ((1 - view[i]).clamp(0.0, 1.0) ** 2.2)[:, None]
        # Light gathers on the side away from the lamp; the rim stays dark.
        clear = clear * (1 + 0.9 * (0.25 - ndl[i]).clamp(0.0, 1.0) * view[i])[:, None]
        clear = clear * (1 - 0.62 * edge)
        mirror = _environment(stage, scene[i], domed[i], p[i])
        weight = (0.16 + 0.70 * fresnel[i])[:, None]
        flash = 2.2 * gloss[i] ** 90
        colour[i] = clear + mirror * weight * 0.8 + flash[:, None]
    return colour


def _render_chunk(
    scenes: Sequence[SceneSpec], size: int, device: torch.device, supersample: int
) -> tuple[Tensor, Tensor]:
    stage = _stage(scenes, device)
    b, m, side = len(scenes), len(stage.shapes), size * supersample
    count = side * side
    axis = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side * 2 - 1
    plane = torch.stack(
        [axis.repeat(side), -axis.repeat_interleave(side), torch.ones(count, device=device)]
    )  # [3, P]: right, up, forward
    focal = torch.stack([stage.tan, stage.tan, torch.ones_like(stage.tan)], 1)
    rays = torch.einsum("brc,br,rp->bcp", stage.basis, focal, plane)
    rays = rays * torch.rsqrt((rays * rays).sum(1, keepdim=True))  # [B, 3, P]

    # --- what each ray sees -------------------------------------------------------------------------------------
    depth = torch.full((b * count,), _FAR, device=device)
    label = torch.full((b * count,), -1, dtype=torch.int64, device=device)
    if m:
        eye = stage.eye[stage.scene]
        offset = eye - stage.centre  # [M, 3]
        along = torch.einsum("mc,mcp->mp", offset, rays[stage.scene])
        disc = along * along - ((offset * offset).sum(1) - stage.radius**2)[:, None]
        owner, pixel = (disc > 0).nonzero(as_tuple=True)
        half = torch.sqrt(disc[owner, pixel])
        middle = -along[owner, pixel]
        scene = stage.scene[owner]
        direction = rays[scene, :, pixel]
        d = torch.stack(_to_local(stage, owner, *direction.unbind(1)))
        o_m = (eye - stage.pos) / stage.scale[:, None]
        o_local = torch.stack(_to_local(stage, torch.arange(m, device=device), *o_m.unbind(1)))
        o = o_local[:, owner]
        scale = stage.scale[owner]
        start, end = (middle - half) / scale, (middle + half) / scale
        t = torch.full_like(start, _FAR)
        for shape, run in _runs(stage, owner):
            t[run] = _trace(SDFS[SHAPES[shape]], o[:, run], d[:, run], start[run], end[run])
        t_world = t * scale
        flat = scene * count + pixel
        depth.scatter_reduce_(0, flat, t_world, "amin")
        seen = ((t < _FAR / 2) & (t_world == depth[flat])).nonzero().squeeze(1)
        owner, flat, t = owner[seen], flat[seen], t[seen]
        label[flat] = owner
        # Two objects at exactly one distance: the later one has won; keep one pair per pixel.
        only = (label[flat] == owner).nonzero().squeeze(1)
        owner, flat, t, seen = owner[only], flat[only], t[only], seen[only]
        local = o[:, seen] + d[:, seen] * t  # [3, V]
        local_n = torch.empty_like(local)
        ao = torch.empty_like(t)
        for shape, run in _runs(stage, owner):
            sdf = SDFS[SHAPES[shape]]
            x, y, z = local[:, run].unbind(0)
            n_run = _normal(sdf, x, y, z)
            local_n[:, run] = torch.stack(n_run)
            gap = sdf(x + 0.16 * n_run[0], y + 0.16 * n_run[1], z + 0.16 * n_run[2])
            ao[run] = 0.3 + 0.7 * (gap / 0.14).clamp(0.0, 1.0)
        ao = ao * (0.55 + 0.45 * (local[1] / 0.25).clamp(0.0, 1.0))  # dark towards the table
        normal = torch.stack(_to_world(stage, owner, *local_n.unbind(0)), 1)  # [V, 3]
    flat_rays = rays.permute(0, 2, 1).reshape(b * count, 3)
    colour = torch.empty(b * count, 3, device=device)
    points = torch.empty(b * count, 3, device=device)

    empty = (label < 0).nonzero().squeeze(1)
    empty_scene = empty // count
    albedo, point, on_wall = _background(stage, empty_scene, stage.eye[empty_scene], flat_rays[empty])
    points[empty] = point
    shadow = torch.ones(b * count, device=device)
    contact = torch.ones(b * count, device=device)

    # --- shadows --------------------------------------------------------------------------------------------------
    if m:
        v_scene = stage.scene[owner]
        v_rays = flat_rays[flat]
        v_points = stage.eye[v_scene] + v_rays * (t * stage.scale[owner])[:, None]
        # Start shadow rays a little off the surface.
        points[flat] = v_points + 0.015 * normal
        facing = torch.ones(b * count, dtype=torch.bool, device=device)
        facing[flat] = (normal * stage.light[v_scene]).sum(1) > 0
        where = points.reshape(b, count, 3)
        light = stage.light[stage.scene]
        lamp_along = (
            torch.einsum("bpc,bc->bp", where, stage.light)[stage.scene] - (stage.centre * light).sum(1)[:, None]
        )
        square = (where * where).sum(2)[stage.scene]
        cross = torch.bmm(where[stage.scene], stage.centre[:, :, None]).squeeze(2)
        distance2 = square - 2 * cross + (stage.centre**2).sum(1)[:, None]
        reach = stage.radius[:, None] * 1.25
        disc = lamp_along**2 - distance2 + reach**2
        far_end = torch.sqrt(disc.clamp(min=0.0)) - lamp_along
        own = label.reshape(b, count)[stage.scene] == torch.arange(m, device=device)[:, None]
        hollow = torch.tensor([s in _HOLLOW for s in stage.shapes], device=device)
        wanted = (disc > 0) & (far_end > 0) & facing.reshape(b, count)[stage.scene] & ~(own & ~hollow[:, None])
        s_owner, s_pixel = wanted.nonzero(as_tuple=True)
        if s_owner.numel():
            s_scene = stage.scene[s_owner]
            scale = stage.scale[s_owner]
            begin = -lamp_along[s_owner, s_pixel] - torch.sqrt(disc[s_owner, s_pixel])
            start = begin.clamp(min=0.0) / scale + 0.01
            end = far_end[s_owner, s_pixel] / scale
            rel = (where[s_scene, s_pixel] - stage.pos[s_owner]) / scale[:, None]
            o = torch.stack(_to_local(stage, s_owner, *rel.unbind(1)))
            d = torch.stack(_to_local(stage, s_owner, *stage.light[s_scene].unbind(1)))
            passed = torch.empty_like(start)
            for shape, run in _runs(stage, s_owner):
                passed[run] = _occlusion(SDFS[SHAPES[shape]], o[:, run], d[:, run], start[run], end[run])
            # Glass lets half of the light through.
            passed = torch.where(stage.material[s_owner] == _GLASS, 0.5 + 0.5 * passed, passed)
            shadow.scatter_reduce_(0, s_scene * count + s_pixel, passed, "amin")
        # Contact darkening of the table close to a foot.
        gap2 = (where[:, :, 0][stage.scene] - stage.pos[:, 0:1]) ** 2 + (
            where[:, :, 2][stage.scene] - stage.pos[:, 2:3]
        ) ** 2
        near = (gap2 < (stage.footprint[:, None] + 0.3) ** 2) & (label.reshape(b, count) < 0)[stage.scene]
        c_owner, c_pixel = near.nonzero(as_tuple=True)
        if c_owner.numel():
            c_scene = stage.scene[c_owner]
            rel = (where[c_scene, c_pixel] - stage.pos[c_owner]) / stage.scale[c_owner][:, None]
            o = torch.stack(_to_local(stage, c_owner, *rel.unbind(1)))
            gap = torch.empty_like(o[0])
            for shape, run in _runs(stage, c_owner):
                gap[run] = SDFS[SHAPES[shape]](*o[:, run].unbind(0))
            dark = 1 - 0.6 * torch.exp(-gap.clamp(min=0.0) / 0.09)
            contact.scatter_reduce_(0, c_scene * count + c_pixel, dark, "prod")
        colour[flat] = _shade_objects(stage, owner, v_points, local.T, normal, local_n.T, v_rays, shadow[flat], ao)

    ndl = torch.where(on_wall, stage.light[empty_scene, 2], stage.light[empty_scene, 1]).clamp(min=0.0)
    lit = stage.key[empty_scene] * (ndl * shadow[empty])[:, None] + stage.ambient[empty_scene] * 0.9
    colour[empty] = albedo * lit * contact[empty][:, None]

    # --- picture and masks ------------------------------------------------------------------------------------------
    # Bright values roll off above 0.8 instead of clipping hard.
    over = (colour - 0.8).clamp(min=0.0)
    colour = torch.minimum(colour, torch.full_like(colour, 0.8)) + 0.2 * (1 - torch.exp(-over / 0.2))
    image = colour.reshape(b, size, supersample, size, supersample, 3).mean((2, 4))
    image = torch.where(image < 0.0031308, image * 12.92, 1.055 * image.clamp(min=1e-6) ** (1 / 2.4) - 0.055)
    image = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous()
    slots = label
    if m:
        slots = torch.where(label < 0, MAX_OBJECTS, stage.slot[label.clamp(min=0)])
    else:
        slots = torch.full_like(label, MAX_OBJECTS)
    votes = torch.nn.functional.one_hot(slots.reshape(b, side, side), MAX_OBJECTS + 1)
    votes = votes.reshape(b, size, supersample, size, supersample, MAX_OBJECTS + 1).sum((2, 4))
    winner = votes.argmax(-1)  # a tie goes to the object, as its slot comes first
    masks = winner[:, None] == torch.arange(MAX_OBJECTS, device=device)[None, :, None, None]
    return image, masks


@torch.no_grad()
def render_batch(
    scenes: Sequence[SceneSpec], size: int, device: str | torch.device = "cpu", supersample: int = 2
) -> tuple[Tensor, Tensor]:
    """Render scenes together.

    Returns uint8 sRGB images ``[B, 3, size, size]`` and bool masks ``[B, 4, size, size]`` of the visible pixels of
    each object (majority of its ``supersample**2`` samples; ``False`` beyond a scene's objects), both on ``device``.
    Raises ``ValueError`` when ``size`` or ``supersample`` is not positive.
    """
    if size < 1 or supersample < 1:
        raise ValueError(f"size and supersample must be positive, not {size} and {supersample}")
    place = torch.device(device)
    if not scenes:
        return (
            torch.empty(0, 3, size, size, dtype=torch.uint8, device=place),
            torch.empty(0, MAX_OBJECTS, size, size, dtype=torch.bool, device=place),
        )
    chunk = _CHUNK if place.type == "cpu" else 64
    parts = [_render_chunk(scenes[i : i + chunk], size, place, supersample) for i in range(0, len(scenes), chunk)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    ``image`` is an RGB picture, ``masks`` one bool array ``[H, W]`` of visible pixels per object, in the order of
    ``spec.objects``.
    """

    image: Image.Image
    masks: list[np.ndarray]
    spec: SceneSpec

    @property
    def objects(self) -> list[ObjectSpec]:
        """The objects' descriptions, in the order of ``masks``."""
        return [placed.spec for placed in self.spec.objects]

    @property
    def caption(self) -> str:
        """An exact caption of the scene."""
        from icekit_tabletop.captions import describe

        return describe(self.objects)


def render_scene(
    seed: int,
    objects: list[ObjectSpec] | None = None,
    n_objects: int | None = None,
    size: int = 64,
    split: Split = "any",
) -> Scene:
    """Draw a scene from ``seed`` (see ``sample_scene``) and render it at ``size`` by ``size`` pixels on the CPU."""
    spec = sample_scene(seed, objects, n_objects, split)
    images, masks = render_batch([spec], size)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy(), "RGB")
    return Scene(picture, [masks[0, i].numpy() for i in range(len(spec.objects))], spec)
