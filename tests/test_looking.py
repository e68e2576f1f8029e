"""Looking at a picture, held against a model that counts and keeps what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from icekit.attention import look_at
from icekit.protocols import NO_TOKENS, Attention, Backbone, Conditioning, InputError, Look, Prediction, Tokens
from icekit.protocols import nearest_grids as nearest

IMAGE = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(0))


class CountingBackbone:
    """A model of three positions; its attention in its n-th prediction is n everywhere, its latents are the picture."""

    device = torch.device("cpu")
    word_grids, pixel_grids = ((8, 16), (4, 8)), ((4, 8),)

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, float]] = []
        self.noises: list[Tensor] = []
        self.encoded: list[tuple[list[str], Tokens]] = []

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        self.encoded.append((list(prompts), tokens))
        return Conditioning({"prompt": torch.zeros(1, 3)})

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        self.noises.append(noise)
        return latents + shares[:, None, None, None] * noise

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look) -> Prediction:
        self.asked.append((noisy[0], round(shares.item(), 6)))
        count = float(len(self.asked))
        rows = torch.ones(1, requires_grad=True)  # gradients that flow in, say of tokens that are learned
        return Prediction(
            noisy,
            Attention(
                tuple(count * rows.half().expand(1, 3, *grid) for grid in nearest(self.word_grids, look.words)),
                tuple(count * rows.expand(1, *grid, *grid) for grid in nearest(self.pixel_grids, look.pixels)),
            ),
        )


def look(backbone: CountingBackbone, seed: int = 0, **options: Any) -> Attention:
    model: Backbone = backbone  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    options = {"shares": [0.25, 0.5], "look": Look(words=(64, 4), pixels=(64, 4))} | options
    return look_at(model, IMAGE, "a cup", options.pop("look"), generator=generator, **options)


def test_it_is_the_mean_over_shares_and_draws_of_one_picture() -> None:
    backbone = CountingBackbone()
    attention = look(backbone, draws=3)
    assert [share for _, share in backbone.asked] == [0.25] * 3 + [0.5] * 3
    assert [maps.shape for maps in attention.words] == [(3, 8, 16), (3, 4, 8)]
    assert [maps.shape for maps in attention.pixels] == [(4, 8, 4, 8)]
    for maps in (*attention.words, *attention.pixels):
        assert maps.dtype == torch.float32 and not maps.requires_grad
        assert (maps == 3.5).all()  # (1 + 2 + ... + 6) / 6


def test_noise_is_drawn_anew_each_time_by_the_generator() -> None:
    backbone = CountingBackbone()
    look(backbone, seed=5, draws=2)
    generator = torch.Generator().manual_seed(5)
    expected = [torch.randn(1, 3, 16, 32, generator=generator) for _ in range(4)]
    assert all(torch.equal(drawn, own) for drawn, own in zip(backbone.noises, expected, strict=True))
    for (noisy, share), noise in zip(backbone.asked, expected, strict=True):
        assert torch.equal(noisy, IMAGE + share * noise[0])


def test_a_clean_latent_is_only_said_to_be_noisy() -> None:
    backbone = CountingBackbone()
    attention = look(backbone, noise=False, draws=3)
    assert backbone.noises == []
    assert [share for _, share in backbone.asked] == [0.25, 0.5]  # nothing is drawn: once for each share
    assert all(torch.equal(latents, IMAGE) for latents, _ in backbone.asked)
    assert (attention.words[0] == 1.5).all()


def test_only_what_is_asked_for_comes_back_and_tokens_are_handed_on() -> None:
    backbone = CountingBackbone()
    tokens = {"<cup-0>": {"clip_l": torch.zeros(4)}}
    attention = look(backbone, look=Look(words=(8,)), tokens=tokens)
    assert len(attention.words) == 1 and attention.pixels == ()
    assert backbone.encoded == [(["a cup"], tokens)]


def test_a_model_that_refuses_is_heard() -> None:
    class Blind(CountingBackbone):
        def predict(self, *arguments: Any) -> Prediction:
            raise InputError("this model tells no attention")

    with pytest.raises(InputError, match="tells no attention"):
        look(Blind())
