"""Signed distance fields of the ten shapes, each at scale 1 in its own frame (standing on ``y = 0``).

Every field takes three float tensors of one shape (the coordinates) and returns a tensor of that shape: negative
inside, and outside never more than the true distance (so that sphere tracing does not overshoot).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sdf = Callable[[Tensor, Tensor, Tensor], Tensor]


def _rounded_cylinder(q: Tensor, y: Tensor, radius: float, low: float, high: float, edge: float = 0.02) -> Tensor:
    """Upright cylinder with rounded edges; ``q`` is the distance from its axis."""
    dx = q - (radius - edge)
    dy = (y - (low + high) / 2).abs_() - ((high - low) / 2 - edge)
    inside = torch.maximum(dx, dy).clamp_(max=0.0)
    return inside + torch.hypot(dx.clamp(min=0.0), dy.clamp(min=0.0)) - edge


def ball(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Sphere of radius 0.5."""
    return torch.sqrt(x * x + (y - 0.5) ** 2 + z * z) - 0.5


def cube(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Cube of edge 0.84, edges rounded by 0.03."""
    dx, dy, dz = x.abs() - 0.39, (y - 0.42).abs() - 0.39, z.abs() - 0.39
    inside = torch.maximum(torch.maximum(dx, dy), dz).clamp(max=0.0)
    cx, cy, cz = dx.clamp(min=0.0), dy.clamp(min=0.0), dz.clamp(min=0.0)
    return inside + torch.sqrt(cx * cx + cy * cy + cz * cz) - 0.03


def cylinder(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Upright cylinder of radius 0.36 and height 0.95."""
    return _rounded_cylinder(torch.hypot(x, z), y, 0.36, 0.0, 0.95)


def cone(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Cone of base radius 0.46 and height 1.05."""
    length = math.hypot(0.46, 1.05)
    slant = torch.hypot(x, z) * (1.05 / length) + (y - 1.05) * (0.46 / length)
    return torch.maximum(slant, -y)


def ring(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Torus standing on edge, its axis along ``z``: radius 0.36, thickness 0.28."""
    return torch.hypot(torch.hypot(x, y - 0.5) - 0.36, z) - 0.14


def cup(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Open mug with a handle at ``+x``."""
    q = torch.hypot(x + 0.12, z)
    hollow = torch.maximum(q - 0.315, 0.07 - y)
    body = torch.maximum(_rounded_cylinder(q, y, 0.37, 0.0, 0.8), -hollow)
    handle = torch.hypot(torch.hypot(x - 0.27, (y - 0.4) * 0.95) - 0.2, z) - 0.055
    return torch.minimum(body, torch.maximum(handle, 0.34 - q))


def bowl(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Open hemisphere on a small foot."""
    horizontal = x * x + z * z
    shell = (torch.sqrt(horizontal + (y - 0.56) ** 2) - 0.525).abs() - 0.03
    foot = _rounded_cylinder(torch.sqrt(horizontal), y, 0.22, 0.0, 0.08)
    return torch.minimum(torch.maximum(shell, y - 0.5), foot)


def bottle(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Slim body, sloping shoulders, narrow neck with a lip."""
    q = torch.hypot(x, z)
    body = _rounded_cylinder(q, y, 0.27, 0.0, 0.66, 0.04)
    neck = _rounded_cylinder(q, y, 0.095, 0.5, 1.2)
    blend = 0.16
    h = (blend - (body - neck).abs()).clamp(min=0.0) / blend
    lip = _rounded_cylinder(q, y, 0.13, 1.1, 1.2)
    return torch.minimum(torch.minimum(body, neck) - h * h * (blend / 4), lip)


def vase(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Narrow foot, wide belly, narrow neck and a flared, open lip."""
    q = torch.hypot(x, z)
    lip = ((y - 0.8) / 0.3).clamp(0.0, 1.0)
    profile = 0.14 + 0.26 * torch.exp(-(((y - 0.42) / 0.235) ** 2)) + 0.15 * lip * lip
    side = q - profile
    hollow = torch.maximum(side + 0.05, 0.75 - y)
    # The profile's slope stays below 1.0, so 0.7 makes the radial gap a safe step.
    return torch.maximum(torch.maximum(side, -hollow) * 0.7, (y - 0.55).abs() - 0.55)


def pyramid(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Square pyramid of base edge 0.92 and height 0.95."""
    length = math.hypot(0.46, 0.95)
    slant = torch.maximum(x.abs(), z.abs()) * (0.95 / length) + (y - 0.95) * (0.46 / length)
    return torch.maximum(slant, -y)


SDFS: dict[str, Sdf] = {
    "ball": ball,
    "cube": cube,
    "cylinder": cylinder,
    "cone": cone,
    "ring": ring,
    "cup": cup,
    "bowl": bowl,
    "bottle": bottle,
    "vase": vase,
    "pyramid": pyramid,
}
