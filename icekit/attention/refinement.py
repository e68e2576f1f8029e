"""From a soft map on a coarse attention grid to a mask whose edges follow the image.

An attention map knows roughly where an object is; the image knows where its edges are. They are joined by a random
walk that crosses no edges, with a colour model of the object and of what surrounds it as prior: Grady, "Multilabel
random walker image segmentation using prior models", CVPR 2005. scikit-image's ``random_walker`` is the variant with
hard seeds; attention maps are too noisy for seeds that can never be wrong.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.cluster.vq import kmeans2
from scipy.sparse.linalg import cg
from scipy.spatial import KDTree
from scipy.special import expit, logsumexp
from skimage.color import rgb2lab
from skimage.morphology import h_maxima
from skimage.segmentation import watershed
from torch import Tensor

Array = NDArray[np.float64]

COLOUR_SAMPLES = 3000
"""A colour model is fitted to at most about this many pixels: more cost time and change nothing."""
LOGIT_LIMIT = 3.0
"""Evidence of colour is cut off here, so that one odd pixel does not outweigh all its neighbours."""
FAINT = 0.5
"""Where a map has a maximum of this share of the level, there may be another thing."""
SOFT_FLOOR = 0.05
"""Added to both sides of a soft map's odds: 0 and 1 in it mean "surely", not "certainly"."""


def refine(
    soft: Tensor,
    image: Tensor,
    *,
    level: float = 0.42,
    foreground: float = 0.7,
    background: float = 0.2,
    colours: int = 8,
    colour_weight: float = 0.5,
    map_weight: float = 2.0,
    reach: float = 0.5,
    smoothness: float = 10.0,
    min_island: float = 0.1,
) -> Tensor:
    """A mask whose edges follow the image.

    Prior: p = sigmoid(clip(colour_weight * log(p(colour | object) / p(colour | surroundings)))
                       + map_weight * (logit soft - logit level)),
    then ``random_walker_with_prior`` and a threshold at one half. Where the map has no confident object or no confident
    surroundings to learn colours from, the mask is ``soft >= level``.

    Args:
        soft: float ``[H, W]`` in [0, 1], the map at the image's size.
        image: float32 ``[3, H, W]`` in [0, 1].
        level: the value of ``soft`` that is as likely object as not.
        foreground: colours of the object are learned where ``soft`` is this or more.
        background: colours of the surroundings are learned where ``soft`` is this or less.
        colours: components of each colour model.
        colour_weight: how much colour counts.
        map_weight: how much the map counts.
        reach: the surroundings end at this distance from the object, in units of the square root of its area.
        smoothness: how far the walk averages the prior between edges; larger is smoother.
        min_island: islands and holes below this share of the mask are removed.

    Returns:
        bool ``[H, W]``.
    """
    values = soft.detach().cpu().double().numpy()
    lab = _lab(image) / 100
    coarse = values >= level
    inside = values >= foreground
    distance = ndimage.distance_transform_edt(values <= background)
    outside = (values <= background) & (distance <= max(2.0, reach * float(np.sqrt(coarse.sum()))))
    if not coarse.any() or inside.sum() < 2 or outside.sum() < 2:
        return torch.from_numpy(coarse)
    ratio = log_likelihood(lab, lab[inside], colours) - log_likelihood(lab, lab[outside], colours)
    evidence = (colour_weight * ratio).clip(-LOGIT_LIMIT, LOGIT_LIMIT)
    prior = expit(evidence + map_weight * (_logit(values) - _logit(np.array(level))))
    mask = random_walker_with_prior(prior, lab, 1 / smoothness) >= 0.5
    return torch.from_numpy(without_islands(mask, min_island))


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


def random_walker_with_prior(prior: Array, features: Array, gamma: float) -> Array:
    """The minimiser x of  sum_ij w_ij (x_i - x_j)^2 + gamma * sum_i (x_i - p_i)^2  over 4-neighbours i, j.

    That is (L + gamma I) x = gamma p with the graph's Laplacian L and w_ij = exp(-|f_i - f_j|^2 / mean |f_i - f_j|^2):
    the probability that a walker from pixel i, who avoids edges and stops at rate gamma, stops on the object
    (Grady, CVPR 2005, with one object and p as prior).

    Args:
        prior: p, ``[H, W]`` in [0, 1].
        features: f, ``[H, W, C]``, the image.
        gamma: how often the walker stops.

    Returns:
        x, ``[H, W]`` in [0, 1].
    """
    height, width = prior.shape
    across = ((features[:, 1:] - features[:, :-1]) ** 2).sum(axis=-1)
    down = ((features[1:] - features[:-1]) ** 2).sum(axis=-1)
    squared = np.concatenate([across.ravel(), down.ravel()])
    weights = np.exp(-squared / (squared.mean() + 1e-12)) + 1e-4  # never quite zero: the graph stays connected
    pixel = np.arange(height * width).reshape(height, width)
    one = np.concatenate([pixel[:, :-1].ravel(), pixel[:-1].ravel()])
    other = np.concatenate([pixel[:, 1:].ravel(), pixel[1:].ravel()])
    neighbours = sparse.coo_matrix((weights, (one, other)), shape=(pixel.size, pixel.size)).tocsr()
    neighbours = neighbours + neighbours.T
    diagonal = np.asarray(neighbours.sum(axis=1)).ravel() + gamma
    system = (sparse.diags(diagonal) - neighbours).tocsr()
    solution, _ = cg(system, gamma * prior.ravel(), x0=prior.ravel(), rtol=1e-4, M=sparse.diags(1 / diagonal))
    return np.asarray(solution).reshape(height, width)


def without_islands(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Remove connected parts, and fill holes, with fewer pixels than ``share`` of the mask. Bool ``[H, W]`` both."""
    least = share * int(mask.sum())
    kept = _without_small_parts(mask, least)
    return ~_without_small_parts(~kept, least)


@dataclass(frozen=True)
class Joining:
    """When two peaks of a soft map are one thing's; see ``heaviest_part``.

    Attributes:
        self_attention: a, ``[n, n]`` over a square grid, row i are the weights of query i.
        image: float32 ``[3, H, W]`` in [0, 1].
        join: peaks that attend to one another this much, as a share of how much they attend to themselves, are joined;
        join_alike: this much is enough for peaks that look alike:
        alike: whose ``colour_distance`` is this or less.
    """

    self_attention: Tensor
    image: Tensor
    join: float
    join_alike: float
    alike: float


def heaviest_part(soft: Tensor, level: float, dip: float, joining: Joining | None = None) -> Tensor:
    """The basin of the soft map's heaviest peak, by the watershed of its peaks (Vincent and Soille, 1991).

    Two maxima are two peaks when every way between them goes down by ``dip`` at least from the lower one. Things that
    touch in the image are told apart so. A peak below ``level`` cannot be the heaviest, but what is nearest to it
    belongs to no other, if it is at least ``FAINT`` of the level.

    One thing may have two peaks, such as the halves of a ring: those that attend to the heaviest as to themselves, and
    it to them, are its own. A peak's places are those of its basin that reach ``level`` of its own height. With a_ij
    the mean weight that peak i's places give to peak j's in sum, how much they attend to one another is the smaller one
    of a_ij / a_jj and a_ji / a_ii.

    Args:
        soft: float ``[H, W]`` in [0, 1].
        level: a value of it. A peak weighs the sum of its basin's values from here on.
        dip: a difference of values.
        joining: which peaks are joined; None: none.

    Returns:
        bool ``[H, W]``: what belongs to that peak, or is not nearer to another; all True without a peak.
    """
    heights = soft.numpy().astype(np.float64)
    maxima = h_maxima(heights, dip).astype(bool) & (heights >= FAINT * level)
    peaks, count = ndimage.label(maxima, np.ones((3, 3)))
    if count == 0 or heights.max() < level:
        return torch.ones_like(soft, dtype=torch.bool)
    basins = watershed(-heights, peaks)
    weights = ndimage.sum_labels(heights * (heights >= level), basins, index=range(1, count + 1))
    first = int(weights.argmax())
    own = [first]
    if joining is not None:
        tops = ndimage.maximum(heights, basins, index=range(1, count + 1))
        places = np.stack([(basins == 1 + i) & (heights >= level * top) for i, top in enumerate(tops)])
        own = _joined(first, places, joining)
    return torch.from_numpy(np.isin(basins, [1 + i for i in own]))


def _joined(first: int, peaks: NDArray[np.bool_], joining: Joining) -> list[int]:
    """The peaks, ``[P, H, W]``, that belong to the first, itself among them; see ``heaviest_part``."""
    attention = joining.self_attention
    side = round(attention.shape[0] ** 0.5)
    places = F.adaptive_avg_pool2d(torch.from_numpy(peaks).float().unsqueeze(0), side)[0].flatten(1)
    given = (places @ attention @ places.T) / places.sum(dim=1, keepdim=True).clamp_min(1e-12)  # a_ij
    share = given / given.diagonal().clamp_min(1e-12)
    mutual = torch.minimum(share[first], share[:, first])
    lab = _lab(joining.image)

    def belongs(other: int) -> bool:
        if mutual[other] >= joining.join or other == first:
            return True
        enough = bool(mutual[other] >= joining.join_alike)
        return enough and colour_distance(lab[peaks[first]], lab[peaks[other]]) <= joining.alike

    return [other for other in range(len(peaks)) if belongs(other)]


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


def _lab(image: Tensor) -> Array:
    """An image ``[3, H, W]`` in [0, 1] in CIELAB, ``[H, W, 3]``."""
    return np.asarray(rgb2lab(image.detach().cpu().double().permute(1, 2, 0).numpy()))


def _without_small_parts(mask: NDArray[np.bool_], least: float) -> NDArray[np.bool_]:
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= least
    large[0] = False
    return np.asarray(large[labels])


def _logit(values: Array) -> Array:
    return np.log((values + SOFT_FLOOR) / (1 - values + SOFT_FLOOR))
