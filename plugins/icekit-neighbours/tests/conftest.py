"""Tiny models with random weights, from icekit's own tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ICEKIT_TESTS = Path(__file__).resolve().parents[3] / "tests"
sys.path.insert(0, str(ICEKIT_TESTS))

torch.set_num_threads(1)
torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler: seconds


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 2.x folder: 128-pixel images, latents ``[4, 16, 16]``, attention at 16, 8, 4 and 2."""
    from icekit.testing import tiny

    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")
