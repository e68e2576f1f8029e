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
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tiny_transformers.write_sd3``."""
    import tiny_transformers

    return tiny_transformers.write_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def sd3_without_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tiny_transformers.write_sd3``."""
    import tiny_transformers

    return tiny_transformers.write_sd3(tmp_path_factory.mktemp("models") / "sd3-without-t5", t5=False)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tiny_transformers.write_flux``: dev."""
    import tiny_transformers

    return tiny_transformers.write_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="session")
def schnell_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``tiny_transformers.write_flux``: schnell."""
    import tiny_transformers

    return tiny_transformers.write_flux(tmp_path_factory.mktemp("models") / "schnell", dev=False)
