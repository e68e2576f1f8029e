"""Words that compete by their loss: against hand-worked values, and a schedule's own formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.learning.word_posterior import LEAST_SHARE, WordPosterior, signal_to_noise

ROWS = {"clip_l": torch.eye(3)}


def test_a_step_by_hand() -> None:
    """Losses 1, 2, 3 and 2, 2, 5: less their means -1, 0, 1 and -1, -1, 2; mean square 8/6, means -1, -1/2, 3/2."""
    posterior = WordPosterior(ROWS, torch.tensor([1.0, 1.0, 2.0]))
    posterior.update([0, 1, 2], torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 5.0]]), rate=0.5)
    scale = math.sqrt(8 / 6)
    weights = [math.exp(0.5 * 1 / scale), math.exp(0.5 * 0.5 / scale), 2 * math.exp(-0.5 * 1.5 / scale)]
    expected = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(posterior.probabilities, expected)
    torch.testing.assert_close(posterior.token()["clip_l"], expected)


def test_sharpened_by_hand() -> None:
    """1, 2, 4 cubed: 1, 8, 64 of 73."""
    found = WordPosterior(ROWS, torch.tensor([1.0, 2.0, 4.0])).sharpened(3.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 8.0, 64.0]) / 73)


def test_the_unit_of_the_loss_does_not_matter() -> None:
    losses = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for unit in (1.0, 1e-4):
        posterior = WordPosterior(ROWS, torch.ones(3))
        for each in losses:
            posterior.update([0, 1, 2], each * unit, rate=0.7)
        found.append(posterior.probabilities)
    torch.testing.assert_close(found[0], found[1])


def test_equal_losses_change_nothing() -> None:
    posterior = WordPosterior(ROWS, torch.ones(3))
    posterior.update([0, 1, 2], torch.ones(2, 3), rate=0.7)
    torch.testing.assert_close(posterior.probabilities, torch.full((3,), 1 / 3))


def test_a_hopeless_word_is_tried_no_more() -> None:
    posterior = WordPosterior(ROWS, torch.tensor([1.0, 0.5 * LEAST_SHARE, 0.5]))
    assert posterior.tried() == [0, 2]
    posterior.update([0, 2], torch.tensor([[1.0, 3.0]]), rate=0.7)
    assert posterior.probabilities.argmax() == 0


def test_the_true_word_wins_over_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    posterior = WordPosterior({"clip_l": torch.eye(8)}, torch.ones(8))
    advantage = torch.zeros(8)
    advantage[5] = -0.5
    for _ in range(40):
        words = posterior.tried()
        losses = advantage[words] + torch.randn(2, len(words), generator=generator)
        posterior.update(words, losses, rate=0.7)
    assert posterior.probabilities[5] > 0.9


def test_signal_to_noise_is_the_schedules(sd_folder: Path) -> None:
    from diffusers import DDPMScheduler

    backbone = StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")
    timesteps = torch.tensor([1, 100, 500, 900])
    alpha_bar = DDPMScheduler.from_pretrained(sd_folder, subfolder="scheduler").alphas_cumprod[timesteps]
    ratio = (alpha_bar / (1 - alpha_bar)).sqrt()
    assert signal_to_noise(backbone, timesteps / 1000).tolist() == pytest.approx(ratio.tolist(), rel=1e-4)
