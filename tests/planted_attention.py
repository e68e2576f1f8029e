"""A backbone whose attention is planted, for the segmentors that read it: the right masks are known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.protocols import View


class PlantedBackbone:
    """A backbone whose attention is planted: a word of ``objects`` looks at its mask, ``[S, S]``.

    Each pixel attends to all pixels of its own object. Cross-attention sees but the upper half of an object. All other
    words look at what is no object, except for the ``unseen``, which look everywhere.
    """

    image_size, latent_shape, num_timesteps = 64, (4, 16, 16), 1000
    device = torch.device("cpu")
    attention_resolutions = (16, 8)

    def __init__(self, objects: dict[str, Tensor]) -> None:
        self.objects, self.timesteps, self.noises, self.seen = objects, [], [], []  # type: ignore[var-annotated]
        self.unseen: set[str] = set()
        self._prompt: list[str] = []

    def token_positions(self, prompt: str, words: Sequence[str]) -> list[list[int]]:
        parts = prompt.split()
        return [[1 + parts.index(piece) for piece in word.split()] for word in words]

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        self._prompt = prompts[0].split()
        return SimpleNamespace()

    def encode_images(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return torch.zeros(len(images), *self.latent_shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.timesteps.append(int(timesteps))
        self.noises.append(noise)
        return latents + noise

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        return noisy

    @contextlib.contextmanager
    def capture_attention(self, cross: Any = (), self_: Any = (), places: Any = ()) -> Iterator[Any]:
        yield SimpleNamespace(cross=self.cross, self_=self.self_attention)

    def coarse(self, mask: Tensor, resolution: int) -> Tensor:
        return F.interpolate(mask.float()[None, None], size=(resolution, resolution), mode="area")[0, 0]

    def cross(self, resolution: int) -> Tensor:
        maps = [torch.full((resolution, resolution), 0.1)]
        for word in self._prompt:
            if word in self.objects:
                seen = self.objects[word].clone()
                rows = seen.any(dim=1).nonzero()[:, 0]
                seen[int(rows.float().mean()) :] = False
                maps.append(0.1 + self.coarse(seen, resolution))
            elif word in self.unseen:
                maps.append(torch.full((resolution, resolution), 0.1))
            else:
                rest = ~torch.stack(list(self.objects.values())).any(dim=0)
                maps.append(0.1 + 0.3 * self.coarse(rest, resolution))
        stacked = torch.stack(maps)
        return (stacked / stacked.sum(dim=0))[None]

    def self_attention(self, resolution: int) -> Tensor:
        objects = list(self.objects.values())
        owners = [self.coarse(mask, resolution).flatten() for mask in objects]
        rest = (1 - torch.stack(owners).sum(dim=0)).clamp(0, 1)
        affinity = sum(owner[:, None] * owner for owner in [*owners, rest]) + 1e-6
        return (affinity / affinity.sum(dim=1, keepdim=True))[None]


def square(top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


CUP, BALL = square(10, 6, 20), square(34, 37, 22)


def scene() -> View:
    picture = torch.full((3, 64, 64), 0.5)
    picture[:, CUP] = torch.tensor([0.8, 0.1, 0.1])[:, None]
    picture[:, BALL] = torch.tensor([0.1, 0.2, 0.8])[:, None]
    return View(picture, picture, torch.ones(64, 64, dtype=torch.bool))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())
