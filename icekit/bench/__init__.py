"""``icekit bench``: measure combinations of components on a data set."""

from icekit.bench.benchmark import Progress, bench

__all__ = ["Progress", "bench"]
