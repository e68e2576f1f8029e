"""What each learner is known for, by hand; and all of them on a tiny model with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from icekit_neighbours import break_a_scene, conceptexpress, dreambooth, pictures, textual_inversion
from learning import Killed, Memory, assert_same, two_regions

from icekit.builtin.stable_diffusion import StableDiffusion
from icekit.protocols import Attribute, InputError, Learned, Region, RunError, Step

COLOUR = Attribute("colour", anchor="colour", vocabulary=("red", "green"))
LEARNERS: dict[str, type] = {
    "textual-inversion": textual_inversion.TextualInversionLearner,
    "dreambooth": dreambooth.DreamBoothLearner,
    "break-a-scene": break_a_scene.BreakASceneLearner,
    "conceptexpress": conceptexpress.ConceptExpressLearner,
}
QUICK: dict[str, dict[str, Any]] = {
    "textual-inversion": {"backgrounds": 2},
    "dreambooth": {"backgrounds": 2, "prior_images": 1},
    "break-a-scene": {"prior_images": 1},
    "conceptexpress": {"split_share": 0.5, "split_tokens": 2},
}


# --- By hand ---------------------------------------------------------------------------------------------------------


def test_union_sampling_takes_every_subset() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(break_a_scene.union_sample(3, generator)) for _ in range(200)}
    assert seen == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)}


def test_a_union_covers_all_of_its_masks() -> None:
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert break_a_scene.union(masks).tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_attention_loss_by_hand() -> None:
    attention = torch.tensor([[[0.2, 0.1], [0.0, 0.05]]])  # over its maximum: 1, 0.5, 0, 0.25
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert float(break_a_scene.attention_loss(attention, mask)) == pytest.approx((0.5**2 + 0.25**2) / 4)
    assert float(break_a_scene.attention_loss(mask * 0.3, mask)) == 0


def test_contrastive_loss_by_hand() -> None:
    one, other = [1.0, 0.0], [0.0, 3.0]  # cosines: 1 within a concept, 0 across
    loss = conceptexpress.contrastive_loss(torch.tensor([[one, one], [other, other]]), temperature=1.0)
    assert float(loss) == pytest.approx(math.log((math.e + 2) / math.e))
    mixed = conceptexpress.contrastive_loss(torch.tensor([[one, other], [other, one]]), temperature=1.0)
    assert float(mixed) == pytest.approx(math.log((1 + 1 + math.e) / 1))


def test_contrastive_loss_pulls_together_and_pushes_apart() -> None:
    tokens = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def cosines() -> tuple[float, float]:
        unit = torch.nn.functional.normalize(tokens.detach().flatten(0, 1), dim=-1)
        same = torch.arange(12)[:, None] // 4 == torch.arange(12)[None, :] // 4
        return float((unit @ unit.T)[same].mean()), float((unit @ unit.T)[~same].mean())

    within, across = cosines()
    optimizer = torch.optim.SGD([tokens], lr=5.0)
    for _ in range(30):
        optimizer.zero_grad()
        conceptexpress.contrastive_loss(tokens, 0.5).backward()
        optimizer.step()
    assert cosines()[0] > within + 0.3
    assert cosines()[1] < across - 0.02


def test_one_concept_or_one_token_has_nothing_to_contrast() -> None:
    tokens = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert float(conceptexpress.contrastive_loss(tokens[:1], 0.07)) == pytest.approx(0, abs=1e-6)
    assert float(conceptexpress.contrastive_loss(tokens[:, :1], 0.07)) == 0


def test_an_object_alone_is_before_plain_colours() -> None:
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    colours = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    shown = pictures.alone(image, mask, colours)
    assert shown.shape == (2, 3, 4, 4)
    assert torch.equal(shown[0][:, mask], image[:, mask]) and torch.equal(shown[1][:, mask], image[:, mask])
    assert torch.equal(shown[0][:, ~mask], colours[0][:, None].expand(3, 12))


# --- On a tiny model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(sd_folder: Path) -> StableDiffusion:
    return StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")


@pytest.fixture(scope="module")
def regions() -> list[Region]:
    return two_regions()


Learn = Callable[..., tuple[Learned, list[Step]]]


@pytest.fixture
def learn(backbone: StableDiffusion, regions: list[Region], monkeypatch: pytest.MonkeyPatch) -> Learn:
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    generate = backbone.generate
    monkeypatch.setattr(backbone, "generate", lambda prompts, seeds: generate(prompts, seeds=seeds, steps=1))

    def run(
        name: str,
        checkpoint: Memory | None = None,
        kill_at: int | None = None,
        only: list[Region] | None = None,
        **settings: Any,
    ) -> tuple[Learned, list[Step]]:
        steps: list[Step] = []

        def on_step(step: Step) -> None:
            steps.append(step)
            if step.step == kill_at:
                raise Killed

        cls: Any = LEARNERS[name]
        learner = cls(cls.Settings(**({"steps": 2} | QUICK[name] | settings)), backbone)
        given = only or regions
        return learner.learn(image, given, (COLOUR,), seed=0, checkpoint=checkpoint or Memory(), on_step=on_step), steps

    return run


@pytest.mark.parametrize("name", LEARNERS)
def test_one_row_stands_for_all_of_a_concepts_tokens(learn: Learn, backbone: StableDiffusion, name: str) -> None:
    before = {key: value.clone() for key, value in backbone.unet.state_dict().items()}
    learned, steps = learn(name)
    tokens = learned.tokens
    assert set(tokens) == {
        f"<{stem}{kind}>" for stem in ("cup-0", "metal-ball-1") for kind in ("", "-instance", "-colour")
    }
    assert all(row.dtype == torch.float32 and row.shape == (backbone.embedding_dim,) for row in tokens.values())
    assert torch.equal(tokens["<cup-0-colour>"], tokens["<cup-0-instance>"])
    assert torch.equal(tokens["<cup-0>"], tokens["<cup-0-instance>"]) == (name != "dreambooth")
    assert not torch.equal(tokens["<cup-0-instance>"], tokens["<metal-ball-1-instance>"])
    assert [step.step for step in steps] == [1, 2] and all(step.total == 2 for step in steps)
    # The model is as it was, and nothing in it asks for gradients.
    assert_same(backbone.unet.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())


def test_textual_inversion_learns_tokens_and_nothing_else(learn: Learn, backbone: StableDiffusion) -> None:
    learned, steps = learn("textual-inversion", batch_size=2)
    assert not learned.lora
    assert not torch.equal(learned.tokens["<cup-0>"], backbone.word_embedding("cup"))
    assert [step.phase for step in steps] == ["embeddings", "embeddings"]
    assert set(steps[0].losses) == {"reconstruction", "total"}


def test_textual_inversion_scales_its_rate_by_the_batch(learn: Learn, backbone: StableDiffusion) -> None:
    # AdamW's first step moves every number by the learning rate.
    row = learn("textual-inversion", steps=1, batch_size=3, learning_rate=1e-3, weight_decay=0)[0].tokens["<cup-0>"]
    moved = (row - backbone.word_embedding("cup")).abs()
    assert float(moved.median()) == pytest.approx(3e-3, rel=1e-2)


def test_dreambooth_binds_a_rare_word_by_the_weights(learn: Learn, backbone: StableDiffusion) -> None:
    learned, steps = learn("dreambooth")
    assert torch.equal(learned.tokens["<cup-0-instance>"], backbone.word_embedding("sks"))
    assert torch.equal(learned.tokens["<metal-ball-1-instance>"], backbone.word_embedding("ohwx"))
    assert torch.equal(learned.tokens["<cup-0>"], backbone.word_embedding("cup"))
    assert set(steps[0].losses) == {"reconstruction", "prior", "total"}
    assert all(bool(weight.any()) for key, weight in learned.lora.items() if ".lora_B." in key)  # they start at zero
    with pytest.raises(InputError, match="1 rare words for 2 concepts"):
        learn("dreambooth", identifiers=("sks",))


def test_dreambooth_without_prior_images(learn: Learn) -> None:
    assert set(learn("dreambooth", prior_images=0, steps=1)[1][0].losses) == {"reconstruction", "total"}


def test_break_a_scene_learns_tokens_then_weights_from_subsets(
    learn: Learn, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    encode = backbone.encode_prompts
    monkeypatch.setattr(backbone, "encode_prompts", lambda given: prompts.extend(given) or encode(given))
    learned, steps = learn("break-a-scene", steps=4, prior_images=0, batch_size=3)
    assert [step.phase for step in steps] == ["embeddings"] * 2 + ["weights"] * 2
    assert set(prompts) == {
        "a photo of <cup-0>", "a photo of <metal-ball-1>", "a photo of <cup-0> and <metal-ball-1>",
    }  # fmt: skip
    assert all(bool(weight.any()) for key, weight in learned.lora.items() if ".lora_B." in key)
    for step in steps:
        losses = step.losses
        assert losses["total"] == pytest.approx(losses["reconstruction"] + 0.01 * losses["attention"], rel=1e-5)


def test_break_a_scene_attention_loss_moves_attention_onto_the_mask(learn: Learn, regions: list[Region]) -> None:
    def attention(weight: float) -> list[float]:
        # The same draws in every run, so that the losses compare step by step.
        steps = learn(
            "break-a-scene", only=regions[:1], steps=12, learning_rate=0.1, attention_weight=weight, prior_images=0
        )[1]
        return [step.losses["attention"] for step in steps]

    without, with_loss = attention(0.0), attention(100.0)
    assert without[0] == with_loss[0]
    assert sum(with_loss[3:6]) < sum(without[3:6])


def test_conceptexpress_merges_its_split_tokens(learn: Learn) -> None:
    memory = Memory()
    with pytest.raises(Killed):
        learn("conceptexpress", memory, kill_at=3, steps=4, split_tokens=3)
    assert memory.held is not None and memory.held[1]["step"] == 2
    split = [memory.held[0][f"row/<cup-0-split-{k}>"] for k in range(3)]
    assert not torch.equal(split[0], split[1])
    # With a rate of almost nothing the merged token stays where it began: at the mean.
    learned, steps = learn("conceptexpress", steps=4, split_tokens=3, learning_rate=1e-12, weight_decay=0)
    start = learn("conceptexpress", steps=4, split_tokens=1, learning_rate=1e-12, weight_decay=0, initial_noise=0)[0]
    assert [step.phase for step in steps] == ["split", "split", "merged", "merged"]
    assert "contrastive" in steps[1].losses and "contrastive" not in steps[2].losses
    assert not torch.equal(learned.tokens["<cup-0>"], start.tokens["<cup-0>"])
    untrained = Memory()
    with pytest.raises(Killed):
        learn("conceptexpress", untrained, kill_at=3, steps=4, split_tokens=3, learning_rate=1e-12, weight_decay=0)
    assert untrained.held is not None
    mean = torch.stack([untrained.held[0][f"row/<cup-0-split-{k}>"] for k in range(3)]).mean(dim=0)
    torch.testing.assert_close(learned.tokens["<cup-0>"], mean)


@pytest.mark.parametrize(("name", "kill_at"), [
    ("textual-inversion", 3), ("dreambooth", 3), ("break-a-scene", 2), ("break-a-scene", 3), ("conceptexpress", 2),
    ("conceptexpress", 3),
])  # fmt: skip
def test_a_killed_run_goes_on_bit_for_bit(learn: Learn, name: str, kill_at: int) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    whole = learn(name, **settings)[0]
    memory = Memory()
    with pytest.raises(Killed):
        learn(name, memory, kill_at=kill_at, **settings)
    resumed, steps = learn(name, memory, **settings)
    assert steps[-1].step == 4
    assert_same(resumed.tokens, whole.tokens)
    assert_same(resumed.lora, whole.lora)
    with pytest.raises(InputError, match="other settings"):
        learn(name, memory, **(settings | {"flip_probability": 0.0}))


def test_a_broken_loss_names_itself(learn: Learn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conceptexpress, "contrastive_loss", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(RunError, match=r"the contrastive loss became nan in step 1 .*lower learner.learning_rate"):
        learn("conceptexpress")
    monkeypatch.setattr(break_a_scene, "attention_loss", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(RunError, match=r"the attention loss became nan in step 1"):
        learn("break-a-scene")


def test_an_empty_mask_is_refused(learn: Learn) -> None:
    with pytest.raises(InputError, match=r"the mask of 'cup' \(concept 0\) is empty"):
        learn("textual-inversion", only=[Region(0, "cup", 0.1, torch.zeros(128, 128, dtype=torch.bool))])
