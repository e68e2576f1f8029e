"""Structured concept learning on a tiny model with random weights: what moves, what stays, and what survives a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import Killed, Memory, Taught, assert_same, learn_watched, noise_image, row_of, rows_of, two_regions
from torch import Tensor

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.builtin.learners.ice import IceLearner, IceLesson, IceSettings
from icekit.learning.training import Task
from icekit.protocols import Attribute, InputError, Region, RunError, Step
from icekit.randomness import seeded_generator

COLOUR = Attribute("colour", anchor="colour", vocabulary=("red", "green"))
MATERIAL = Attribute("material", anchor="material", vocabulary=("metal", "wood"))


@pytest.fixture(scope="module")
def backbone(sd_folder: Path) -> StableDiffusion:
    return StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")


@pytest.fixture(scope="module")
def image() -> Tensor:
    return noise_image()


@pytest.fixture(scope="module")
def regions() -> list[Region]:
    return two_regions()


Learn = Callable[..., tuple[Taught, list[Step]]]


@pytest.fixture
def learn(backbone: StableDiffusion, regions: list[Region]) -> Learn:
    def run(
        attributes: tuple[Attribute, ...] = (COLOUR, MATERIAL),
        checkpoint: Memory | None = None,
        kill_at: int | None = None,
        seed: int = 0,
        only: list[Region] | None = None,
        **settings: Any,
    ) -> tuple[Taught, list[Step]]:
        learner = IceLearner(IceSettings(**({"steps": 4} | settings)), backbone)
        return learn_watched(learner, only or regions, attributes, checkpoint=checkpoint, kill_at=kill_at, seed=seed)

    return run


def test_every_token_is_learned_and_every_step_reported(learn: Learn, backbone: StableDiffusion) -> None:
    learned, steps = learn()
    assert set(learned.tokens) == {
        f"<{stem}{kind}>" for stem in ("cup-0", "metal-ball-1") for kind in ("", "-instance", "-colour", "-material")
    }
    for row in learned.tokens.values():
        assert row.shape == (backbone.rows["clip_l"],) and row.dtype == torch.float32 and not row.requires_grad
    assert not learned.lora
    assert [(step.step, step.total, step.phase) for step in steps] == [
        (1, 4, "object"), (2, 4, "object"), (3, 4, "attributes"), (4, 4, "attributes"),
    ]  # fmt: skip
    for step in steps:
        assert set(step.losses) == {"reconstruction", "attention", "triplet", "total"}


def test_all_tokens_move_from_where_they_start(learn: Learn, backbone: StableDiffusion) -> None:
    tokens = learn()[0].tokens
    anchor = row_of(backbone, "cup")
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
        assert torch.equal(tokens[name], after_phase_one[f"row/{name}/clip_l"])


def test_nothing_but_the_rows_changes_or_gets_gradients(learn: Learn, backbone: StableDiffusion) -> None:
    parts = (backbone.unet, backbone._vae, backbone._text.model)
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    learn(refine_steps=1, prior_images=0)
    for part, state in zip(parts, before, strict=True):
        assert_same(part.state_dict(), state)
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())


def test_a_token_of_words_is_a_weighted_mean_of_their_rows(learn: Learn, backbone: StableDiffusion) -> None:
    """From the plain mean, in the direction that the loss says, and nowhere else."""
    words = torch.stack([row_of(backbone, word) for word in COLOUR.vocabulary])
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
    red, green, metal = (row_of(backbone, word) for word in ("red", "green", "metal"))
    hinted = [replace(regions[0], hints={"colour": {"red": 0.75, "green": 0.25}, "material": {"metal": 1.0}})]
    still = {"only": [*hinted, regions[1]], "learning_rate": 1e-12, "word_learning_rate": 1e-12, "weight_decay": 0}
    for rows in ("free", "words"):
        tokens = learn(attribute_rows=rows, **still)[0].tokens
        torch.testing.assert_close(tokens["<cup-0-colour>"], 0.75 * red + 0.25 * green)
        torch.testing.assert_close(tokens["<cup-0-instance>"], (0.75 * red + 0.25 * green + metal) / 2)
        torch.testing.assert_close(tokens["<metal-ball-1-instance>"], row_of(backbone, "metal ball"))


def test_the_category_may_learn_at_its_own_rate(learn: Learn, backbone: StableDiffusion) -> None:
    tokens = learn(category_learning_rate=1e-12, weight_decay=0)[0].tokens
    for name, word in (("<cup-0>", "cup"), ("<metal-ball-1>", "metal ball")):
        torch.testing.assert_close(tokens[name], row_of(backbone, word))
        assert not torch.equal(tokens[name.replace(">", "-instance>")], row_of(backbone, word))
    together = learn(category_learning_rate=5e-3, learning_rate=5e-3)[0].tokens
    assert not torch.equal(together["<cup-0>"], row_of(backbone, "cup"))


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


def test_rows_that_keep_their_length_learn_their_direction(learn: Learn) -> None:
    free, held = (
        learn(steps=8, learning_rate=5e-2)[0].tokens,
        learn(steps=8, learning_rate=5e-2, row_norm="keep")[0].tokens,
    )
    start = float(learn(steps=2, learning_rate=1e-9)[0].tokens["<cup-0>"].norm())
    for name, row in held.items():
        if name.startswith("<cup-0"):  # a category, an instance and attributes, which start where the instance ends
            assert float(row.norm()) == pytest.approx(start, rel=1e-4), name
            assert float(free[name].norm()) != pytest.approx(start, rel=1e-3), name


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Taught]:
    return {}


# Going on from nothing, the end of phase one, within phase two, the end of phase two, and within refinement.
@pytest.mark.parametrize(
    "kill_at", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow), 7, 9]
)
def test_a_killed_run_goes_on_bit_for_bit(learn: Learn, uninterrupted: dict[str, Taught], kill_at: int) -> None:
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
    import icekit.builtin.learners.ice as ice

    monkeypatch.setattr(ice, "object_triplet", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(
        RunError, match=r"the triplet loss became nan in step 1 \(phase object\); nothing was learned before it"
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


# --- As the published code does it ------------------------------------------------------------------------------------


LessonOf = Callable[..., IceLesson]


@pytest.fixture
def lesson_of(backbone: StableDiffusion, image: Tensor, regions: list[Region]) -> LessonOf:
    """What a call of ``learn`` starts from: its masks, latents, anchors and tokens before the first step."""

    def make(only: list[Region] | None = None, **settings: Any) -> IceLesson:
        task = Task(image, only or regions, (COLOUR, MATERIAL), 0, Memory(), lambda _: None)
        return IceLesson(IceSettings(**({"steps": 4} | settings)), backbone, task)

    return make


def test_one_concept_is_drawn_a_step_each_as_often(lesson_of: LessonOf, regions: list[Region]) -> None:
    three = lesson_of([*regions, replace(regions[0], index=2)], concepts_per_step="one")
    drawn = torch.tensor([three.concepts_of("learn", step) for step in range(1, 1201)])
    assert drawn.shape == (1200, 1)
    assert (drawn.flatten().bincount(minlength=3) - 400).abs().max() < 60  # 3.7 standard deviations


def test_a_step_of_one_concept_is_its_share_of_a_step_of_all(
    learn: Learn, lesson_of: LessonOf, backbone: StableDiffusion, regions: list[Region]
) -> None:
    """The same noise, timestep and template; the loss is that concept's, not divided by the number of concepts."""
    every = lesson_of()
    drawn = lesson_of(concepts_per_step="one").concepts_of("learn", 1)
    with torch.no_grad():
        draw, choices = every.draw(1), every.choices("learn", 1)
        expected = every._denoising_losses(draw, choices, drawn, [every.object_tokens(drawn[0])])
    losses = learn(concepts_per_step="one")[1][0].losses
    assert losses["reconstruction"] == pytest.approx(expected["reconstruction"].item(), rel=1e-4)
    assert losses["attention"] == pytest.approx(expected["attention"].item(), rel=1e-4)
    assert losses["triplet"] == pytest.approx(0.05, rel=1e-4)  # both tokens are at their anchor: the margin
    assert losses["total"] == pytest.approx(losses["reconstruction"] + 1e-5 * losses["attention"] + 0.05, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["each", "one"])
def test_a_concept_that_is_not_drawn_stays_or_decays(
    learn: Learn, lesson_of: LessonOf, backbone: StableDiffusion, optimizer: str
) -> None:
    """With an optimiser for each it stays as it is; as one row of many it decays, for its moments are zero still."""
    lesson = lesson_of(concepts_per_step="one")
    seed = next(seed for seed in range(99) if all(drawn(lesson, seed, step) == [0] for step in (1, 2)))
    settings = {"concepts_per_step": "one", "optimizer": optimizer, "weight_decay": 0.5, "learning_rate": 1e-2}
    tokens = learn((), steps=2, seed=seed, **settings)[0].tokens
    left = 1.0 if optimizer == "each" else (1 - 1e-2 * 0.5) ** 2
    for name in ("<metal-ball-1>", "<metal-ball-1-instance>"):
        torch.testing.assert_close(tokens[name], left * row_of(backbone, "metal ball"))
    assert (tokens["<cup-0>"] - row_of(backbone, "cup")).abs().max() > 5e-3


def drawn(lesson: IceLesson, seed: int, step: int) -> list[int]:
    lesson.seed = seed
    return lesson.concepts_of("learn", step)


@pytest.mark.parametrize("optimizer", ["each", "one"])
def test_phase_two_starts_anew_or_goes_on_with_phase_ones_adamw(learn: Learn, optimizer: str) -> None:
    """The first step of an attribute's row is what AdamW makes of its moments and the number of steps so far."""

    def saved_before(kill_at: int) -> dict[str, Tensor]:
        memory = Memory()
        with pytest.raises(Killed):
            learn(
                steps=8, optimizer=optimizer, weight_decay=0.0, checkpoint_every=1, checkpoint=memory, kill_at=kill_at
            )
        assert memory.held is not None and memory.held[1]["step"] == kill_at - 1
        return memory.held[0]

    phase_one, then = saved_before(5), saved_before(6)
    steps = 5 if optimizer == "one" else 1
    mean, square = (then[f"adamw.{kind}/<cup-0-colour>/clip_l"] for kind in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(mean.square() / 0.1**2, square / 0.001)  # both of one gradient: they were zero
    assert then["adamw.step/<cup-0-colour>/clip_l"].item() == steps
    step = 5e-4 * (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
    start = phase_one["row/<cup-0-instance>/clip_l"]
    torch.testing.assert_close(then["row/<cup-0-colour>/clip_l"] - start, -step, rtol=1e-3, atol=1e-7)
    assert torch.equal(then["row/<cup-0>/clip_l"], phase_one["row/<cup-0>/clip_l"])
    # No prompt has the instance any more. As one row of many it has its momentum still.
    assert torch.equal(then["row/<cup-0-instance>/clip_l"], start) == (optimizer == "each")


def test_the_triplet_of_phase_two_in_both_forms(lesson_of: LessonOf) -> None:
    """All tokens at the word, so at the category's anchor: what is left can be computed from the anchors alone."""
    for settings, anchors in (
        ({"intrinsic_form": "pairs"}, ["cup", "colour", "material"]),
        ({"intrinsic_form": "tokens"}, ["cup", "colour", "material"]),
        (
            {"intrinsic_form": "tokens", "attribute_anchor": "a {} concept"},
            ["cup", "a colour concept", "a material concept"],
        ),
    ):
        lesson = lesson_of(**settings)
        with torch.no_grad():
            cup, *others = lesson.backbone.embed_texts(anchors)
            actual = lesson.intrinsic_triplet([0])
            gamma = {
                (j, k): 0.7 * (one - other).square()
                for j, one in enumerate([cup, *others])
                for k, other in enumerate([cup, *others])
            }
        terms = {pair: value.mean().item() for pair, value in gamma.items() if pair[0] != pair[1]}
        expected = {
            "pairs": sum(terms.values()) / 6,
            "tokens": (terms[0, 1] + terms[0, 2]) / 2 + terms[1, 2] + terms[2, 1],
        }
        assert actual.item() == pytest.approx(expected[settings["intrinsic_form"]], rel=1e-4)


def test_triplets_may_read_a_new_token_at_itself(lesson_of: LessonOf, backbone: StableDiffusion) -> None:
    lesson = lesson_of(pooling="highest")
    with torch.no_grad():
        [own] = lesson._embed(["<cup-0>"])
        sequence = backbone.encode_prompts(["<cup-0>"], lesson.tokens).parts["sequence"][0]
        torch.testing.assert_close(own, torch.nn.functional.normalize(sequence[1], dim=-1))
        torch.testing.assert_close(lesson.word_anchors, backbone.embed_texts(["cup", "metal ball"]))  # at their ends
        torch.testing.assert_close(lesson_of()._embed(["<cup-0>"])[0], backbone.embed_texts(["cup"])[0])


def test_a_token_may_start_from_the_first_piece_of_its_word(lesson_of: LessonOf, backbone: StableDiffusion) -> None:
    rows = rows_of(lesson_of(word_row="first").tokens)
    assert torch.equal(rows["<metal-ball-1>"], row_of(backbone, "metal"))
    assert torch.equal(rows["<cup-0>"], row_of(backbone, "cup"))


@pytest.mark.slow
def test_latents_may_be_a_sample_anew_in_every_step(
    learn: Learn, backbone: StableDiffusion, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    add_noise = backbone.add_noise

    def watching(latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        seen.append(latents)
        return add_noise(latents, noise, shares)

    monkeypatch.setattr(backbone, "add_noise", watching)
    settings = {"attributes": (), "steps": 12, "flip_probability": 0, "learning_rate": 1e-6}
    learn(latents="sample", **settings)
    both = torch.stack([image, image.flip(-1)])
    mean, deviation = (part[:1] for part in backbone.posterior(both))
    standard = ((torch.cat(seen) - mean) / deviation).flatten(1)  # of 12 steps and two concepts
    assert standard.std().item() == pytest.approx(1, abs=0.025)  # 5 standard deviations
    assert (standard @ standard.T / standard.shape[1]).fill_diagonal_(0).abs().max() < 0.2  # all of them others
    first = torch.cat(seen)
    seen.clear()
    learn(latents="sample", **settings)
    assert torch.equal(torch.cat(seen), first)
    seen.clear()
    learn(**settings)
    assert torch.equal(torch.cat(seen), mean.expand(24, -1, -1, -1))


def test_a_sample_needs_a_backbone_that_has_a_posterior(
    backbone: StableDiffusion, image: Tensor, regions: list[Region]
) -> None:
    class Without:
        def __getattr__(self, name: str) -> Any:
            if name == "posterior":
                raise AttributeError(name)
            return getattr(backbone, name)

    task: Any = (image, regions, ())
    others: Any = {"seed": 0, "checkpoint": Memory(), "on_step": lambda _: None}
    IceLearner(IceSettings(steps=2), Without()).learn(*task, **others)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"learner.latents = 'sample': this backbone has no posterior"):
        IceLearner(IceSettings(steps=2, latents="sample"), Without()).learn(*task, **others)  # type: ignore[arg-type]


def test_masks_may_be_taken_by_nearest_neighbour(lesson_of: LessonOf, regions: list[Region]) -> None:
    lesson = lesson_of(mask_cells="nearest", attention_grid=8)
    masks = torch.stack([region.mask for region in regions])
    for side, flipped in ((0, masks), (1, masks.flip(-1))):
        assert torch.equal(lesson.pictures.masks[:, 0, side], flipped[:, ::8, ::8].float())
        assert torch.equal(lesson.pictures.attention_masks[:, 0, side], flipped[:, ::16, ::16].float())
    speck = torch.zeros(128, 128, dtype=torch.bool)
    speck[66, 66] = True
    vanishing = lesson_of([replace(regions[0], mask=speck)], mask_cells="nearest", attention_grid=8)
    assert vanishing.pictures.masks[0, 0, 0].nonzero().tolist() == [[8, 8]]
    assert vanishing.pictures.attention_masks[0, 0, 0].nonzero().tolist() == [[4, 4]]


PUBLISHED = {
    "concepts_per_step": "one",
    "optimizer": "one",
    "intrinsic_form": "tokens",
    "pooling": "highest",
    "word_row": "first",
    "latents": "sample",
    "mask_cells": "nearest",
}


@pytest.mark.parametrize(
    ("attribute_rows", "checkpoint_every"), [("free", 1), pytest.param("words", 2, marks=pytest.mark.slow)]
)
def test_all_of_it_goes_on_bit_for_bit_from_any_step(learn: Learn, attribute_rows: str, checkpoint_every: int) -> None:
    settings = PUBLISHED | {"steps": 6, "checkpoint_every": checkpoint_every, "attribute_rows": attribute_rows}
    whole = learn(**settings)[0]
    for kill_at in range(1, 7):
        memory = Memory()
        with pytest.raises(Killed):
            learn(checkpoint=memory, kill_at=kill_at, **settings)
        assert_same(learn(checkpoint=memory, **settings)[0].tokens, whole.tokens)


WEIGHED = {"word_steps": 3, "close_ups": 2, "attribute_rows": "words", "max_batch": 3}


def test_weighed_words_are_where_tokens_start(learn: Learn, backbone: StableDiffusion) -> None:
    """Nothing is learned after it (rates of almost zero): an attribute is a mean of its words' rows, and no longer the
    plain one; the instance is the mean of these.
    """
    still = {"learning_rate": 1e-12, "word_learning_rate": 1e-12, "weight_decay": 0}
    tokens, steps = learn(**WEIGHED, **still)
    assert [(step.step, step.phase) for step in steps] == [
        (1, "words"), (2, "words"), (3, "words"), (4, "object"), (5, "object"), (6, "attributes"), (7, "attributes"),
    ]  # fmt: skip
    words = torch.stack([row_of(backbone, word) for word in COLOUR.vocabulary])
    colour, material = tokens.tokens["<cup-0-colour>"], tokens.tokens["<cup-0-material>"]
    weights = torch.linalg.lstsq(words.T, colour).solution
    torch.testing.assert_close(weights @ words, colour)
    assert weights.sum().item() == pytest.approx(1, abs=1e-4) and abs(weights[0] - weights[1]) > 0.01
    torch.testing.assert_close(tokens.tokens["<cup-0-instance>"], (colour + material) / 2)


def test_what_the_retriever_saw_is_where_weighing_starts(learn: Learn, regions: list[Region]) -> None:
    seen = [replace(regions[0], hints={"colour": {"red": 0.01, "green": 0.99}})]
    tokens = [
        learn(only=only, **WEIGHED | {"word_rate": 1e-6})[0].tokens["<cup-0-colour>"] for only in (seen, regions[:1])
    ]
    assert not torch.allclose(tokens[0], tokens[1])


def test_how_much_the_retriever_is_trusted(learn: Learn, backbone: StableDiffusion, regions: list[Region]) -> None:
    """Nothing is weighed at a rate of nothing: its probabilities, squared and sharpened, are what is left."""
    seen = [replace(regions[0], hints={"colour": {"red": 0.4, "green": 0.6}}), regions[1]]
    still = {"word_sharpness": 1.0, "word_trust": 2.0, "weight_decay": 0}
    still |= {"word_rate": 1e-9, "learning_rate": 1e-12, "word_learning_rate": 1e-12}
    token = learn(only=seen, **WEIGHED | still)[0].tokens["<cup-0-colour>"]
    red, green = (row_of(backbone, word) for word in ("red", "green"))
    torch.testing.assert_close(token, (0.16 * red + 0.36 * green) / 0.52)


def test_weighing_words_leaves_no_trial_behind(learn: Learn, backbone: StableDiffusion) -> None:
    learn(**WEIGHED)
    with pytest.raises(InputError, match="unknown token <colour-word-0>"):
        backbone.encode_prompts(["a photo of a <colour-word-0>"])


@pytest.mark.parametrize("kill_at", [1, 3, 6])
def test_weighing_goes_on_bit_for_bit_from_any_step(learn: Learn, kill_at: int) -> None:
    whole = learn(**WEIGHED, checkpoint_every=1)[0].tokens
    memory = Memory()
    with pytest.raises(Killed):
        learn(**WEIGHED, checkpoint_every=1, checkpoint=memory, kill_at=kill_at)
    assert_same(learn(**WEIGHED, checkpoint_every=1, checkpoint=memory)[0].tokens, whole)


def test_an_anchor_text_has_one_place_for_the_attributes_own() -> None:
    with pytest.raises(ValueError, match=r"'a concept': must have \{\} exactly once"):
        IceSettings(attribute_anchor="a concept")


def test_a_step_draws_the_same_whatever_came_before() -> None:
    first = torch.rand(3, generator=seeded_generator(1, "learn", 7))
    seeded_generator(1, "learn", 6)
    assert torch.equal(first, torch.rand(3, generator=seeded_generator(1, "learn", 7)))
    assert not torch.equal(first, torch.rand(3, generator=seeded_generator(2, "learn", 7)))
    assert not torch.equal(first, torch.rand(3, generator=seeded_generator(1, "refine", 7)))
