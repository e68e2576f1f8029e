"""FINCH by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from icekit_neighbours.finch import (
    clusters_touching,
    finch,
    first_neighbours,
    grid_touching,
    longest_link,
    means,
    renumbered,
    symmetric_kl,
)
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


def test_only_what_touches_is_linked() -> None:
    """A grid of 3 x 3 whose left and right columns are alike and whose middle is not: two clusters become three."""
    a, b = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    rows = np.array([a, b, a] * 3)
    assert finch(rows)[0].tolist() == [0, 1, 0] * 3
    touching = grid_touching((3, 3))
    assert touching.toarray()[4].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]  # the middle has four neighbours
    assert touching.toarray()[0].tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0]
    wide = grid_touching((2, 3)).toarray()
    assert wide[1].tolist() == [1, 0, 1, 0, 1, 0] and wide[3].tolist() == [1, 0, 0, 0, 1, 0]
    apart = finch(rows, touching=touching)[0]
    assert apart.tolist() == [0, 1, 2] * 3
    assert clusters_touching(touching, apart).tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert finch(rows, touching=touching)[-1].max() == 0  # at last neighbours are linked, however far apart
    assert finch(rows, 0.5, touching)[-1].tolist() == [0, 1, 2] * 3


def test_a_row_that_touches_none_stays_alone() -> None:
    distances = np.abs(np.subtract.outer([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]))
    touching = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=np.bool_)
    assert first_neighbours(distances, touching=touching).tolist() == [0, 0, 1]


def test_the_longest_link_by_hand() -> None:
    # As above: 0.137326 between the first two; the third is the second's twin.
    rows = np.array([[0.5, 0.5], [0.75, 0.25], [0.75, 0.25]])
    assert longest_link(rows) == pytest.approx((0.143841 + 0.130812) / 2, abs=1e-6)
    assert longest_link(rows[1:]) == pytest.approx(0, abs=1e-9)
    assert longest_link(rows[:1]) == 0
