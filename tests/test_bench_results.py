"""Means and their intervals, and what is said of a column whose ends do not differ."""

from pathlib import Path

import numpy as np
import pytest

import icekit
from icekit.bench.bootstrap import bootstrap
from icekit.bench.page import choose
from icekit.bench.results import cell, difference, notes, portable, says_nothing, summarise, to_csv
from icekit.protocols import Column


def test_folders_of_packages_are_named_from_the_package_on() -> None:
    inside = Path(icekit.__file__).parent / "vocabulary"
    elsewhere = Path(inside.anchor, "models", "mine")
    settings = {"clip": {"model": f"local-dir:{inside}", "files": (str(elsewhere), 3)}, "steps": 4, "word": "and/or"}
    assert portable(settings) == {
        "clip": {"model": "local-dir:icekit/vocabulary", "files": [str(elsewhere), 3]},
        "steps": 4,
        "word": "and/or",
    }


def test_bootstrap_by_hand() -> None:
    # Two images, 0 and 1: the means of resamples are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    estimate = bootstrap([0.0, 1.0])
    assert estimate is not None
    assert (estimate.mean, estimate.low, estimate.high, estimate.count) == (0.5, 0.0, 1.0, 2)
    assert bootstrap([0.3]) == bootstrap([0.3], seed=5)
    one = bootstrap([0.3])
    assert one is not None and one.low == one.high == pytest.approx(0.3)
    assert bootstrap([]) is None


def test_bootstrap_is_of_the_means_of_resamples_and_follows_from_the_seed() -> None:
    values = np.random.default_rng(3).beta(2, 5, size=40)
    ours = bootstrap(values.tolist(), seed=1)
    picks = np.random.default_rng(1).integers(40, size=(2000, 40))
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx(np.percentile(values[picks].mean(axis=1), [2.5, 97.5]), abs=1e-12)
    assert ours == bootstrap(values.tolist(), seed=1) != bootstrap(values.tolist(), seed=2)


@pytest.mark.parametrize(
    ("floor", "ceiling", "higher_is_better", "expected"),
    [(0.2, 0.9, True, False), (0.2, 0.2, True, True), (0.9, 0.2, True, True), (0.9, 0.2, False, False)],
)
def test_says_nothing(floor: float, ceiling: float, higher_is_better: bool, expected: bool) -> None:
    rows = {"floor": {"x": {"mean": floor}}, "ceiling": {"x": {"mean": ceiling}}}
    assert says_nothing(rows, "x", higher_is_better) is expected
    assert says_nothing({"floor": rows["floor"], "ceiling": {}}, "x", higher_is_better) is False


def measured(value: float | None, error: str | None = None) -> dict:
    return {"metrics": {"m": {"x": {"value": value, "prompts": [], "strips": []}}}, "error": error}


def test_summary() -> None:
    values = {
        "xattn-ice": {"a": measured(0.5), "b": measured(1.0), "c": measured(None, "no concept found")},
        "floor": {"a": measured(0.5), "b": measured(0.5), "c": measured(0.5)},
        "ceiling": {"a": measured(0.4), "b": measured(0.4), "c": measured(0.4)},
    }
    components = {"xattn-ice": {"backbone": "b", "retriever": "r", "segmentor": "xattn", "learner": "ice"}}
    columns = {"m": {"x": Column("how x it is"), "unused": Column("nothing")}}
    made = summarise(
        values=values, columns=columns, images=["a", "b", "c"], components=components, seed=0, record={"n": 3}
    )
    assert list(made["columns"]) == ["x"]
    assert made["columns"]["x"]["says_nothing"] is True
    first = made["rows"][0]
    assert (first["values"]["x"]["mean"], first["values"]["x"]["n"]) == (0.75, 2)
    assert first["images"]["c"]["x"] is None
    assert notes(made) == [
        "! x says nothing here: its ceiling (0.40) is no better than its floor (0.50)",
        "xattn-ice: nothing came of 1 of 3 images (c: no concept found)",
    ]
    lines = to_csv(made).splitlines()
    assert lines[0] == "row,backbone,retriever,segmentor,learner,x_mean,x_low,x_high,x_n"
    assert lines[1].startswith("xattn-ice,b,r,xattn,ice,0.75,")
    assert lines[2] == "floor,,,,,0.5,0.5,0.5,3"
    assert cell(None) == "–"
    assert cell({"mean": 0.5, "low": 0.25, "high": 0.754}) == "0.50 [0.25, 0.75]"


def test_a_row_is_held_against_another_image_by_image() -> None:
    """Differences by hand, of the images in which both have a value."""
    values = {
        "words": {"a": measured(0.1), "b": measured(0.9), "c": measured(0.5)},
        "ice": {"a": measured(0.2), "b": measured(1.0), "c": measured(None)},
    }
    components = {name: dict.fromkeys(("backbone", "retriever", "segmentor", "learner"), "x") for name in values}
    made = summarise(
        values=values, columns={"m": {"x": Column("x")}}, images=["a", "b", "c"], components=components, seed=0,
        record={"n": 3}, against="words",
    )  # fmt: skip
    words, ice = made["rows"]
    assert "differences" not in words
    assert ice["differences"]["x"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1, "n": 2})
    assert difference(ice["differences"]["x"]) == "+0.10 [+0.10, +0.10]"
    assert difference(None) == "–"


def test_best_median_and_worst() -> None:
    values = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.7, "e": 0.2}
    assert choose(values, higher_is_better=True) == [("best", "b"), ("median", "c"), ("worst", "a")]
    assert choose(values, higher_is_better=False) == [("best", "a"), ("median", "c"), ("worst", "b")]
    assert choose({"a": 1.0}, higher_is_better=True) == [("best", "a")]
    assert choose({"a": 1.0, "b": 0.0}, higher_is_better=True) == [("best", "a"), ("worst", "b")]
    assert choose({}, higher_is_better=True) == []
