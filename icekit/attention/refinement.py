"""From a soft map on a coarse attention grid to a mask whose edges follow the image.

An attention map knows roughly where an object is; the image knows where its edges are. They are joined by a random
walk that crosses no edges, with a colour model of the object and of what surrounds it as prior: Grady, "Multilabel
random walker image segmentation using prior models", CVPR 2005. scikit-image's ``random_walker`` is the variant with
hard seeds; attention maps are too noisy for seeds that can never be wrong.
"""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg
from scipy.special import expit
from skimage.morphology import remove_small_holes, remove_small_objects
from torch import Tensor

from icekit.attention.colours import Array, lab, log_likelihood

LOGIT_LIMIT = 3.0
"""Evidence of colour is cut off here, so that one odd pixel does not outweigh all its neighbours."""
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
    seen = lab(image) / 100
    coarse = values >= level
    inside = values >= foreground
    distance = ndimage.distance_transform_edt(values <= background)
    outside = (values <= background) & (distance <= max(2.0, reach * float(np.sqrt(coarse.sum()))))
    if not coarse.any() or inside.sum() < 2 or outside.sum() < 2:
        return torch.from_numpy(coarse)
    ratio = log_likelihood(seen, seen[inside], colours) - log_likelihood(seen, seen[outside], colours)
    evidence = (colour_weight * ratio).clip(-LOGIT_LIMIT, LOGIT_LIMIT)
    prior = expit(evidence + map_weight * (_logit(values) - _logit(np.array(level))))
    mask = random_walker_with_prior(prior, seen, 1 / smoothness) >= 0.5
    return without_islands(torch.from_numpy(mask), min_island)


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


def without_islands(mask: Tensor, share: float) -> Tensor:
    """Remove connected parts, and fill holes, with fewer pixels than ``share`` of the mask. Bool ``[H, W]`` both."""
    most = max(0, ceil(share * int(mask.sum())) - 1)
    kept = remove_small_objects(mask.numpy(), max_size=most)
    return torch.from_numpy(remove_small_holes(kept, max_size=most))


def _logit(values: Array) -> Array:
    return np.log((values + SOFT_FLOOR) / (1 - values + SOFT_FLOOR))
