"""ConceptExpress's localisation on attention that is planted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from icekit_neighbours.localisation import ConceptExpressSegmentor, connected_parts, salient_clusters
from torch import Tensor

from icekit.protocols import (
    NO_TOKENS,
    Attention,
    Conditioning,
    InputError,
    Look,
    Prediction,
    Proposer,
    Tokens,
    nearest_grids,
)

GRID = 8
CELL = 4
"""Side of the grid of a square picture, and of one cell in pixels."""


def two_squares(width: int = GRID) -> Tensor:
    """0 for the background, 1 and 2 for two squares, the second at the right: int64 ``[8, width]``."""
    things = torch.zeros(GRID, width, dtype=torch.int64)
    things[1:4, 1:4], things[5:8, -4:] = 1, 2
    return things


class PlantedBackbone:
    """Places of one thing look at one another alone; ``seen[i]`` is what looks at prompt position i, ``[h, w]``."""

    device = torch.device("cpu")

    def __init__(self, things: Tensor, seen: dict[int, Tensor]) -> None:
        self.things, self.seen = things, seen
        height, width = things.shape
        self.image_size, self.latent_shape = (height * CELL, width * CELL), (4, height, width)
        self.word_grids: tuple[tuple[int, int], ...] = ((height, width),)
        self.pixel_grids = self.word_grids
        self.shares: list[float] = []
        self.noised = 0
        self.prompts: list[str] = []

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        return [[1 + prompt.split().index(word)] for word in words]

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        self.prompts += prompts
        return Conditioning({})

    def encode_images(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), *self.latent_shape)

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        self.noised += 1
        return latents + noise

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        assert look is not None
        self.shares.append(round(shares.item(), 6))
        words = [self.words(grid)[None] for grid in nearest_grids(self.word_grids, look.words)]
        pixels = [self.pixels(grid)[None] for grid in nearest_grids(self.pixel_grids, look.pixels)]
        return Prediction(noisy, Attention(tuple(words), tuple(pixels)))

    def words(self, grid: tuple[int, int]) -> Tensor:
        maps = torch.zeros(10, *grid)
        for position, seen in self.seen.items():
            maps[position] = seen
        return maps

    def pixels(self, grid: tuple[int, int]) -> Tensor:
        flat = self.things.flatten()
        same = (flat[:, None] == flat[None, :]).float() + 0.01
        return (same / same.sum(dim=1, keepdim=True)).view(*grid, *grid)


def proposals(backbone: PlantedBackbone, **settings: Any) -> list[Tensor]:
    segmentor = ConceptExpressSegmentor(ConceptExpressSegmentor.Settings(**settings), backbone)  # type: ignore[arg-type]
    assert isinstance(segmentor, Proposer)
    found = segmentor.propose(torch.rand(3, *backbone.image_size, generator=torch.Generator().manual_seed(0)))
    assert all(proposal.word is None for proposal in found)
    return [proposal.mask for proposal in found]


def enlarged(thing: Tensor) -> Tensor:
    return thing.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)


def overlap(mask: Tensor, other: Tensor) -> float:
    return float((mask & other).sum() / (mask | other).sum())


def test_what_the_end_token_hardly_looks_at_is_background() -> None:
    things = two_squares()
    masks = proposals(PlantedBackbone(things, {1: 0.1 + 0.5 * (things > 0).float()}), clusters=2)
    assert len(masks) == 2
    assert overlap(masks[0], enlarged(things == 2)) > 0.8  # largest first
    assert overlap(masks[1], enlarged(things == 1)) > 0.8
    assert not (masks[0] & masks[1]).any()


@pytest.mark.parametrize("settings", [{}, {"adjacent": False}, {"refinement": True}, {"apart": True}])
def test_a_picture_that_is_no_square(settings: dict[str, Any]) -> None:
    for things in (two_squares(13), two_squares(13).T.contiguous()):
        masks = proposals(PlantedBackbone(things, {1: 0.1 + 0.5 * (things > 0).float()}), clusters=2, **settings)
        assert [mask.shape for mask in masks] == [enlarged(things).shape] * 2
        assert overlap(masks[0], enlarged(things == 2)) > 0.7
        assert overlap(masks[1], enlarged(things == 1)) > 0.7


def test_a_thing_that_is_not_looked_at_goes_with_the_background() -> None:
    things = two_squares()
    [mask] = proposals(PlantedBackbone(things, {1: 0.1 + 0.5 * (things == 1).float()}), clusters=2)
    assert overlap(mask, enlarged(things == 1)) > 0.8


def test_the_end_token_comes_after_the_caption() -> None:
    things = two_squares()
    seen = 0.1 + (things == 1).float()
    backbone = PlantedBackbone(things, {3: 0.1 + (things == 2).float(), 4: seen})
    [mask] = proposals(backbone, clusters=2, caption="photo of things")
    assert set(backbone.prompts) == {"photo of things"}
    assert overlap(mask, enlarged(things == 1)) > 0.8
    [mask] = proposals(backbone, clusters=2, caption="photo of things", salient_by="last_word")
    assert overlap(mask, enlarged(things == 2)) > 0.8


def test_a_model_that_hides_the_end_token_is_named() -> None:
    things = two_squares()
    with pytest.raises(InputError, match=r"hides the end token .* segmentor.salient_by=last_word"):
        proposals(PlantedBackbone(things, {0: torch.ones(GRID, GRID)}))


def test_alike_things_that_do_not_touch_are_apart_if_asked_for() -> None:
    things = (two_squares() > 0).long()
    backbone = PlantedBackbone(things, {1: 0.1 + things.float()})
    assert len(proposals(backbone, clusters=2, adjacent=False)) == 1
    assert len(proposals(backbone, clusters=2, adjacent=False, apart=True)) == 2
    assert len(proposals(backbone, clusters=2)) == 2  # linked only where they touch


def test_salient_clusters_are_merged_below_the_limit_only() -> None:
    sorts = np.array([[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]])
    rows = np.repeat(sorts, 3, axis=0)
    attention = np.repeat([1.0, 1.0, 1.0, 0.0], 3)

    def clusters(limit: float) -> list[int]:
        found = salient_clusters(rows, attention, clusters=4, salience=1.0, merge_below=limit)
        return found[::3].tolist()

    assert clusters(1e-3) == [0, 1, 2, -1]
    assert clusters(0.2) == [0, 0, 1, -1]
    assert clusters(9.0) == [0, 0, 0, -1]


def test_the_limit_adapts() -> None:
    """Places of a sort differ a little, and sorts more than their places: no round links them."""
    sorts = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
    little = 0.02 * np.array([[0, 1, 0, -1], [0, -1, 0, 1], [1, 0, -1, 0], [-1, 0, 1, 0]])
    rows, attention = (sorts[:, None] + little[None]).reshape(8, 4), np.ones(8)
    options = {"clusters": 1, "salience": 0.5}
    adapted = salient_clusters(rows, attention, merge_below=None, **options)
    assert adapted.tolist() == [0] * 4 + [1] * 4
    assert salient_clusters(rows, attention, merge_below=9.0, **options).tolist() == [0] * 8


def test_published_is_a_clean_latent_on_all_grids() -> None:
    things = two_squares()
    backbone = PlantedBackbone(things, {1: 0.1 + 0.5 * (things > 0).float()})
    proposals(backbone, clusters=2)
    assert backbone.noised == 0 and backbone.shares == [0.0]
    backbone.shares.clear()
    proposals(backbone, clusters=2, noise=True, shares=[0.1, 0.2], draws=3)
    assert backbone.noised == 6 and backbone.shares == [0.1] * 3 + [0.2] * 3


def test_connected_parts() -> None:
    labels = np.array([[0, -1, 0], [0, -1, 1], [1, 1, 1]])
    assert connected_parts(labels).tolist() == [[0, -1, 1], [0, -1, 2], [2, 2, 2]]


def test_settings_refuse_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="caption must have a word"):
        ConceptExpressSegmentor.Settings(salient_by="last_word")
    with pytest.raises(ValueError, match="grids"):
        ConceptExpressSegmentor.Settings.model_validate({"grids": []})


def test_a_model_that_does_not_tell_is_refused() -> None:
    assert set(ConceptExpressSegmentor.needs) == {"attention", "similarity"}
    backbone = PlantedBackbone(two_squares(), {})
    backbone.pixel_grids = ()
    with pytest.raises(InputError, match="tells which places look at one another, and this backbone's does not"):
        proposals(backbone)
