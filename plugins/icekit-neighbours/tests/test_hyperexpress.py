"""HyperExpress: its losses by hand, and the learner on a tiny model with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from icekit_neighbours import hyperexpress
from icekit_neighbours.hyperbolic import distance, exponential_map, mobius_add
from icekit_neighbours.hyperexpress import (
    Composer,
    Hierarchy,
    HyperExpressLearner,
    HyperExpressSettings,
    attribute_triplet,
    composition_loss,
    contrastive_loss,
    entailment_loss,
    object_triplet,
)
from learning import Killed, Memory, Taught, assert_same, learn_watched, row_of, two_regions
from torch import Tensor

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.learning.training import Task
from icekit.plugins import installed
from icekit.protocols import Attribute, InputError, Region, RunError, Step

ATTRIBUTES = (
    Attribute("colour", anchor="colour", vocabulary=("red", "green")),
    Attribute("material", anchor="material", vocabulary=("metal", "wood")),
)

# --- By hand ---------------------------------------------------------------------------------------------------------


def at(*places: float) -> Tensor:
    """Points of the line through the centre, by their signed distance from it: ``[n, 1]``."""
    return exponential_map(torch.tensor(places, dtype=torch.float64).unsqueeze(-1) / 2)


def test_object_triplet_by_hand() -> None:
    anchor, own = at(1.0), at(1.5)
    rivals = torch.stack([at(1.6, 4.0)])
    # The first rival is 0.6 away, the own token 0.5: 0.5 - 0.6 + 0.2 = 0.1; the second is far enough.
    assert float(object_triplet(anchor, own, rivals, 0.2)) == pytest.approx(0.05)
    assert float(object_triplet(anchor, own, rivals, 0.0)) == 0


def test_attribute_triplet_by_hand() -> None:
    anchors, tokens = at(-1.0, 1.0), torch.stack([at(-0.5, 1.0)])
    # At -1: own 0.5, rival 2; at 1: own 0, rival 1.5. With margin 2: 0.5 and 0.5.
    assert float(attribute_triplet(anchors, tokens, 2.0)) == pytest.approx((0.5 + 0.5) / 2)
    assert float(attribute_triplet(anchors, tokens, 1.0)) == 0
    assert float(attribute_triplet(anchors, tokens.flip(1), 1.0)) == pytest.approx(2.5)  # the wrong way round
    assert float(attribute_triplet(anchors[:1], tokens[:, :1], 2.0)) == 0


def test_contrastive_loss_by_hand() -> None:
    anchors, tokens = torch.stack([at(0.0)]), torch.stack([at(0.5, -1.0)])
    expected = -math.log(math.exp(-0.5 / 0.5) / (math.exp(-0.5 / 0.5) + math.exp(-1.0 / 0.5)))
    assert float(contrastive_loss(anchors, tokens, 0.5)) == pytest.approx(expected)
    assert float(contrastive_loss(anchors, tokens[:, :1], 0.5)) == 0
    both = torch.stack([at(0.0, -1.0)])
    second = -math.log(1 / (math.exp(-1.5 / 0.5) + 1))
    assert float(contrastive_loss(both, tokens, 0.5)) == pytest.approx((expected + second) / 2)


def test_entailment_loss_by_hand() -> None:
    parent = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    omega = math.asin(0.1 * 0.75 / 0.5)
    assert float(entailment_loss(parent, parent.new_tensor([[0.9, 0.0]]), 0.1)) == 0
    assert float(entailment_loss(parent, parent.new_tensor([[-0.9, 0.0]]), 0.1)) == pytest.approx(math.cos(omega) + 1)
    # The loss begins at the cone's edge.
    for degrees, inside in ((-1, True), (1, False)):
        angle = omega + math.radians(degrees)
        step = 1e-3 * parent.new_tensor([[math.cos(angle), math.sin(angle)]])  # so near that the plane is flat
        assert (float(entailment_loss(parent, parent + step, 0.1)) == 0) == inside


def test_entailment_loss_draws_a_child_into_the_cone() -> None:
    parent = torch.tensor([[0.3, 0.0]])
    child = torch.tensor([[0.2, 0.4]], requires_grad=True)
    optimizer = torch.optim.SGD([child], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        entailment_loss(parent, child, 0.1).backward()
        optimizer.step()
    assert float(entailment_loss(parent, child, 0.1).detach()) < 1e-3
    assert float(child.detach().norm()) > 0.3


def test_composition_loss_by_hand() -> None:
    parts = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert float(composition_loss(torch.tensor([[0.5, 1.5]]), parts, torch.tensor([[0.5, 0.75]]))) == 0
    assert float(composition_loss(torch.tensor([[1.0, 1.0]]), parts, torch.tensor([[0.5, 1.0]]))) == pytest.approx(
        (0.5**2 + 1.0**2) / 2
    )


# --- On a tiny model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(sd_folder: Path) -> StableDiffusion:
    return StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")


@pytest.fixture(scope="module")
def regions() -> list[Region]:
    return two_regions()


Learn = Callable[..., tuple[Taught, list[Step]]]
IMAGE = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def learn(backbone: StableDiffusion, regions: list[Region]) -> Learn:
    def run(
        checkpoint: Memory | None = None,
        kill_at: int | None = None,
        only: list[Region] | None = None,
        attributes: tuple[Attribute, ...] = ATTRIBUTES,
        seed: int = 0,
        **settings: Any,
    ) -> tuple[Taught, list[Step]]:
        learner = HyperExpressLearner(HyperExpressSettings(**({"steps": 4} | settings)), backbone)
        return learn_watched(learner, only or regions, attributes, checkpoint=checkpoint, kill_at=kill_at, seed=seed)

    return run


def test_every_concept_gets_its_tokens(learn: Learn, backbone: StableDiffusion) -> None:
    before = {key: value.clone() for key, value in backbone.unet.state_dict().items()}
    learned, steps = learn(steps=8)
    tokens = learned.tokens
    assert set(tokens) == {
        f"<{stem}{kind}>" for stem in ("cup-0", "metal-ball-1") for kind in ("", "-instance", "-colour", "-material")
    }
    assert all(row.dtype == torch.float32 and row.shape == (backbone.rows["clip_l"],) for row in tokens.values())
    assert len({tuple(row.tolist()) for row in tokens.values()}) == len(tokens)
    assert not learned.lora
    assert [step.phase for step in steps] == ["object"] * 4 + ["attributes"] * 2 + ["compose"] * 2
    assert [step.step for step in steps] == list(range(1, 9)) and all(step.total == 8 for step in steps)
    assert_same(backbone.unet.state_dict(), before)


def test_each_phase_adds_up_its_losses(learn: Learn) -> None:
    settings = HyperExpressSettings()
    for contrast in ("triplet", "infonce"):
        for step in learn(contrast=contrast)[1]:
            losses = dict(step.losses)
            assert ("composition" in losses) == (step.phase == "compose")
            expected = (
                losses["reconstruction"]
                + settings.attention_weight * losses["attention"]
                + settings.contrast_weight * losses[contrast]
                + settings.entailment_weight * losses["entailment"]
                + settings.composition_weight * losses.get("composition", 0.0)
            )
            assert losses["total"] == pytest.approx(expected, rel=1e-5)


def test_without_attributes_all_steps_are_phase_ones(learn: Learn) -> None:
    learned, steps = learn(attributes=())
    assert [step.phase for step in steps] == ["object"] * 4
    assert set(learned.tokens) == {"<cup-0>", "<cup-0-instance>", "<metal-ball-1>", "<metal-ball-1-instance>"}


def test_composability_can_be_left_out(learn: Learn) -> None:
    assert [step.phase for step in learn(compose_share=0)[1]] == ["object"] * 2 + ["attributes"] * 2


def test_the_category_stays_after_phase_one(learn: Learn) -> None:
    memory = Memory()
    with pytest.raises(Killed):
        learn(memory, kill_at=3, steps=4)
    assert memory.held is not None and memory.held[1]["step"] == 2
    learned, _ = learn(steps=4)
    assert torch.equal(memory.held[0]["row/<cup-0>/clip_l"], learned.tokens["<cup-0>"])
    assert torch.equal(memory.held[0]["row/<cup-0-instance>/clip_l"], learned.tokens["<cup-0-instance>"])


def test_attributes_start_from_the_instance_or_from_hints(
    learn: Learn, backbone: StableDiffusion, regions: list[Region]
) -> None:
    still = {"learning_rate": 1e-12, "weight_decay": 0, "steps": 2}
    tokens = learn(**still)[0].tokens
    torch.testing.assert_close(tokens["<cup-0-colour>"], tokens["<cup-0-instance>"])
    hinted = replace(regions[0], hints={"colour": {"red": 0.75, "green": 0.25}})
    tokens = learn(only=[hinted], **still)[0].tokens
    mean = 0.75 * row_of(backbone, "red") + 0.25 * row_of(backbone, "green")
    torch.testing.assert_close(tokens["<cup-0-colour>"], mean.float())
    torch.testing.assert_close(tokens["<cup-0-instance>"], mean.float())
    torch.testing.assert_close(tokens["<cup-0-material>"], mean.float())  # no hints of its own: the instance


@pytest.mark.slow
def test_the_losses_do_what_they_are_for(learn: Learn) -> None:
    """Each loss, when it weighs much, is smaller at the end than without it."""
    quiet = {"contrast_weight": 0.0, "entailment_weight": 0.0, "composition_weight": 0.0}
    settings = {"steps": 40, "learning_rate": 5e-3, "map_learning_rate": 1e-3, "compose_share": 0.25}

    def last(name: str, **weights: float) -> float:
        found = [step.losses[name] for step in learn(**settings, **(quiet | weights))[1] if name in step.losses]
        return sum(found[-4:]) / 4

    assert last("triplet", contrast_weight=10.0) < 0.8 * last("triplet")
    assert last("entailment", entailment_weight=10.0) < 0.5 * last("entailment")
    assert last("composition", composition_weight=10.0) < 0.5 * last("composition")


def test_chunks_change_nothing(learn: Learn) -> None:
    whole, halves = (learn(max_batch=size, weight_decay=0)[1] for size in (4, 1))
    for one, other in zip(whole, halves, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3)


@pytest.mark.parametrize("kill_at", [1, 4, 5, 6, 7, 8])
def test_a_killed_run_goes_on_bit_for_bit(learn: Learn, kill_at: int) -> None:
    settings = {"steps": 8, "checkpoint_every": 1}
    whole = learn(**settings)[0]
    memory = Memory()
    with pytest.raises(Killed):
        learn(memory, kill_at=kill_at, **settings)
    resumed, steps = learn(memory, **settings)
    assert steps[-1].step == 8
    assert_same(resumed.tokens, whole.tokens)
    with pytest.raises(InputError, match="other settings"):
        learn(memory, **(settings | {"margin": 0.5}))


@pytest.mark.slow
def test_a_run_that_was_killed_between_saves_goes_on_bit_for_bit(learn: Learn) -> None:
    settings = {"steps": 12, "checkpoint_every": 2, "anchors_entail": True, "contrast": "infonce"}
    whole = learn(**settings)[0]
    memory = Memory()
    for kill_at in (2, 5, 8, 11):
        with pytest.raises(Killed):
            learn(memory, kill_at=kill_at, **settings)
    assert_same(learn(memory, **settings)[0].tokens, whole.tokens)


def test_the_seed_decides(learn: Learn) -> None:
    assert_same(learn()[0].tokens, learn()[0].tokens)
    assert not torch.equal(learn()[0].tokens["<cup-0>"], learn(seed=1)[0].tokens["<cup-0>"])


# --- The ball --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hierarchy(backbone: StableDiffusion, regions: list[Region]) -> Hierarchy:
    task = Task(IMAGE, regions, ATTRIBUTES, 0, Memory(), lambda step: None)
    return Hierarchy(HyperExpressSettings(), backbone, task)


def test_texts_go_into_the_ball_by_their_map(hierarchy: Hierarchy) -> None:
    points = hierarchy.to_ball(hierarchy.words)
    # E has length one, W is 0.15 times the identity, and the exponential map doubles.
    torch.testing.assert_close(distance(points, torch.zeros_like(points)), torch.full((2,), 0.3))


def test_the_composer_finds_directions_on_the_anchors(hierarchy: Hierarchy, backbone: StableDiffusion) -> None:
    composer = Composer(hierarchy)
    size = hierarchy.words.shape[1]
    # cup, metal ball, colour, red, green, material, metal, wood: those that the model knows, less one, at most 8
    known = sum(backbone.knows(word) for word in ("red", "green", "metal", "wood"))
    assert composer.directions.shape == (size, min(8, 4 + known - 1, size))
    identity = torch.eye(composer.directions.shape[1])
    torch.testing.assert_close(composer.directions.T @ composer.directions, identity, atol=1e-5, rtol=0)
    assert composer.wholes.shape == (2, composer.directions.shape[1])
    torch.testing.assert_close(composer.represent(composer.centre), torch.zeros(composer.directions.shape[1]))


def test_what_represents_a_point_is_in_units_of_the_anchors_spread(hierarchy: Hierarchy) -> None:
    composer = Composer(hierarchy)
    step = exponential_map(0.1 * composer.directions[:, 0])  # 0.2 towards the first ideal point
    there = composer.represent(mobius_add(composer.centre, step))
    assert float(there[0]) == pytest.approx(0.2 / float(composer.spread), rel=1e-3)


# --- What can go wrong -----------------------------------------------------------------------------------------------


def test_more_attributes_than_fit_are_refused(learn: Learn) -> None:
    many = tuple(Attribute(f"trait{n}", anchor="colour", vocabulary=("red",)) for n in range(90))
    with pytest.raises(
        InputError, match=r"one prompt must hold a concept's category and all .* here 90: prompt too long"
    ):
        learn(attributes=many)


def test_a_broken_loss_names_itself(learn: Learn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperexpress, "entailment_loss", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(RunError, match=r"the entailment loss became nan in step 1 .*nothing was learned before it"):
        learn()


@pytest.mark.parametrize(("setting", "value"), [
    ("compose_share", 0.6), ("timestep_range", (0.9, 0.4)), ("aperture", 0), ("contrast", "cosine"), ("directions", 0),
])  # fmt: skip
def test_settings_refuse_what_cannot_work(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        HyperExpressSettings(**{setting: value})


def test_the_plugin_offers_it() -> None:
    plugins = installed()
    assert plugins.offered("learner")["hyperexpress"].origin.distribution == "icekit-neighbours"
    assert plugins.component("learner", "hyperexpress") is HyperExpressLearner
    for setting, field in HyperExpressSettings.model_fields.items():
        assert field.description, setting
