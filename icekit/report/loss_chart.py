"""The loss curves of a run: its log, laid out as small line charts of fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from icekit.run.log import LogLine

WIDTH, HEIGHT = 340, 176
"""Size of a chart, in SVG units (about CSS pixels)."""
LEFT, RIGHT, TOP, BOTTOM = 46, 324, 22, 152
"""The plot's rectangle within the chart."""
MAX_POINTS = 240
"""Points of one line; a longer log is thinned out."""
MAX_BANDS = 12
"""With more changes of phase than this (phases that alternate, say) the bands would say nothing: they are left out."""
MEANINGS = {
    "reconstruction": "how far the model's prediction is from the truth; it depends on how noisy a step's picture is, "
    "so single steps jump",
    "attention": "how far each token's attention is from its mask",
    "triplet": "0 when every token is nearer to the words of its kind than to others, by the margin",
    "total": "what is minimised: the losses times their weights",
    "prior": "the same as reconstruction, on pictures of plain words, which should stay as they are",
}
"""What a loss is, by its name in the log."""
TREND = 0.05
"""A loss rises or falls within a phase if luck alone makes its rank correlation with the steps as large more rarely,"""
SMALL = 0.02
"""and if its average changes by more than this share of itself."""
LETTER = 6.4
"""About the width of a letter of a phase's name, SVG units."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it is, SVG units, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Band:
    """A phase: its span on the x-axis, SVG units, its name, and whether the name fits in the span."""

    x: float
    width: float
    name: str
    fits: bool


@dataclass(frozen=True)
class Change:
    """What became of a loss within one phase.

    first, last: its smoothed values at the phase's first and last step, as text. trend: "falls", "rises", or "" where
    it does not do so beyond the scatter of its steps.
    """

    phase: str
    first: str
    last: str
    trend: str


@dataclass(frozen=True)
class Chart:
    """One loss, laid out: ``raw`` and ``smooth`` are SVG path data.

    meaning: what the loss is, in plain words; empty for one that icekit does not know.
    changes: one for each phase that the loss is in, in order; none with more phases than ``MAX_BANDS``.
    """

    name: str
    meaning: str
    raw: str
    smooth: str
    changes: list[Change]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bands: list[Band]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over a twelfth of the values (1-D, any length); at the ends over those that there are."""
    half = len(values) // 24
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    # Differences of sums round: an average of zeros must not come out as -1e-18.
    return np.asarray(np.clip((sums[end] - sums[start]) / (end - start), values.min(), values.max()))


def trend(steps: NDArray[np.float64], losses: NDArray[np.float64]) -> str:
    """Whether the losses (1-D) go with the steps (same length): "falls", "rises", or "" if luck would explain it.

    Spearman's rank correlation, which one wild step does not decide.
    """
    from scipy.stats import spearmanr  # here, for scipy takes long to import

    average = smooth(losses)
    if len(losses) < 3 or abs(average[-1] - average[0]) <= SMALL * abs(average).max():
        return ""
    correlation, chance = spearmanr(steps, losses)
    if chance >= TREND:
        return ""
    return "falls" if correlation < 0 else "rises"


def thin(
    x: NDArray[np.float64], y: NDArray[np.float64], points: int = MAX_POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most about ``points`` of the points (1-D, same length): of every bucket its lowest and its highest."""
    if len(x) <= points:
        return x, y
    keep: list[int] = []
    for bucket in np.array_split(np.arange(len(x)), max(1, points // 2)):
        keep += sorted({int(bucket[y[bucket].argmin()]), int(bucket[y[bucket].argmax()])})
    return x[keep], y[keep]


def loss_charts(log: Sequence[LogLine]) -> list[Chart]:
    """One chart per loss, in the order in which the losses first appear, all over the same steps."""
    names = list(dict.fromkeys(name for line in log for name in line.losses))
    return [_chart(name, log) for name in names]


def _chart(name: str, log: Sequence[LogLine]) -> Chart:
    steps = (log[0].step, log[-1].step)
    runs = [list(group) for _, group in groupby(log, key=lambda line: line.phase)]
    # A phase has its own losses and levels: nothing is averaged, and no line drawn, across its border.
    segments = []
    phases = []
    for run in runs:
        points = [(line.step, line.losses[name]) for line in run if name in line.losses]
        if points:
            x, y = np.array(points, dtype=np.float64).T
            segments.append((x, y, smooth(y)))
            phases.append(run[0].phase)
    values = np.concatenate([y for _, y, _ in segments])
    # A few wild steps would flatten all the others: the axis ends at the 99th percentile, the line is clipped.
    low = min(float(values.min()), 0.0)
    high = float(np.quantile(values, 0.99))
    if low == 0.0 and values.min() > 0.5 * high:
        low = float(values.min())
    high = max(high, max(float(average.max()) for _, _, average in segments))
    if high - low < 1e-12:
        low, high = (0.0, 2 * high) if high > 0 else (low - 1.0, high + 1.0)

    def place_x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - steps[0]) / max(1, steps[1] - steps[0])

    def place_y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    def path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
        x, y = thin(x, y)
        places = [f"{place_x(a):.1f} {place_y(b):.1f}" for a, b in zip(x, y, strict=True)]
        # A lone point is drawn as a line of no length, which a round cap makes a dot.
        return "M" + "L".join(places if len(places) > 1 else places * 2)

    bands = []
    if len(runs) <= MAX_BANDS:
        for run, following in zip(runs, [*runs[1:], None], strict=True):
            start = place_x(run[0].step)
            end = place_x(following[0].step) if following else float(RIGHT)
            fits = len(run[0].phase) * LETTER + 8 < end - start
            bands.append(Band(round(start, 1), round(end - start, 1), run[0].phase, fits))
    x_ticks = [tick for tick in nice_ticks(*steps, 4) if tick == int(tick)] if steps[1] > steps[0] else [steps[0]]
    return Chart(
        name=name,
        meaning=MEANINGS.get(name, ""),
        raw="".join(path(x, y) for x, y, _ in segments),
        smooth="".join(path(x, average) for x, _, average in segments),
        changes=[
            Change(phase, f"{average[0]:.3g}", f"{average[-1]:.3g}", trend(x, y))
            for phase, (x, y, average) in zip(phases, segments, strict=True)
        ]
        if len(runs) <= MAX_BANDS
        else [],
        x_ticks=[Tick(round(place_x(tick), 1), f"{tick:.0f}") for tick in x_ticks],
        y_ticks=[Tick(round(place_y(tick), 1), f"{tick:.3g}") for tick in nice_ticks(low, high, 3)],
        bands=bands,
    )
