"""What a training session is told: folders, device, sizes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

MODELS_FOLDER = Path(__file__).resolve().parent.parent / "models"
"""Where the package looks for its weights."""

IMAGE_SIZE = 64
"""Pixels along each side of a training image."""


@dataclass(frozen=True)
class Settings:
    """`work`: folder of data, checkpoints and log. The `*_images` are counts of training samples, repeats included,
    `images` the number of scenes rendered. `unet_batch`, `unet_rate`, `unet_workers`: of the `unet` stage, samples a
    step, learning rate, and processes that draw. `minutes`, `until` (UTC, "HH:MM"): optional caps on a stage's time.
    """

    work: Path
    models: Path = MODELS_FOLDER
    device: str = "auto"
    seed: int = 0
    threads: int | None = None
    processes: int = 2
    images: int = 27_000
    clip_images: int = 200_000
    clip_tower_images: int = 150_000
    vae_images: int = 30_000
    decoder_images: int = 30_000
    unet_images: int = 300_000
    unet_batch: int = 24  # few samples are affordable on a processor: more, smaller steps learn more from them
    unet_rate: float = 3e-4
    unet_workers: int = 0
    region_scenes: int = 4_000
    clip_region_images: int = 100_000
    minutes: float | None = None
    until: str | None = None

    @property
    def torch_device(self) -> torch.device:
        """The device to train on; "auto" is CUDA where there is one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def minutes_left(self, spent: float, now: datetime | None = None) -> float | None:
        """Minutes a stage that has already run for `spent` minutes may still run; None without a cap."""
        caps = []
        if self.minutes is not None:
            caps.append(self.minutes - spent)
        if self.until is not None:
            now = now or datetime.now(UTC)
            hour, minute = (int(part) for part in self.until.split(":"))
            end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            if end < now - timedelta(hours=12):
                end += timedelta(days=1)
            caps.append((end - now).total_seconds() / 60)
        return max(0.0, min(caps)) if caps else None


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is fast on the device: on a processor it takes AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision in bfloat16 where the device is fast at it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))
