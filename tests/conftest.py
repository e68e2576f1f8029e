"""Fixtures that many tests share: tiny models in the formats of real ones, written once per session."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started from a background job
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports the compiler: seconds


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 2.x folder: 128-pixel images, latents ``[4, 16, 16]``, attention at 16, 8, 4 and 2."""
    from icekit.testing import tiny

    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.x folder, otherwise as ``sd_folder``."""
    from icekit.testing import tiny

    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd15", version=1, seed=1)


@pytest.fixture(scope="session")
def sd_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``sd_folder``, trained to predict v (Stable Diffusion 2.1 at 768 pixels does)."""
    from icekit.testing import tiny

    return tiny.write_stable_diffusion(
        tmp_path_factory.mktemp("models") / "sd-v", prediction_type="v_prediction", seed=2
    )


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL folder: latents of 16, attention at 8 and 4, two text encoders with rows of 32 and 48."""
    from icekit.testing import tiny

    return tiny.write_stable_diffusion_xl(tmp_path_factory.mktemp("models") / "sdxl", seed=4)


@pytest.fixture(scope="session")
def joint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 folder: 64-pixel images, latents ``[4, 16, 16]``, joint attention at 8."""
    import tiny_models

    return tiny_models.write_joint(tmp_path_factory.mktemp("models") / "joint", seed=3)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder: ``open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")``, 64-pixel images."""
    from icekit.testing import tiny

    return tiny.write_clip(tmp_path_factory.mktemp("models") / "clip")
