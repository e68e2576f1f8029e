"""A backbone whose attention is planted, for the segmentors that read it: the right masks are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.protocols import NO_TOKENS, Attention, Conditioning, Grid, Look, Prediction, Tokens, View, nearest_grids


class PlantedBackbone:
    """A backbone whose attention is planted: a word of ``objects`` is looked at by its mask, ``[H, W]``.

    Each pixel looks at all pixels of its own object. Of an object but the upper half looks at its word. All that is no
    object looks at the other words, except for the ``unseen``, which everything looks at alike. Grids have cells of 4
    and of 8 pixels. What it is asked is kept: ``shares``, ``noises``, ``noisy`` latents and the pictures ``seen``.
    """

    device = torch.device("cpu")

    def __init__(self, objects: dict[str, Tensor]) -> None:
        self.objects = objects
        height, width = next(iter(objects.values())).shape
        self.image_size, self.latent_shape = (height, width), (4, height // 4, width // 4)
        self.word_grids: tuple[Grid, ...] = tuple((height // cell, width // cell) for cell in (4, 8))
        self.pixel_grids = self.word_grids
        self.shares: list[float] = []
        self.noises: list[Tensor] = []
        self.noisy: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.unseen: set[str] = set()
        self._prompt: list[str] = []

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        parts = prompt.split()
        return [[1 + parts.index(piece) for piece in word.split()] for word in words]

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        self._prompt = prompts[0].split()
        return Conditioning({})

    def encode_images(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return torch.zeros(len(images), *self.latent_shape)

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        self.noises.append(noise)
        return latents + noise

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        assert look is not None
        self.shares.append(round(shares.item(), 6))
        self.noisy.append(noisy)
        words = [self.words(grid)[None] for grid in nearest_grids(self.word_grids, look.words)]
        pixels = [self.pixels(grid)[None] for grid in nearest_grids(self.pixel_grids, look.pixels)]
        return Prediction(noisy, Attention(tuple(words), tuple(pixels)))

    def coarse(self, mask: Tensor, grid: Grid) -> Tensor:
        return F.interpolate(mask.float()[None, None], size=grid, mode="area")[0, 0]

    def words(self, grid: Grid) -> Tensor:
        maps = [torch.full(grid, 0.1)]
        for word in self._prompt:
            if word in self.objects:
                seen = self.objects[word].clone()
                rows = seen.any(dim=1).nonzero()[:, 0]
                seen[int(rows.float().mean()) :] = False
                maps.append(0.1 + self.coarse(seen, grid))
            elif word in self.unseen:
                maps.append(torch.full(grid, 0.1))
            else:
                rest = ~torch.stack(list(self.objects.values())).any(dim=0)
                maps.append(0.1 + 0.3 * self.coarse(rest, grid))
        stacked = torch.stack(maps)
        return stacked / stacked.sum(dim=0)

    def pixels(self, grid: Grid) -> Tensor:
        owners = [self.coarse(mask, grid).flatten() for mask in self.objects.values()]
        rest = (1 - torch.stack(owners).sum(dim=0)).clamp(0, 1)
        affinity = torch.stack([owner[:, None] * owner for owner in [*owners, rest]]).sum(dim=0) + 1e-6
        return (affinity / affinity.sum(dim=1, keepdim=True)).unflatten(1, grid).unflatten(0, grid)


class JointBackbone(PlantedBackbone):
    """The same of a joint-attention transformer, say: the prompt gets but a tenth of what places look at."""

    def words(self, grid: Grid) -> Tensor:
        return 0.1 * super().words(grid)


def square(top: int, left: int, side: int, size: tuple[int, int] = (64, 64)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


CUP, BALL = square(10, 6, 20), square(34, 37, 22)
WIDE = {"cup": square(8, 8, 24, (64, 96)), "ball": square(32, 64, 24, (64, 96))}
"""A cup and a ball in a picture of 64 x 96 pixels, the ball where a square picture has no place."""


def scene(cup: Tensor = CUP, ball: Tensor = BALL) -> View:
    picture = torch.full((3, *cup.shape), 0.5)
    picture[:, cup] = torch.tensor([0.8, 0.1, 0.1])[:, None]
    picture[:, ball] = torch.tensor([0.1, 0.2, 0.8])[:, None]
    return View(picture, picture, torch.ones(cup.shape, dtype=torch.bool))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def without_attention(**lacking: Any) -> Any:
    """A backbone of a family that does not tell all; ``lacking`` is what to replace."""
    backbone = PlantedBackbone({"cup": CUP, "ball": BALL})
    for name, value in lacking.items():
        setattr(backbone, name, value)
    return backbone
