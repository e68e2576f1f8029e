"""Where every random choice comes from: a seed and a purpose, and no generator whose state must be carried along."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed in [0, 2**63) for one purpose of a run: independent of every other purpose, and of what ran before."""
    digest = hashlib.sha256(json.dumps([seed, *map(str, purpose)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator on the CPU from ``derived_seed``."""
    import torch

    return torch.Generator().manual_seed(derived_seed(seed, *purpose))
