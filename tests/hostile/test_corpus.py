"""What the fuzzer starts from and what it found, through its targets: see ``fuzz.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from .fuzz import CORPUS, TARGETS, seeds

FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_right_is_read_and_every_cut_of_it_is_answered(target: str) -> None:
    for data in seeds()[target]:
        assert TARGETS[target](data)
        for share in range(8):
            TARGETS[target](data[: 1 + len(data) * share // 8])


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_the_fuzzer_found(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())
