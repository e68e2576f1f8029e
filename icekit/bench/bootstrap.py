"""How sure a mean is: the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` images, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate | None:
    """The mean and its 95 % percentile bootstrap interval (Efron, 1979): images are drawn anew, with replacement.

    Args:
        values: one per image.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        None when there are no values.
    """
    from scipy import stats

    if not values:
        return None
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) == 1:  # every draw is the same
        return Estimate(mean, mean, mean, 1)
    interval = stats.bootstrap(
        (sample,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(sample))
