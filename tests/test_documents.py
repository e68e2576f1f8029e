"""What the documents state is what was measured."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "tabletop-seed-7.json"


def test_the_comparison_is_that_of_the_results() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "comparison.py"), str(RESULTS)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    table = [line for line in made.splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        assert row["name"] in table[0]
