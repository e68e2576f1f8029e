"""The Wasserstein distance against values worked by hand, a linear programme and finite differences."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance as wasserstein_1d

from icekit.learning.wasserstein import ground_cost, wasserstein_distance


def point(side: int, *cells: tuple[int, int, float]) -> torch.Tensor:
    grid = torch.zeros(1, side, side)
    for row, column, weight in cells:
        grid[0, row, column] = weight
    return grid


def by_linear_programme(a: torch.Tensor, m: torch.Tensor) -> float:
    n = a.numel()
    rows, columns = np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))
    marginals = np.concatenate([(a / a.sum()).flatten().numpy(), (m / m.sum()).flatten().numpy()])
    result = linprog(ground_cost(*a.shape).ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals)
    assert result.success
    return float(result.fun)


def test_two_points_are_their_distance_apart() -> None:
    distance = wasserstein_distance(point(8, (0, 0, 1.0)), point(8, (3, 4, 1.0)))
    assert distance.item() == pytest.approx(5.0)


def test_half_of_the_mass_moves() -> None:
    # Half stays, half goes from (0, 0) to (0, 6); both sides are normalised first.
    attention = point(8, (0, 0, 10.0))
    mask = point(8, (0, 0, 1.0), (0, 6, 1.0))
    assert wasserstein_distance(mask, attention).item() == pytest.approx(3.0)


def test_equal_maps_are_at_distance_zero() -> None:
    grid = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wasserstein_distance(grid, 7 * grid), torch.zeros(3), atol=1e-5, rtol=0)


def test_against_a_linear_programme_and_batched() -> None:
    generator = torch.Generator().manual_seed(1)
    attention = torch.rand(3, 4, 6, generator=generator, dtype=torch.float64)
    mask = (torch.rand(3, 4, 6, generator=generator, dtype=torch.float64) - 0.5).clamp(min=0)
    expected = [by_linear_programme(a, m) for a, m in zip(attention, mask, strict=True)]
    torch.testing.assert_close(wasserstein_distance(mask, attention), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_on_a_line_against_scipy() -> None:
    generator = torch.Generator().manual_seed(2)
    attention, mask = torch.zeros(1, 12, 12), torch.zeros(1, 12, 12)
    attention[0, 4], mask[0, 4] = torch.rand(12, generator=generator), torch.rand(12, generator=generator)
    expected = wasserstein_1d(np.arange(12), np.arange(12), attention[0, 4].numpy(), mask[0, 4].numpy())
    assert wasserstein_distance(mask, attention).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    attention = torch.rand(1, 6, 6, generator=generator) + 0.2
    attention /= attention.sum()
    mask = point(6, (1, 1, 1.0), (1, 2, 0.7), (4, 4, 0.2))
    attention.requires_grad_()
    (gradient,) = torch.autograd.grad(wasserstein_distance(mask, attention).sum(), attention)
    for _ in range(5):
        direction = torch.randn(1, 6, 6, generator=generator)
        direction -= direction.mean()  # the sum stays one
        h = 1e-4
        ahead, back = (
            by_linear_programme((attention.detach() + sign * h * direction)[0].double(), mask[0].double())
            for sign in (1, -1)
        )
        assert (gradient * direction).sum().item() == pytest.approx((ahead - back) / (2 * h), rel=2e-2, abs=1e-3)


def test_gradient_of_the_normalisation_keeps_the_sum() -> None:
    attention = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    wasserstein_distance(point(6, (2, 2, 1.0)), attention).sum().backward()
    assert attention.grad is not None
    assert (attention.grad * attention).sum().item() == pytest.approx(0.0, abs=1e-5)  # scaling changes nothing


def test_cells_without_attention_have_the_potential_as_gradient() -> None:
    # All mass lies on the mask's one cell: moving mass to a cell would cost its distance to it.
    attention = point(5, (0, 0, 1.0)).requires_grad_()
    wasserstein_distance(point(5, (0, 0, 1.0)), attention).sum().backward()
    assert attention.grad is not None
    torch.testing.assert_close(attention.grad.flatten(), torch.from_numpy(ground_cost(5, 5)[0]).float())


def test_gradient_descent_brings_attention_onto_the_mask() -> None:
    logits = torch.zeros(2, 36, requires_grad=True)
    mask = torch.cat([point(6, (1, 1, 1.0), (1, 2, 1.0)), point(6, (5, 0, 1.0))])
    optimizer = torch.optim.Adam([logits], lr=0.2)
    distances = []
    for _ in range(60):
        distance = wasserstein_distance(mask, logits.softmax(-1).view(2, 6, 6))
        optimizer.zero_grad()
        distance.sum().backward()
        optimizer.step()
        distances.append(distance.detach())
    assert (distances[-1] < 0.2 * distances[0]).all()


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="mask 1 of the batch is empty"):
        wasserstein_distance(torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]), torch.ones(2, 4, 4))


def test_broken_attention_gives_nan_not_a_crash() -> None:
    attention = torch.ones(3, 4, 4)
    attention[0, 0, 0] = torch.nan
    attention[1] = 0
    assert wasserstein_distance(torch.ones(3, 4, 4), attention).isnan().tolist() == [True, True, False]
