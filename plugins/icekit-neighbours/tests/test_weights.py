"""Whole weights, as Break-A-Scene and DreamBooth were published, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from icekit_neighbours import break_a_scene, dreambooth
from learning import Killed, Memory, Taught, assert_same, learn_watched, recorded_generation, two_regions

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.protocols import Step

LEARNERS: dict[str, type] = {
    "break-a-scene": break_a_scene.BreakASceneLearner,
    "dreambooth": dreambooth.DreamBoothLearner,
}
PUBLISHED_RATES = {"break-a-scene": 2e-6, "dreambooth": 5e-6}


@pytest.fixture(scope="module")
def backbone(sd_folder: Path) -> StableDiffusion:
    return StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")


def learn(
    backbone: StableDiffusion, name: str, memory: Memory, kill_at: int | None = None, **settings: Any
) -> tuple[Taught, list[Step]]:
    cls: Any = LEARNERS[name]
    quick = {"steps": 2, "prior_images": 1, "prior_steps": 1, "weights": "all", "weight_decay": 0}
    learner = cls(cls.Settings(**(quick | settings)), backbone)
    return learn_watched(learner, two_regions(), (), checkpoint=memory, kill_at=kill_at)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_weight_is_trained_at_the_published_rate(backbone: StableDiffusion, name: str) -> None:
    before, memory = {key: value.clone() for key, value in backbone.unet.state_dict().items()}, Memory()
    learned, steps = learn(backbone, name, memory, steps=2 if name == "break-a-scene" else 1)
    assert [step.phase for step in steps][-1] == "weights" and "prior" in steps[-1].losses
    assert_same(backbone.unet.state_dict(), before)
    assert not any(one.requires_grad or one.grad is not None for one in backbone.unet.parameters())
    assert not learned.lora and list(learned.weights) == list(before)
    assert learned.weights_config["_class_name"] == "UNet2DConditionModel"
    assert memory.held is not None
    moved = torch.cat([(memory.held[0][f"weights/{key}"] - before[key]).flatten().abs() for key in before])
    assert float(moved.median()) == pytest.approx(PUBLISHED_RATES[name], rel=0.1)  # AdamW's first step


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_a_killed_run_goes_on_bit_for_bit(backbone: StableDiffusion, name: str) -> None:
    settings: dict[str, Any] = {"steps": 4, "checkpoint_every": 1, "weights_learning_rate": 1e-3}
    whole = learn(backbone, name, Memory(), **settings)[0]
    memory = Memory()
    with pytest.raises(Killed):
        learn(backbone, name, memory, kill_at=4, **settings)
    resumed, steps = learn(backbone, name, memory, **settings)
    assert [step.step for step in steps] == [4]
    assert_same(resumed.tokens, whole.tokens)
    assert_same(resumed.weights, whole.weights)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_prior_is_sampled_as_asked_for(
    backbone: StableDiffusion, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded_generation(backbone, monkeypatch)
    prior = {"prior_images": 2, "prior_prompt": "a beach", "prior_steps": 2, "prior_guidance": 3.0}
    learn(backbone, name, Memory(), **prior)
    [call] = calls
    assert (call["prompts"], call["steps"], call["guidance_scale"]) == (["a beach"] * 2, 2, 3.0)
