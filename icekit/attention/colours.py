"""The colours of a thing: as a model of how likely each is, and as a distance between two things."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.spatial import KDTree
from scipy.special import logsumexp
from skimage.color import rgb2lab
from torch import Tensor

Array = NDArray[np.float64]

COLOUR_SAMPLES = 3000
"""At most about this many of a thing's pixels are looked at: more cost time and change nothing."""


def lab(image: Tensor) -> Array:
    """An image ``[3, H, W]`` in [0, 1] in CIELAB, float64 ``[H, W, 3]``."""
    return np.asarray(rgb2lab(image.detach().cpu().double().permute(1, 2, 0).numpy()))


def log_likelihood(pixels: Array, samples: Array, components: int) -> Array:
    """Log p(colour) under a mixture of Gaussians (diagonal covariances), its components found by k-means.

    Args:
        pixels: ``[H, W, C]``, the colours asked about.
        samples: ``[N, C]``, the colours the mixture is fitted to; at most ``COLOUR_SAMPLES`` of them are used.
        components: Gaussians at most.

    Returns:
        ``[H, W]``, nats, up to a constant that is the same for every mixture.
    """
    samples = samples[:: max(1, len(samples) // COLOUR_SAMPLES)]
    # The seed is fixed: a mask depends on nothing but the map and the image.
    components = min(components, len(np.unique(samples, axis=0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cluster is no loss: the mixture is smaller by it
        _, labels = kmeans2(samples, components, minit="++", seed=0)
    terms = []
    for label in np.unique(labels):
        cluster = samples[labels == label]
        variance = cluster.var(axis=0) + 2e-4  # (1.4 Lab units)^2: a flat surface still has noise
        squared = ((pixels - cluster.mean(axis=0)) ** 2 / variance + np.log(variance)).sum(axis=-1)
        terms.append(np.log(len(cluster) / len(samples)) - squared / 2)
    return np.asarray(logsumexp(np.stack(terms), axis=0))


def colour_distance(one: Array, other: Array) -> float:
    """How far two sets of colours lie apart: 0 where each colour of either is in the other, too.

    The mean distance from a colour to the other set's nearest, the larger one of both ways: a modified Hausdorff
    distance (Dubuisson and Jain, 1994).

    Args:
        one: ``[N, 3]`` CIELAB, N > 0; at most ``COLOUR_SAMPLES`` of them are used.
        other: ``[M, 3]``, likewise.

    Returns:
        0 or more, CIELAB's units (2 are hardly seen).
    """
    one, other = (colours[:: max(1, len(colours) // COLOUR_SAMPLES)] for colours in (one, other))
    there, back = KDTree(other).query(one)[0], KDTree(one).query(other)[0]
    return float(max(there.mean(), back.mean()))
