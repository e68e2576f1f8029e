"""Structured concept learning on a tiny model with random weights: what moves, what stays, and what survives a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import Killed, Memory, assert_same, two_regions
from torch import Tensor

from icekit.builtin.ice import IceLearner, IceSettings, nearest_resolution, step_generator
from icekit.builtin.stable_diffusion import StableDiffusion
from icekit.protocols import Attribute, InputError, Learned, Region, RunError, Step

COLOUR = Attribute("colour", anchor="colour", vocabulary=("red", "green"))
MATERIAL = Attribute("material", anchor="material", vocabulary=("metal", "wood"))


@pytest.fixture(scope="module")
def backbone(sd_folder: Path) -> StableDiffusion:
    return StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def regions() -> list[Region]:
    return two_regions()


Learn = Callable[..., tuple[Learned, list[Step]]]


@pytest.fixture
def learn(backbone: StableDiffusion, image: Tensor, regions: list[Region]) -> Learn:
    def run(
        attributes: tuple[Attribute, ...] = (COLOUR, MATERIAL),
        checkpoint: Memory | None = None,
        kill_at: int | None = None,
        seed: int = 0,
        only: list[Region] | None = None,
        **settings: Any,
    ) -> tuple[Learned, list[Step]]:
        steps: list[Step] = []

        def on_step(step: Step) -> None:
            steps.append(step)
            if step.step == kill_at:
                raise Killed

        learner = IceLearner(IceSettings(**({"steps": 4} | settings)), backbone)
        learned = learner.learn(
            image, only or regions, attributes, seed=seed, checkpoint=checkpoint or Memory(), on_step=on_step
        )
        return learned, steps

    return run


def test_every_token_is_learned_and_every_step_reported(learn: Learn, backbone: StableDiffusion) -> None:
    learned, steps = learn()
    assert set(learned.tokens) == {
        f"<{stem}{kind}>" for stem in ("cup-0", "metal-ball-1") for kind in ("", "-instance", "-colour", "-material")
    }
    for row in learned.tokens.values():
        assert row.shape == (backbone.embedding_dim,) and row.dtype == torch.float32 and not row.requires_grad
    assert not learned.lora
    assert [(step.step, step.total, step.phase) for step in steps] == [
        (1, 4, "object"), (2, 4, "object"), (3, 4, "attributes"), (4, 4, "attributes"),
    ]  # fmt: skip
    for step in steps:
        assert set(step.losses) == {"reconstruction", "attention", "triplet", "total"}


def test_all_tokens_move_from_where_they_start(learn: Learn, backbone: StableDiffusion) -> None:
    tokens = learn()[0].tokens
    anchor = backbone.word_embedding("cup")
    assert not torch.equal(tokens["<cup-0>"], anchor)
    assert not torch.equal(tokens["<cup-0-instance>"], anchor)
    assert not torch.equal(tokens["<cup-0>"], tokens["<cup-0-instance>"])
    assert not torch.equal(tokens["<cup-0-colour>"], tokens["<cup-0-instance>"])
    assert not torch.equal(tokens["<cup-0-colour>"], tokens["<cup-0-material>"])


def test_category_and_instance_are_frozen_in_phase_two(learn: Learn) -> None:
    memory = Memory()
    with pytest.raises(Killed):
        learn(checkpoint=memory, kill_at=3, steps=4)
    assert memory.held is not None and memory.held[1]["step"] == 2
    after_phase_one = memory.held[0]
    tokens = learn(steps=4)[0].tokens
    for name in ("<cup-0>", "<cup-0-instance>", "<metal-ball-1>", "<metal-ball-1-instance>"):
        assert torch.equal(tokens[name], after_phase_one[f"row/{name}"])


def test_nothing_but_the_rows_changes_or_gets_gradients(learn: Learn, backbone: StableDiffusion) -> None:
    parts = (backbone.unet, backbone._vae, backbone._text.model)
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    learn(refine_steps=1, prior_images=0)
    for part, state in zip(parts, before, strict=True):
        assert_same(part.state_dict(), state)
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())


def test_a_token_of_words_is_a_weighted_mean_of_their_rows(learn: Learn, backbone: StableDiffusion) -> None:
    """From the plain mean, in the direction that the loss says, and nowhere else."""
    words = torch.stack([backbone.word_embedding(word) for word in COLOUR.vocabulary])
    tokens = learn(attribute_rows="words", word_learning_rate=0.3, steps=8)[0].tokens
    for name in ("<cup-0-colour>", "<metal-ball-1-colour>"):
        weights = torch.linalg.lstsq(words.T, tokens[name]).solution
        torch.testing.assert_close(weights @ words, tokens[name])
        assert weights.min() > 0 and weights.sum().item() == pytest.approx(1, abs=1e-4)
        assert (weights - 0.5).abs().max() > 0.01


def test_tokens_start_from_what_the_retriever_saw(
    learn: Learn, backbone: StableDiffusion, regions: list[Region]
) -> None:
    """Attributes as the mean of the words' rows, each as much as it is likely; the instance as the mean of these."""
    red, green, metal = (backbone.word_embedding(word) for word in ("red", "green", "metal"))
    hinted = [replace(regions[0], hints={"colour": {"red": 0.75, "green": 0.25}, "material": {"metal": 1.0}})]
    still = {"only": [*hinted, regions[1]], "learning_rate": 1e-12, "word_learning_rate": 1e-12, "weight_decay": 0}
    for rows in ("free", "words"):
        tokens = learn(attribute_rows=rows, **still)[0].tokens
        torch.testing.assert_close(tokens["<cup-0-colour>"], 0.75 * red + 0.25 * green)
        torch.testing.assert_close(tokens["<cup-0-instance>"], (0.75 * red + 0.25 * green + metal) / 2)
        torch.testing.assert_close(tokens["<metal-ball-1-instance>"], backbone.word_embedding("metal ball"))


def test_the_category_may_learn_at_its_own_rate(learn: Learn, backbone: StableDiffusion) -> None:
    tokens = learn(category_learning_rate=1e-12, weight_decay=0)[0].tokens
    for name, word in (("<cup-0>", "cup"), ("<metal-ball-1>", "metal ball")):
        torch.testing.assert_close(tokens[name], backbone.word_embedding(word))
        assert not torch.equal(tokens[name.replace(">", "-instance>")], backbone.word_embedding(word))
    together = learn(category_learning_rate=5e-3, learning_rate=5e-3)[0].tokens
    assert not torch.equal(together["<cup-0>"], backbone.word_embedding("cup"))


def test_a_vocabulary_of_one_word_leaves_the_token_free(learn: Learn) -> None:
    lone = Attribute("shine", anchor="metal", vocabulary=("metal",))
    free = learn(attributes=(lone,))[0].tokens
    assert_same(learn(attributes=(lone,), attribute_rows="words")[0].tokens, free)


def test_a_killed_run_of_word_tokens_goes_on_bit_for_bit(learn: Learn) -> None:
    settings = {"attribute_rows": "words", "steps": 6, "checkpoint_every": 1}
    whole = learn(**settings)[0]
    memory = Memory()
    with pytest.raises(Killed):
        learn(checkpoint=memory, kill_at=5, **settings)
    assert_same(learn(checkpoint=memory, **settings)[0].tokens, whole.tokens)
    assert_same(learn(checkpoint=memory, **settings)[0].tokens, whole.tokens)  # complete already


def test_without_attributes_all_steps_are_phase_one(learn: Learn) -> None:
    learned, steps = learn(attributes=(), steps=3)
    assert [step.phase for step in steps] == ["object"] * 3
    assert set(learned.tokens) == {"<cup-0>", "<cup-0-instance>", "<metal-ball-1>", "<metal-ball-1-instance>"}


def test_many_attributes(learn: Learn) -> None:
    attributes = tuple(Attribute(name, name, ()) for name in ("colour", "material", "texture", "shape", "age", "mood"))
    learned, _ = learn(attributes=attributes, steps=2)
    assert len(learned.tokens) == 2 * 8


def test_too_many_attributes_for_a_prompt(learn: Learn) -> None:
    attributes = tuple(Attribute(f"a{n}", "colour", ()) for n in range(80))
    with pytest.raises(InputError, match=r"80 attributes are too many: .* at most 6\d fit"):
        learn(attributes=attributes, steps=2)


def test_losses_go_down(learn: Learn) -> None:
    _, steps = learn(
        steps=40, learning_rate=5e-2, object_margin=0.0, intrinsic_triplet_weight=10.0, attention_weight=1e-3
    )
    phase_two = [step.losses["triplet"] for step in steps if step.phase == "attributes"]
    assert sum(phase_two[-5:]) < 0.8 * sum(phase_two[:5])
    phase_one = [step.losses["triplet"] for step in steps if step.phase == "object"]
    assert phase_one[-1] == 0.0  # satisfied, and no NaN from it


def test_attention_loss_moves_attention_onto_the_mask(learn: Learn, regions: list[Region]) -> None:
    def distances(weight: float) -> list[float]:
        # The same draws in every run, so that the distances compare step by step.
        _, steps = learn(
            (), only=regions[:1], steps=12, learning_rate=0.1, attention_weight=weight, object_triplet_weight=0
        )
        return [step.losses["attention"] for step in steps]

    without, with_loss = distances(0.0), distances(100.0)
    assert without[0] == with_loss[0]
    assert sum(with_loss[-6:]) < sum(without[-6:])


def test_same_seed_same_tokens_other_seed_others(learn: Learn) -> None:
    first, again, other = learn(seed=3)[0].tokens, learn(seed=3)[0].tokens, learn(seed=4)[0].tokens
    assert_same(first, again)
    assert not torch.equal(first["<cup-0>"], other["<cup-0>"])


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Learned]:
    return {}


# Going on from nothing, the end of phase one, within phase two, the end of phase two, and within refinement.
@pytest.mark.parametrize("kill_at", [1, 4, 5, 7, 9])
def test_a_killed_run_goes_on_bit_for_bit(learn: Learn, uninterrupted: dict[str, Learned], kill_at: int) -> None:
    settings = {"steps": 6, "checkpoint_every": 2, "refine_steps": 3, "prior_images": 1, "refine_learning_rate": 1e-2}
    if not uninterrupted:
        uninterrupted["learned"] = learn(**settings)[0]
    whole = uninterrupted["learned"]
    memory = Memory()
    with pytest.raises(Killed):
        learn(checkpoint=memory, kill_at=kill_at, **settings)
    resumed, steps = learn(checkpoint=memory, **settings)
    assert steps[-1].step == 9 and steps[0].step <= kill_at + 1
    assert_same(resumed.tokens, whole.tokens)
    assert_same(resumed.lora, whole.lora)
    finished, none = learn(checkpoint=memory, **settings)
    assert not none
    assert_same(finished.tokens, whole.tokens)
    assert_same(finished.lora, whole.lora)


def test_a_saved_state_of_another_run_is_refused(learn: Learn) -> None:
    memory = Memory()
    learn(checkpoint=memory)
    with pytest.raises(InputError, match="other settings"):
        learn(checkpoint=memory, learning_rate=1e-3)
    with pytest.raises(InputError, match="other seed"):
        learn(checkpoint=memory, seed=5)
    learn(checkpoint=memory, checkpoint_every=7)  # how often it is saved changes nothing


def test_in_turns_is_as_together(learn: Learn) -> None:
    together, steps_together = learn(max_batch=2)
    in_turns, steps_in_turns = learn(max_batch=1)
    for name, row in together.tokens.items():
        torch.testing.assert_close(in_turns.tokens[name], row, atol=2e-4, rtol=0)
    for one, other in zip(steps_together, steps_in_turns, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3)


def test_refinement_gives_a_lora_that_diffusers_loads(learn: Learn, sd_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    learned, steps = learn(steps=2, refine_steps=3, refine_rank=2, prior_images=2, refine_learning_rate=1e-2)
    assert [step.phase for step in steps] == ["object", "attributes", "refine", "refine", "refine"]
    assert set(steps[-1].losses) == {"reconstruction", "attention", "prior", "total"}
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 32)
    with torch.no_grad():
        before = pipeline.unet(*inputs).sample
        pipeline.load_lora_weights(dict(learned.lora))
        after = pipeline.unet(*inputs).sample
    loaded = {
        f"unet.{name.replace('.default_0.', '.')}": value
        for name, value in pipeline.unet.state_dict().items()
        if ".default_0." in name
    }
    assert set(loaded) == set(learned.lora)
    for name, value in loaded.items():
        assert torch.equal(value, learned.lora[name])
    assert not torch.allclose(before, after)


def test_a_broken_loss_names_itself(learn: Learn, monkeypatch: pytest.MonkeyPatch) -> None:
    import icekit.builtin.ice as ice

    monkeypatch.setattr(ice, "object_triplet", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(
        RunError, match=r"the triplet loss became nan in step 1 \(phase object\); .*lower learner.learning_rate"
    ):
        learn()


def test_an_empty_mask_is_refused(learn: Learn) -> None:
    with pytest.raises(InputError, match=r"the mask of 'cup' \(concept 0\) is empty"):
        learn(only=[Region(0, "cup", 0.1, torch.zeros(128, 128, dtype=torch.bool))])


def test_a_tiny_mask_still_learns(learn: Learn) -> None:
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[64, 64] = True
    _, steps = learn(only=[Region(0, "cup", 0.1, mask)])
    assert all(step.losses["reconstruction"] > 0 for step in steps)


def test_settings_refuse_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="exactly once"):
        IceSettings(templates=("a photo",))
    with pytest.raises(ValueError, match="extra"):
        IceSettings(step=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="two rising shares"):
        IceSettings(timestep_range=(0.9, 0.4))
    assert IceSettings().steps == 800


def test_nearest_resolution() -> None:
    assert nearest_resolution((64, 32, 16, 8)) == 16
    assert nearest_resolution((8, 4)) == 8
    assert nearest_resolution((32, 8)) == 32


def test_a_step_draws_the_same_whatever_came_before() -> None:
    first = torch.rand(3, generator=step_generator(1, "learn", 7))
    step_generator(1, "learn", 6)
    assert torch.equal(first, torch.rand(3, generator=step_generator(1, "learn", 7)))
    assert not torch.equal(first, torch.rand(3, generator=step_generator(2, "learn", 7)))
    assert not torch.equal(first, torch.rand(3, generator=step_generator(1, "refine", 7)))
