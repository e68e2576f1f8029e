"""What the documents state is what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEARNING = "learning-seed-3301"
SHORT = ("sim_i", "acc1", "words_*", "images_*", "transfer_colour", "leak_colour_material")
LONG = ("miou", "recall", "word_accuracy", "sim_?", "acc?", "words_*", "transfer_*", "leak_*", "recompose")


@pytest.mark.parametrize(
    ("document", "results", "options"),
    [
        ("README.md", LEARNING, ["--across", *(option for column in SHORT for option in ("--column", column))]),
        ("docs/bench.md", LEARNING, []),
        ("docs/bench.md", "tabletop-seed-7", ["--across", *(o for column in LONG for o in ("--column", column))]),
    ],
)
def test_a_table_is_that_of_the_results(document: str, results: str, options: list[str]) -> None:
    file = ROOT / "benchmarks" / f"{results}.json"
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "comparison.py"), str(file), *options],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    table = [line for line in made.splitlines() if line.startswith("|")]
    assert len(table) > 5
    assert "\n".join(table) in (ROOT / document).read_text(encoding="utf-8")
