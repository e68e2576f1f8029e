"""How long a query of ``icekit find`` takes: an index of synthetic concepts, words and vectors drawn at random.

    python benchmarks/find.py [--concepts 100000] [--dimensions 512] [--queries 50]

The index is made in a temporary folder. Each kind of query is asked a few times before it is timed; what is printed is
the median and the worst of the timed ones, milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from icekit.concept_library.index import Entry, Index, Query

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "orange", "pink", "grey")
MATERIALS = ("glass", "wood", "metal", "plastic", "clay", "stone", "paper", "leather", "wool", "rubber")
WARM_UP = 5
CONCEPTS_A_RUN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concepts", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--queries", type=int, default=50)
    asked = parser.parse_args()
    generator = np.random.default_rng(0)

    def vector() -> np.ndarray:
        one = generator.standard_normal(asked.dimensions).astype(np.float32)
        return one / np.linalg.norm(one)

    def words() -> dict[str, list[str]]:
        return {
            "colour": [str(one) for one in generator.choice(COLOURS, 3, replace=False)],
            "material": [str(one) for one in generator.choice(MATERIALS, 3, replace=False)],
        }

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.sqlite"
        index = Index(file)
        begun = time.perf_counter()
        with index.changing():
            for run in range(asked.concepts // CONCEPTS_A_RUN):
                labels = generator.integers(0, 9000, CONCEPTS_A_RUN)
                entries = [Entry(n, f"thing{label}", words(), vector()) for n, label in enumerate(labels)]
                index.put(Path(f"/runs/{run}"), "", entries, "synthetic")
        made = time.perf_counter() - begun
        size = file.stat().st_size / 1e6
        print(f"{len(index):,} concepts of {asked.dimensions} numbers: made in {made:.0f} s, {size:.0f} MB")

        def pair() -> tuple[str, str]:
            return str(generator.choice(COLOURS)), str(generator.choice(MATERIALS))

        kinds: dict[str, Callable[[], Query]] = {
            "two frequent words": lambda: Query(terms=pair()),
            "a rare word": lambda: Query(terms=(f"thing{generator.integers(0, 9000)}",)),
            "two attributes": lambda: Query(attributes=tuple(zip(("colour", "material"), pair(), strict=True))),
            "similarity": lambda: Query(vector=vector(), space="synthetic"),
            "two frequent words, similarity": lambda: Query(terms=pair(), vector=vector(), space="synthetic"),
            "a rare word, similarity": lambda: Query(
                terms=(f"thing{generator.integers(0, 9000)}",), vector=vector(), space="synthetic"
            ),
        }
        for kind, query in kinds.items():
            spent = []
            for number in range(WARM_UP + asked.queries):
                one = query()
                begun = time.perf_counter()
                found = index.find(one, 20)
                if number >= WARM_UP:
                    spent.append(1000 * (time.perf_counter() - begun))
                assert found, one
            print(f"{kind}: median {statistics.median(spent):.1f} ms, worst {max(spent):.1f} ms")


if __name__ == "__main__":
    main()
