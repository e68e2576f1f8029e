"""FINCH (Sarfraz et al., CVPR 2019): clustering by first neighbours, with no number of clusters to choose.

The package finch-clust clusters under scikit-learn's metrics: symmetric KL would be a Python function, called for every
pair, half a million times on a 32 x 32 grid; and it has no limit to how far apart the clusters may be that it merges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

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


def first_neighbours(distances: Array, limit: float = np.inf) -> Labels:
    """One round: the connected components of the graph that links each row with its nearest other row (eq. 1).

    Args:
        distances: ``[n, n]``, symmetric.
        limit: a link longer than this is not made.

    Returns:
        The component of each row, int64 ``[n]``, numbered from 0 in the order of their first rows.
    """
    count = len(distances)
    if count < 2:
        return np.zeros(count, dtype=np.int64)
    others = distances + np.diag(np.full(count, np.inf))
    nearest = others.argmin(axis=1)
    rows = np.flatnonzero(others[np.arange(count), nearest] <= limit)
    links = sparse.coo_matrix((np.ones(len(rows)), (rows, nearest[rows])), shape=(count, count))
    _, labels = connected_components(links, directed=False)
    return renumbered(labels)


def finch(distributions: Array, limit: float = np.inf) -> list[Labels]:
    """The hierarchy of partitions under symmetric KL, finest first: each round links the last one's clusters' means.

    It ends when a round changes nothing, or with one cluster.

    Args:
        distributions: ``[n, m]``, each row sums to one.
        limit: clusters further apart than this are not linked, nats.

    Returns:
        Partitions, int64 ``[n]`` each, every one coarser than that before it; at least one.
    """
    partitions: list[Labels] = []
    labels = np.arange(len(distributions))
    while True:
        count = int(labels.max()) + 1
        merged = first_neighbours(symmetric_kl(means(distributions, labels)), limit)
        if merged.max() + 1 == count and partitions:
            return partitions
        labels = renumbered(merged[labels])
        partitions.append(labels)
        if labels.max() + 1 in (1, count):
            return partitions


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
