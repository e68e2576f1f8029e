"""What the documents state is what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "tabletop-seed-7.json"
COLUMNS = ("miou", "recall", "word_accuracy", "sim_?", "acc?", "words_*", "transfer_*", "leak_*", "recompose")


@pytest.mark.parametrize(
    ("document", "options"),
    [
        ("README.md", ["--row", "xattn-*"]),
        ("docs/bench.md", ["--across", *(option for column in COLUMNS for option in ("--column", column))]),
    ],
)
def test_the_comparison_is_that_of_the_results(document: str, options: list[str]) -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "comparison.py"), str(RESULTS), *options],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    table = [line for line in made.splitlines() if line.startswith("|")]
    assert len(table) > 10
    assert "\n".join(table) in (ROOT / document).read_text(encoding="utf-8")
