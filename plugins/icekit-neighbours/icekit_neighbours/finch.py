"""FINCH (Sarfraz et al., CVPR 2019): clustering by first neighbours, with no number of clusters to choose.

The package finch-clust clusters under scikit-learn's metrics: symmetric KL would be a Python function, called for every
pair, half a million times on a 32 x 32 grid; and it knows no adjacency.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from icekit.protocols import Grid

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]

FLOOR = 1e-8
"""Least probability in a divergence: attention underflows to zero far away, and the log of zero is no distance."""


def symmetric_kl(distributions: Array) -> Array:
    """(KL(p || q) + KL(q || p)) / 2 of every pair of rows, nats: ``[n, m]``, rows summing to one -> ``[n, n]``."""
    p = distributions.clip(FLOOR)
    p = p / p.sum(axis=1, keepdims=True)
    log = np.log(p)
    crossed = p @ log.T  # sum p_i log q_j
    own = np.diag(crossed)
    divergence = own[:, None] - crossed
    return np.maximum((divergence + divergence.T) / 2, 0.0)


def nearest_others(distances: Array, touching: Mask | None = None) -> tuple[Labels, Array]:
    """Each row's nearest other row, among those that it touches, and how far it is.

    Args:
        distances: ``[n, n]``, symmetric.
        touching: bool ``[n, n]``; all touch if None.

    Returns:
        int64 and float64 ``[n]``; a row that touches none is infinitely far from whichever is named.
    """
    allowed = ~np.eye(len(distances), dtype=np.bool_)
    others = np.where(allowed if touching is None else allowed & touching, distances, np.inf)
    nearest = others.argmin(axis=1)
    return nearest, others[np.arange(len(others)), nearest]


def first_neighbours(distances: Array, limit: float = np.inf, touching: Mask | None = None) -> Labels:
    """One round: the connected components of the graph that links each row with its nearest other row (eq. 1).

    Args:
        distances: ``[n, n]``, symmetric.
        limit: a link longer than this is not made.
        touching: bool ``[n, n]``, which rows may be linked; all if None.

    Returns:
        The component of each row, int64 ``[n]``, numbered from 0 in the order of their first rows.
    """
    count = len(distances)
    if count < 2:
        return np.zeros(count, dtype=np.int64)
    nearest, far = nearest_others(distances, touching)
    rows = np.flatnonzero((far <= limit) & np.isfinite(far))
    links = sparse.coo_matrix((np.ones(len(rows)), (rows, nearest[rows])), shape=(count, count))
    _, labels = connected_components(links, directed=False)
    return renumbered(labels)


def longest_link(distributions: Array, touching: sparse.spmatrix | None = None) -> float:
    """How far apart the first round's links may be, nats: the longest of them. 0 where there is none.

    It is FINCH's own adaptive limit: with it no later round links what is further apart.

    Args:
        distributions: ``[n, m]``, each row sums to one.
        touching: ``[n, n]``, nonzero where rows may be linked; all if None.
    """
    _, far = nearest_others(symmetric_kl(distributions), None if touching is None else touching.toarray() > 0)
    return float(far[np.isfinite(far)].max(initial=0.0))


def finch(distributions: Array, limit: float = np.inf, touching: sparse.spmatrix | None = None) -> list[Labels]:
    """The hierarchy of partitions under symmetric KL, finest first: each round links the last one's clusters' means.

    It ends when a round changes nothing, or with one cluster.

    Args:
        distributions: ``[n, m]``, each row sums to one.
        limit: clusters further apart than this are not linked, nats.
        touching: ``[n, n]``, nonzero where rows are neighbours: clusters are linked only if a row of the one touches
            one of the other. None: any may be.

    Returns:
        Partitions, int64 ``[n]`` each, every one coarser than that before it; at least one.
    """
    partitions: list[Labels] = []
    labels = np.arange(len(distributions))
    while True:
        count = int(labels.max()) + 1
        may = None if touching is None else clusters_touching(touching, labels)
        merged = first_neighbours(symmetric_kl(means(distributions, labels)), limit, may)
        if merged.max() + 1 == count and partitions:
            return partitions
        labels = renumbered(merged[labels])
        partitions.append(labels)
        if labels.max() + 1 in (1, count):
            return partitions


def grid_touching(grid: Grid) -> sparse.spmatrix:
    """Which cells of a grid (h, w) share an edge: ``[h * w, h * w]``, cells row by row."""
    (down, same_row), (across, same_column) = (
        (sparse.diags([np.ones(side - 1), np.ones(side - 1)], [-1, 1]), sparse.identity(side)) for side in grid
    )
    return sparse.csr_matrix(sparse.kron(down, same_column) + sparse.kron(same_row, across))


def clusters_touching(touching: sparse.spmatrix, labels: Labels) -> Mask:
    """Which clusters have members that touch: ``[n, n]`` and ``[n]`` -> bool ``[clusters, clusters]``."""
    count = int(labels.max()) + 1
    members = sparse.coo_matrix((np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(count, len(labels)))
    return np.asarray((members @ touching @ members.T).toarray() > 0)


def means(distributions: Array, labels: Labels) -> Array:
    """Each cluster's mean row: ``[n, m]`` and ``[n]`` -> ``[clusters, m]``."""
    count = int(labels.max()) + 1
    members = sparse.coo_matrix((np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(count, len(labels)))
    return np.asarray(members @ distributions) / np.bincount(labels, minlength=count)[:, None]


def renumbered(labels: NDArray[np.integer]) -> Labels:
    """The same partition with its labels from 0 on, in the order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
