"""Tiny models with random weights, written once a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "tests")]

torch.set_num_threads(1)
torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler: seconds


@pytest.fixture(scope="session")
def clipseg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tiny_detectors.write_clipseg``."""
    import tiny_detectors

    return tiny_detectors.write_clipseg(tmp_path_factory.mktemp("models") / "clipseg")


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tiny_detectors.write_grounding_dino``."""
    import tiny_detectors

    return tiny_detectors.write_grounding_dino(tmp_path_factory.mktemp("models") / "dino")


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tiny_detectors.write_sam``."""
    import tiny_detectors

    return tiny_detectors.write_sam(tmp_path_factory.mktemp("models") / "sam")
