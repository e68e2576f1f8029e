"""The geometry of the Poincare ball: by hand, against geoopt, and against the same in the Lorentz model."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from icekit_neighbours.hyperbolic import (
    aperture_sine,
    busemann,
    distance,
    exponential_map,
    exterior_cosine,
    horospherical_projection,
    hyperboloid,
    midpoint,
    mobius_add,
    principal_directions,
)
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geoopt

BALL = geoopt.PoincareBall()


def points(count: int, dimensions: int = 5, seed: int = 0, size: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return exponential_map(size * torch.randn(count, dimensions, generator=generator, dtype=torch.float64))


def orthonormal(dimensions: int, count: int) -> Tensor:
    matrix = torch.randn(dimensions, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0]


def lorentz(x: Tensor, y: Tensor) -> Tensor:
    """The Lorentz product, time first."""
    return -x[..., 0] * y[..., 0] + (x[..., 1:] * y[..., 1:]).sum(-1)


# --- Points and distances --------------------------------------------------------------------------------------------


def test_distance_by_hand() -> None:
    x, y = torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.5])
    # arcosh(1 + 2 * 0.5 / (0.75 * 0.75)) = arcosh(2.7778)
    assert float(distance(x, y)) == pytest.approx(math.acosh(1 + 1 / 0.5625), rel=1e-6)
    assert float(distance(torch.zeros(2), x)) == pytest.approx(math.log(3), rel=1e-6)  # 2 artanh(1 / 2)


def test_distance_against_geoopt() -> None:
    x, y = points(6), points(6, seed=1)
    torch.testing.assert_close(distance(x, y), BALL.dist(x, y))
    torch.testing.assert_close(distance(x, y), torch.acosh(-lorentz(hyperboloid(x), hyperboloid(y))))


def test_distance_of_a_point_to_itself_has_no_gradient() -> None:
    x = points(1).requires_grad_()
    distance(x, x.detach()).sum().backward()
    assert x.grad is not None and not x.grad.any()


def test_exponential_map_goes_twice_as_far_as_the_vector_is_long() -> None:
    vector = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    assert exponential_map(vector)[0].tolist() == pytest.approx([0.6 * math.tanh(0.5), 0.8 * math.tanh(0.5)])
    assert float(distance(exponential_map(vector), torch.zeros(2))) == pytest.approx(1.0)
    torch.testing.assert_close(exponential_map(vector), BALL.expmap0(vector))


def test_exponential_map_stays_inside_and_has_a_centre() -> None:
    far = exponential_map(torch.tensor([[300.0, 400.0]]))
    assert float(far.norm()) < 1 and bool(distance(far, -far).isfinite().all())
    zero = torch.zeros(1, 2, requires_grad=True)
    point = exponential_map(zero)
    point.sum().backward()
    assert point.tolist() == [[0, 0]] and zero.grad is not None and zero.grad.tolist() == [[1, 1]]


def test_mobius_addition_moves_and_keeps_distances() -> None:
    x, y, z = points(4), points(4, seed=1), points(4, seed=2)
    torch.testing.assert_close(mobius_add(x, y), BALL.mobius_add(x, y))
    torch.testing.assert_close(mobius_add(-x, x), torch.zeros_like(x))
    torch.testing.assert_close(distance(mobius_add(-x, y), mobius_add(-x, z)), distance(y, z))


def test_the_hyperboloid_by_hand() -> None:
    assert hyperboloid(torch.tensor([0.5, 0.0])).tolist() == pytest.approx([5 / 3, 4 / 3, 0.0])
    torch.testing.assert_close(lorentz(hyperboloid(points(3)), hyperboloid(points(3))), -torch.ones(3).double())


def test_midpoint() -> None:
    two = torch.tensor([[0.0, 0.0], [0.8, 0.0]], dtype=torch.float64)
    assert midpoint(two).tolist() == pytest.approx([math.tanh(math.atanh(0.8) / 2), 0.0])
    torch.testing.assert_close(midpoint(points(7)), BALL.weighted_midpoint(points(7)))


# --- Towards the ideal points ----------------------------------------------------------------------------------------


def test_busemann_by_hand() -> None:
    direction = torch.tensor([[1.0], [0.0]])
    # log((0.25 + 0.25) / 0.5) = 0: on the horosphere through the centre
    assert float(busemann(torch.tensor([0.5, 0.5]), direction)) == pytest.approx(0.0, abs=1e-6)
    assert float(busemann(torch.tensor([0.5, 0.0]), direction)) == pytest.approx(-math.log(3), rel=1e-6)
    assert float(busemann(torch.tensor([-0.5, 0.0]), direction)) == pytest.approx(math.log(3), rel=1e-6)


def test_busemann_is_the_limit_of_distances() -> None:
    x, directions = points(5), orthonormal(5, 2)
    far = math.tanh(8) * directions.T  # a distance of 16 from the centre
    torch.testing.assert_close(busemann(x, directions), distance(x.unsqueeze(1), far) - 16, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_horospherical_projection_keeps_the_busemann_values(count: int) -> None:
    x, directions = points(20), orthonormal(5, count)
    projected = horospherical_projection(x, directions)
    assert bool((projected.norm(dim=-1) < 1).all())
    torch.testing.assert_close(busemann(projected @ directions.T, directions), busemann(x, directions))
    # What lies in the submanifold already, on the centre's side of the ideal points, stays.
    torch.testing.assert_close(horospherical_projection(projected @ directions.T, directions), projected)


def test_horospherical_projection_onto_a_geodesic_by_hand() -> None:
    direction = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    x = torch.tensor([[0.2, 0.6]], dtype=torch.float64)
    value = math.log((0.8**2 + 0.6**2) / (1 - 0.4))
    assert horospherical_projection(x, direction)[0].tolist() == pytest.approx([math.tanh(-value / 2)])


def test_horospherical_projection_keeps_distances_along_the_directions() -> None:
    """Two points of one geodesic to the ideal point, far from the target, are as far apart as before; geodesic
    projection would shrink them.
    """
    direction = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    # In the upper half-plane with the ideal point at infinity, geodesics to it are vertical: (1, 1) and (1, e).
    plane = [complex(2, 1), complex(2, math.e)]
    ball = [(z - 1j) / (z + 1j) for z in plane]  # infinity becomes 1
    x = torch.tensor([[z.real, z.imag] for z in ball], dtype=torch.float64)
    assert float(distance(x[0], x[1])) == pytest.approx(1)
    projected = horospherical_projection(x, direction)
    assert float(distance(projected[0], projected[1])) == pytest.approx(1)


def test_principal_directions_find_where_points_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.05, 0.6, 0.05, 0.3, 0.05])
    x = exponential_map(spread * torch.randn(40, 5, generator=generator))
    x = mobius_add(-midpoint(x), x)
    found = principal_directions(x, 2)
    torch.testing.assert_close(found.T @ found, torch.eye(2, dtype=torch.float64))
    assert float(found[[1, 3]].square().sum()) > 1.9  # of 2: the second and the fourth coordinate
    assert torch.equal(found, principal_directions(x, 2))

    def variance(directions: Tensor) -> float:
        projected = horospherical_projection(x.double(), directions)
        return float(distance(projected.unsqueeze(0), projected.unsqueeze(1)).square().mean())

    start = torch.linalg.svd(x.double() - x.double().mean(dim=0)).Vh[:2].T
    assert variance(found) >= variance(start)
    assert variance(found) > max(variance(orthonormal(5, 2)), variance(torch.eye(5).double()[:, [0, 2]]))


def test_principal_directions_refuse_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="4 directions of 3 points in 5 dimensions"):
        principal_directions(points(3), 4)


# --- Entailment cones ------------------------------------------------------------------------------------------------


def test_the_aperture_by_hand_and_in_the_lorentz_model() -> None:
    assert float(aperture_sine(torch.tensor([0.5, 0.0]))) == pytest.approx(0.1 * 0.75 / 0.5)
    assert float(aperture_sine(torch.tensor([0.01, 0.0]))) == pytest.approx(1, abs=1e-5)  # a half-space
    x = points(6)
    torch.testing.assert_close(aperture_sine(x, 0.05), 2 * 0.05 / hyperboloid(x)[:, 1:].norm(dim=-1))


def test_the_exterior_angle_by_hand() -> None:
    x = torch.tensor([0.5, 0.0], dtype=torch.float64)
    ahead, behind = x.new_tensor([0.9, 0.0]), x.new_tensor([-0.3, 0.0])
    assert float(exterior_cosine(x, ahead)) == pytest.approx(1)
    assert float(exterior_cosine(x, behind)) == pytest.approx(-1)
    # Moved to the centre, x is met by geodesics that are straight: the angle is the one of a Euclidean vector.
    aside = x.new_tensor([0.4, 0.3])
    moved = mobius_add(-x, aside)
    assert float(exterior_cosine(x, aside)) == pytest.approx(float(moved[0] / moved.norm()))


def test_the_exterior_angle_in_the_lorentz_model() -> None:
    x, y = points(8), points(8, seed=1)
    a, b = hyperboloid(x), hyperboloid(y)
    product = lorentz(a, b)
    expected = (b[:, 0] + a[:, 0] * product) / (a[:, 1:].norm(dim=-1) * (product.square() - 1).sqrt())
    torch.testing.assert_close(exterior_cosine(x, y), expected)


def test_a_child_in_its_parents_place_is_inside_and_pulls_nothing() -> None:
    x = points(2).requires_grad_()
    y = x.detach().clone().requires_grad_()
    cosine = exterior_cosine(x, y)
    cosine.sum().backward()
    assert cosine.tolist() == [1, 1]
    assert x.grad is not None and y.grad is not None and not x.grad.any() and not y.grad.any()


def test_the_exterior_angle_of_near_points_in_single_precision() -> None:
    x = points(50, 128, size=0.02)
    y = mobius_add(x, points(50, 128, seed=3, size=1e-4))
    torch.testing.assert_close(exterior_cosine(x.float(), y.float()).double(), exterior_cosine(x, y), atol=1e-3, rtol=0)
