"""FINCH by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from icekit_neighbours.finch import finch, first_neighbours, means, renumbered, symmetric_kl
from scipy.stats import entropy


def test_symmetric_kl_by_hand() -> None:
    # KL(p|q) = 0.5 ln(2/3) + 0.5 ln 2 = 0.143841, KL(q|p) = 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812
    divergence = symmetric_kl(np.array([[0.5, 0.5], [0.75, 0.25]]))
    assert divergence[0, 1] == pytest.approx((0.143841 + 0.130812) / 2, abs=1e-6)
    assert divergence[1, 0] == divergence[0, 1]
    assert np.diag(divergence) == pytest.approx([0, 0], abs=1e-12)


def test_symmetric_kl_against_scipy() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(6), size=4)
    expected = [[(entropy(a, b) + entropy(b, a)) / 2 for b in p] for a in p]
    assert symmetric_kl(p) == pytest.approx(np.array(expected), abs=1e-6)


def test_attention_of_zero_is_no_infinite_distance() -> None:
    assert np.isfinite(symmetric_kl(np.array([[1.0, 0.0], [0.0, 1.0]]))).all()


def test_first_neighbours_are_linked() -> None:
    places = np.array([0.0, 1.0, 10.0, 11.0, 30.0])
    distances = np.abs(places[:, None] - places[None, :])
    assert first_neighbours(distances).tolist() == [0, 0, 1, 1, 1]  # 30 is nearest to 11
    assert first_neighbours(distances, limit=5).tolist() == [0, 0, 1, 1, 2]
    assert first_neighbours(np.zeros((1, 1))).tolist() == [0]


def test_rounds_link_the_means_of_clusters() -> None:
    """Five sorts of rows, in three families: first the sorts are found, then the families, then all are one."""

    def row(*weights: float) -> list[float]:
        return [weight / sum(weights) for weight in weights]

    sorts = [row(8, 1, 1), row(7, 2, 1), row(1, 8, 1), row(1, 7, 2), row(1, 1, 8), row(2, 1, 7)]
    rows = np.array([each for each in sorts for _ in range(3)])
    fine, coarse, *_ = finch(rows)
    assert fine.tolist() == np.repeat(range(6), 3).tolist()
    assert coarse.tolist() == np.repeat(range(3), 6).tolist()
    # The families are 1.09 nats apart and more, sorts of one family 0.04 and less.
    assert finch(rows, limit=0.5)[-1].tolist() == coarse.tolist()
    assert finch(rows, limit=1e-3)[-1].tolist() == fine.tolist()


def test_means_and_numbers() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert means(rows, np.array([0, 1, 0])).tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert renumbered(np.array([5, 2, 5, 9])).tolist() == [0, 1, 0, 2]
