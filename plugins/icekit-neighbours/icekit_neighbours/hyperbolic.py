"""Hyperbolic geometry in the Poincare ball: the open unit ball, curvature -1, its boundary the ideal points.

Points are float ``[..., D]`` with a norm below one. How far from the centre a point is says how particular it is: space
grows exponentially with the radius, as a tree does with its depth. The formulas are written out here, and compared with
geoopt's in the tests: those are TorchScript, which may fuse anew after a few calls and then rounds otherwise, and a
resumed run must not. geoopt does the optimisation over orthonormal directions.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

LARGEST_NORM = 1 - 1e-5
"""Points are kept this far from the boundary (Nickel and Kiela, 2017)."""

COINCIDENT = 1e-4
"""Points nearer than this are one point: the direction from one to the other is noise."""


def exponential_map(tangent: Tensor) -> Tensor:
    """The point reached from the centre: exp_0(u) = tanh(|u|) u / |u|.

    Ganea et al., "Hyperbolic Neural Networks", 2018. Its distance from the centre is 2 |u|. Float ``[..., D]``, any
    finite vector; the zero vector stays the centre.
    """
    length = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True).clamp_min(1e-7)
    return tangent * (length.tanh().clamp_max(LARGEST_NORM) / length)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Geodesic distance, in radii of curvature (Nickel and Kiela, "Poincare Embeddings", 2017):

        d(x, y) = arcosh(1 + 2 |x - y|^2 / ((1 - |x|^2) (1 - |y|^2)))

    computed as 2 arsinh(|x - y| / sqrt((1 - |x|^2) (1 - |y|^2))), which is the same and exact for near points. Where
    x = y its gradient is zero. Points ``[..., D]``, broadcast; returns ``[...]``, at least zero.
    """
    room = (1 - x.square().sum(-1)) * (1 - y.square().sum(-1))
    return 2 * torch.asinh(torch.linalg.vector_norm(x - y, dim=-1) / room.sqrt())


def mobius_add(x: Tensor, y: Tensor) -> Tensor:
    """Moebius addition, x (+) y (Ganea et al., "Hyperbolic Neural Networks", 2018).

    Adding -x moves x to the centre and leaves all distances as they are. Points ``[..., D]``, broadcast; returns such.
    """
    xy, xx, yy = ((a * b).sum(-1, keepdim=True) for a, b in ((x, y), (x, x), (y, y)))
    return ((1 + 2 * xy + yy) * x + (1 - xx) * y) / (1 + 2 * xy + xx * yy)


def hyperboloid(points: Tensor) -> Tensor:
    """The same points in the Lorentz model, time first: ``[..., D]`` -> ``[..., 1 + D]``, -t^2 + |s|^2 = -1."""
    square = points.square().sum(-1, keepdim=True)
    return torch.cat([1 + square, 2 * points], dim=-1) / (1 - square)


def midpoint(points: Tensor) -> Tensor:
    """The gyromidpoint: in the Lorentz model the mean, scaled back onto the hyperboloid. ``[N, D]`` -> ``[D]``."""
    mean = hyperboloid(points).mean(dim=0)
    time, space = mean[0], mean[1:]
    length = (time.square() - space.square().sum()).sqrt()
    return space / (length + time)


# --- Towards the ideal points ----------------------------------------------------------------------------------------


def busemann(points: Tensor, directions: Tensor) -> Tensor:
    """How far points are from ideal points, the centre at zero (Chami et al., "HoroPCA", ICML 2021):

        B_p(x) = lim d(x, tp) - t = log(|p - x|^2 / (1 - |x|^2))

    All x of one value are a horosphere around p; towards p it falls to minus infinity, one for each unit of distance.

    Args:
        points: float ``[..., D]``.
        directions: the ideal points p, unit columns, ``[D, K]``.

    Returns:
        ``[..., K]``, in radii of curvature.
    """
    square = points.square().sum(-1, keepdim=True)
    return ((1 + square - 2 * points @ directions) / (1 - square)).log()


def horospherical_projection(points: Tensor, directions: Tensor) -> Tensor:
    """Onto the totally geodesic submanifold through the centre that K ideal points span (HoroPCA).

    The result has the points' own Busemann value at each of them, and so it keeps how far points are from one another
    along these directions, where a geodesic projection would shrink it. Two points of the submanifold have these
    values; the one nearer to the centre is meant. In the Lorentz model, with the coordinates t (time) and
    y_k = <s, p_k>, t - y_k = exp(B_k) =: e_k; with t^2 - |y|^2 = 1 that is a quadratic equation, and

        t = (1 + |e|^2) / (sum e + sqrt((sum e)^2 - (K - 1) (1 + |e|^2))),    y = t - e.

    For K = 1 it is the point tanh(-B / 2) p of the geodesic through the centre.

    Args:
        points: float ``[..., D]``.
        directions: the ideal points, orthonormal columns, ``[D, K]``.

    Returns:
        Coordinates in the ball of the submanifold, ``[..., K]``; ``projected @ directions.T`` is the point in the large
        one.
    """
    e = busemann(points, directions).exp()
    total, square = e.sum(-1, keepdim=True), 1 + e.square().sum(-1, keepdim=True)
    # The root of zero has no gradient; it is zero where the point lies between the ideal points, and rounds below.
    root = (total.square() - (directions.shape[1] - 1) * square).clamp_min(1e-12).sqrt()
    time = square / (total + root)
    return (time - e) / (1 + time)


def principal_directions(points: Tensor, count: int, steps: int = 100, learning_rate: float = 0.05) -> Tensor:
    """HoroPCA (Chami et al., ICML 2021): directions along which the points differ most.

        argmax over orthonormal p_1 ... p_K of sum over pairs of d(pi(x), pi(y))^2,    pi the horospherical projection

    by Riemannian Adam on the Stiefel manifold (geoopt), from the principal components in the ball on. Its authors find
    one direction after the other by gradient descent; here all are found together, which is the same objective. Nothing
    is drawn at random: equal points give equal directions.

    Args:
        points: centred ones, see ``midpoint`` and ``mobius_add``; float ``[N, D]``.
        count: K, at least 1 and at most N and D.
        steps: steps of the optimiser.
        learning_rate: its step size.

    Returns:
        float64 ``[D, K]`` on the CPU, orthonormal columns: the best that was met.

    Raises:
        ValueError: ``count`` is not within its limits.
    """
    if not 1 <= count <= min(points.shape):
        raise ValueError(f"{count} directions of {points.shape[0]} points in {points.shape[1]} dimensions")
    with warnings.catch_warnings():  # geoopt 0.5 uses torch.jit.script, and torch says so
        warnings.simplefilter("ignore")
        import geoopt  # here, because it takes a second to import

    points = points.detach().double().cpu()
    start = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False).Vh[:count].T.contiguous()
    directions = geoopt.ManifoldParameter(start, manifold=geoopt.Stiefel())
    optimizer = geoopt.optim.RiemannianAdam([directions], lr=learning_rate)
    best, largest = start, -1.0
    with torch.enable_grad():
        for _ in range(steps + 1):
            optimizer.zero_grad()
            projected = horospherical_projection(points, directions)
            spread = distance(projected.unsqueeze(0), projected.unsqueeze(1)).square().mean()
            if float(spread.detach()) > largest:
                best, largest = directions.detach().clone(), float(spread.detach())
            (-spread).backward()
            optimizer.step()
    return torch.as_tensor(best)


# --- Entailment cones ------------------------------------------------------------------------------------------------


def aperture_sine(parents: Tensor, k: float = 0.1) -> Tensor:
    """The sine of omega, half of the angle at the tip of a point's entailment cone (Ganea et al., "Hyperbolic
    Entailment Cones", ICML 2018):

        sin omega(x) = K (1 - |x|^2) / |x|

    In the Lorentz model it is 2 K / |x_space| (Desai et al., "MERU", ICML 2023). The nearer to the centre, the
    wider: general concepts contain more. Nearer than where it reaches 1, a cone is a half-space.

    Args:
        parents: float ``[..., D]``.
        k: K, above zero; both papers: 0.1.

    Returns:
        ``[...]`` in (0, 1).
    """
    length = torch.linalg.vector_norm(parents, dim=-1).clamp_min(1e-7)
    return (k * (1 - length.square()) / length).clamp_max(1 - 1e-6)


def exterior_cosine(parents: Tensor, children: Tensor) -> Tensor:
    """The cosine of theta, the angle at x between the geodesic from the centre, prolonged, and the one to y (Ganea et
    al., "Hyperbolic Entailment Cones", ICML 2018; MERU has the same angle in the Lorentz model):

        cos theta(x, y) = (<x, y> (1 + |x|^2) - |x|^2 (1 + |y|^2)) / (|x| |x - y| sqrt(1 + |x|^2 |y|^2 - 2 <x, y>))

    computed from z = y - x, which is the same and exact for near points. A child that coincides with its parent lies in
    every cone of it: 1, without a gradient.

    Args:
        parents: x, float ``[..., D]``, not the centre.
        children: y, ``[..., D]``, broadcast.

    Returns:
        ``[...]`` in [-1, 1].
    """
    z = children - parents
    far = torch.linalg.vector_norm(z, dim=-1) > COINCIDENT
    z = torch.where(far.unsqueeze(-1), z, torch.ones_like(z))  # so that no gradient is a division by zero
    xx, zz, xz = (torch.sum(a * b, dim=-1) for a, b in ((parents, parents), (z, z), (parents, z)))
    room = (1 - xx) * (1 - (parents + z).square().sum(-1)).clamp_min(0)
    cosine = (xz * (1 - xx) - xx * zz) / ((xx * zz * (zz + room)).sqrt().clamp_min(1e-12))
    return torch.where(far, cosine.clamp(-1, 1), torch.ones_like(cosine))
