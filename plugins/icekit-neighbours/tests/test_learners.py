"""What each learner is known for, by hand; and all of them on a tiny model with random weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from icekit_neighbours import break_a_scene, conceptexpress, dreambooth, looking, pictures, textual_inversion
from learning import Killed, Memory, Taught, assert_same, learn_watched, row_of, two_regions

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.learning.training import Task
from icekit.protocols import Attribute, InputError, Region, RunError, Step, parts_of
from icekit.words import read_vocabulary

COLOUR = Attribute("colour", anchor="colour", vocabulary=("red", "green"))
LEARNERS: dict[str, type] = {
    "textual-inversion": textual_inversion.TextualInversionLearner,
    "dreambooth": dreambooth.DreamBoothLearner,
    "break-a-scene": break_a_scene.BreakASceneLearner,
    "conceptexpress": conceptexpress.ConceptExpressLearner,
}
QUICK: dict[str, dict[str, Any]] = {
    "textual-inversion": {"backgrounds": 2},
    "dreambooth": {"backgrounds": 2, "prior_images": 1, "prior_steps": 1},
    "break-a-scene": {"prior_images": 1, "prior_steps": 1},
    "conceptexpress": {"split_share": 0.5, "split_tokens": 2},
}


# --- By hand ---------------------------------------------------------------------------------------------------------


def test_union_sampling_takes_every_subset() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(break_a_scene.union_sample(3, generator)) for _ in range(200)}
    pairs = {(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)}
    assert {one for one in seen if len(one) < 3} == {(0,), (1,), (2,)} | pairs
    assert {one for one in seen if len(one) == 3} == set(itertools.permutations(range(3)))  # in every order


def test_a_union_covers_all_of_its_masks() -> None:
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert break_a_scene.union(masks).tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_attention_loss_by_hand() -> None:
    attention = torch.tensor([[[0.2, 0.1], [0.0, 0.05]]])  # over its maximum: 1, 0.5, 0, 0.25
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert float(break_a_scene.attention_loss(attention, mask)) == pytest.approx((0.5**2 + 0.25**2) / 4)
    assert float(break_a_scene.attention_loss(mask * 0.3, mask)) == 0
    both = break_a_scene.attention_loss(torch.cat([attention, attention]), torch.cat([mask, mask]))
    assert float(both) == pytest.approx(2 * (0.5**2 + 0.25**2) / 4)  # summed over tokens


def test_contrastive_loss_by_hand() -> None:
    one, other = [1.0, 0.0], [0.0, 3.0]  # cosines: 1 within a concept, 0 across
    loss = conceptexpress.contrastive_loss(torch.tensor([[one, one], [other, other]]), temperature=1.0)
    assert float(loss) == pytest.approx(math.log((math.e + 2) / math.e))
    mixed = conceptexpress.contrastive_loss(torch.tensor([[one, other], [other, one]]), temperature=1.0)
    assert float(mixed) == pytest.approx(math.log((1 + 1 + math.e) / 1))
    # Two positives each: the mean of their log-probabilities, not the logarithm of their mean. With u = one, v = other
    # and the concepts (u, u, v) and (v, v, v): the first two have log(e / (e + 4)) and log(1 / (e + 4)), the third
    # log(1 / (2 + 3 e)) twice, the others log(e / (2 + 3 e)) twice.
    three = conceptexpress.contrastive_loss(torch.tensor([[one, one, other], [other, other, other]]), temperature=1.0)
    expected = 2 * (math.log(math.e + 4) - 0.5) + math.log(2 + 3 * math.e) + 3 * (math.log(2 + 3 * math.e) - 1)
    assert float(three) == pytest.approx(expected / 6)
    # Cosines over the temperature: 1 / 0.5 = 2.
    cold = conceptexpress.contrastive_loss(torch.tensor([[one, one], [other, other]]), temperature=0.5)
    assert float(cold) == pytest.approx(math.log((math.e**2 + 2) / math.e**2))


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


def test_one_token_has_nothing_to_contrast() -> None:
    tokens = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    alike = torch.ones(1, 4, 8)  # one concept: its tokens have but one another
    assert float(conceptexpress.contrastive_loss(alike, 0.07)) == pytest.approx(math.log(3), rel=1e-5)
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


Learn = Callable[..., tuple[Taught, list[Step]]]


@pytest.fixture
def learn(backbone: StableDiffusion, regions: list[Region], monkeypatch: pytest.MonkeyPatch) -> Learn:

    def run(
        name: str,
        checkpoint: Memory | None = None,
        kill_at: int | None = None,
        only: Sequence[Region] | None = None,
        **settings: Any,
    ) -> tuple[Taught, list[Step]]:
        cls: Any = LEARNERS[name]
        learner = cls(cls.Settings(**({"steps": 2} | QUICK[name] | settings)), backbone)
        return learn_watched(learner, only or regions, (COLOUR,), checkpoint=checkpoint, kill_at=kill_at)

    return run


@pytest.mark.parametrize("name", LEARNERS)
def test_no_token_is_made_up(learn: Learn, backbone: StableDiffusion, name: str) -> None:
    before = {key: value.clone() for key, value in backbone.unet.state_dict().items()}
    learned, steps = learn(name)
    tokens = learned.tokens
    kinds = ("-instance", "") if name == "dreambooth" else ("-instance",)
    assert set(tokens) == {f"<{stem}{kind}>" for stem in ("cup-0", "metal-ball-1") for kind in kinds}
    assert len(parts_of(LEARNERS[name], ["colour"])) == len(kinds)
    assert all(row.dtype == torch.float32 and row.shape == (backbone.rows["clip_l"],) for row in tokens.values())
    assert not torch.equal(tokens["<cup-0-instance>"], tokens["<metal-ball-1-instance>"])
    updates = 1 * 2 * 2 + 1 * (2 + 1) if name == "conceptexpress" else 2
    assert [step.step for step in steps] == list(range(1, updates + 1))
    assert all(step.total == updates for step in steps)
    # The model is as it was, and nothing in it asks for gradients.
    assert_same(backbone.unet.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())


def test_textual_inversion_learns_tokens_and_nothing_else(learn: Learn, backbone: StableDiffusion) -> None:
    learned, steps = learn("textual-inversion", batch_size=2)
    assert not learned.lora
    assert not torch.equal(learned.tokens["<cup-0-instance>"], row_of(backbone, "cup"))
    assert [step.phase for step in steps] == ["embeddings", "embeddings"]
    assert set(steps[0].losses) == {"reconstruction", "total"}


def test_textual_inversion_scales_its_rate_by_the_batch(learn: Learn, backbone: StableDiffusion) -> None:
    # AdamW's first step moves every number by the learning rate.
    row = learn("textual-inversion", steps=1, batch_size=3, learning_rate=1e-3, weight_decay=0)[0].tokens
    moved = (row["<cup-0-instance>"] - row_of(backbone, "cup")).abs()
    assert float(moved.median()) == pytest.approx(3e-3, rel=1e-2)


def test_dreambooth_binds_a_rare_word_by_the_weights(learn: Learn, backbone: StableDiffusion) -> None:
    learned, steps = learn("dreambooth")
    assert torch.equal(learned.tokens["<cup-0-instance>"], row_of(backbone, "sks"))
    assert torch.equal(learned.tokens["<metal-ball-1-instance>"], row_of(backbone, "ohwx"))
    assert torch.equal(learned.tokens["<cup-0>"], row_of(backbone, "cup"))
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
    monkeypatch.setattr(
        backbone,
        "encode_prompts",
        lambda given, tokens: prompts.extend(given) or encode(given, tokens),
    )
    learned, steps = learn("break-a-scene", steps=4, prior_images=0, batch_size=3)
    assert [step.phase for step in steps] == ["embeddings"] * 2 + ["weights"] * 2
    cup, ball = "<cup-0-instance>", "<metal-ball-1-instance>"
    alone, together = {f"a photo of {one}" for one in (cup, ball)}, {f"{cup} and {ball}", f"{ball} and {cup}"}
    assert alone < set(prompts) <= alone | {f"a photo of {both}" for both in together}
    assert len(set(prompts)) > 2
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
    """With a rate of almost nothing the merged token stays where it began: at the mean of the split ones."""
    still = {"steps": 4, "split_tokens": 3, "learning_rate": 1e-12, "weight_decay": 0}
    for updates, merged_at in (("each", 2 * 2 * 3), ("together", 2)):
        memory = Memory()
        with pytest.raises(Killed):
            learn("conceptexpress", memory, kill_at=merged_at + 1, updates=updates, **still)
        assert memory.held is not None and memory.held[1]["step"] == merged_at
        split = torch.stack([memory.held[0][f"row/<cup-0-instance-split-{k}>/clip_l"] for k in range(3)])
        assert len(split.unique(dim=0)) > 1
        learned, steps = learn("conceptexpress", updates=updates, **still)
        torch.testing.assert_close(learned.tokens["<cup-0-instance>"], split.mean(dim=0))
        assert "contrastive" in steps[merged_at - 1].losses and "contrastive" not in steps[merged_at].losses


def test_conceptexpress_steps_once_for_every_split_token_and_joint_prompt(
    learn: Learn, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[tuple[str, ...]] = []
    encode = backbone.encode_prompts
    monkeypatch.setattr(
        backbone, "encode_prompts", lambda given, tokens: prompts.append(tuple(given)) or encode(given, tokens)
    )
    cup, ball = "<cup-0-instance>", "<metal-ball-1-instance>"
    steps = learn("conceptexpress", steps=2, split_tokens=2, attention_target="mask")[1]
    assert [step.phase for step in steps] == ["split"] * 4 + ["merged"] * 3
    split = [f"{name[:-1]}-split-{k}>" for name in (cup, ball) for k in (0, 1)]
    assert prompts == [(f"a photo of {name}",) for name in (*split, cup, ball, f"{cup} and {ball}")]

    # 3,100 for three concepts at the published numbers.
    settings = conceptexpress.ConceptExpressSettings()
    splitting = round(settings.split_share * settings.steps)
    assert splitting * 3 * settings.split_tokens + (settings.steps - splitting) * (3 + settings.joint) == 3100

    # As many updates as the other learners have steps, if asked for.
    prompts.clear()
    steps = learn("conceptexpress", steps=2, updates="together", attention_target="mask")[1]
    assert [step.phase for step in steps] == ["split", "merged"]
    assert [len(one) for one in prompts] == [2, 2, 1]
    prompts.clear()
    learn("conceptexpress", steps=2, updates="together", attention_target="mask", joint=False)
    assert [len(one) for one in prompts] == [2, 2]


def test_conceptexpress_draws_attention_to_what_its_mask_attends_to(
    backbone: StableDiffusion, regions: list[Region]
) -> None:
    """By hand: two places of three see themselves and the third; the model's own maps are distributions."""
    self_attention = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0], [0, 0, 0, 1.0]])
    self_attention = self_attention.view(2, 2, 2, 2)
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # places 0 and 2
    expected = torch.tensor([[[0.375, 0.0], [0.625, 0.0]]])
    torch.testing.assert_close(looking.mean_self_attention(self_attention, mask), expected)

    settings = conceptexpress.ConceptExpressSettings()
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    task = Task(image, regions, (), 0, Memory(), lambda step: None)
    rows = {f"<{region.label}-{region.index}-instance>": backbone.word_rows("cup") for region in regions}
    targets = conceptexpress.Express(settings, backbone, task, rows).targets
    assert targets.shape == (2, 2, 16, 16)
    torch.testing.assert_close(targets[1], targets[0].flip(-1))
    torch.testing.assert_close(targets.sum(dim=(2, 3)), torch.ones(2, 2))  # the finest grid is 16: nothing is pooled
    of_masks = conceptexpress.Express(
        settings.model_copy(update={"attention_target": "mask"}), backbone, task, rows
    ).targets
    assert of_masks.max() == 1 and not torch.equal(of_masks, targets)


def test_conceptexpress_starts_from_random_words(learn: Learn, backbone: StableDiffusion) -> None:
    def started(**settings: Any) -> list[torch.Tensor]:
        memory = Memory()
        options = {"learning_rate": 1e-12, "weight_decay": 0, "checkpoint_every": 1, "split_tokens": 3}
        learn("conceptexpress", memory, **(options | settings))
        assert memory.held is not None
        return [row for name, row in memory.held[0].items() if name.startswith("row/") and "split" in name]

    words = torch.stack([row_of(backbone, word) for word in known_words()])
    random = torch.stack(started())
    assert len(random) == 6 and len(random.unique(dim=0)) > 2
    assert (random[:, None] - words).abs().amax(dim=2).amin(dim=1).max() < 1e-6
    cup = torch.stack(started(start="noun", initial_noise=0)[:3])
    torch.testing.assert_close(cup, row_of(backbone, "cup").expand(3, -1))
    assert len(torch.stack(started(start="noun")[:3]).unique(dim=0)) == 3


def known_words() -> list[str]:
    return [*read_vocabulary(None), *COLOUR.vocabulary]


# --- Given the same ---------------------------------------------------------------------------------------------------


def test_start_from_the_words_that_were_seen(learn: Learn, backbone: StableDiffusion, regions: list[Region]) -> None:
    seen = [replace(regions[0], hints={"colour": {"red": 0.75, "green": 0.25}}), regions[1]]
    still: dict[str, Any] = {"steps": 2, "learning_rate": 1e-12, "weight_decay": 0, "start": "hints"}
    cup, red, green = (row_of(backbone, word) for word in ("cup", "red", "green"))
    started = (cup + 0.75 * red + 0.25 * green) / 2
    settings: dict[str, dict[str, Any]] = {
        "textual-inversion": {},
        "break-a-scene": {"tuning_learning_rate": 1e-12, "prior_images": 0},
        "conceptexpress": {"initial_noise": 0},
    }
    for name, more in settings.items():
        tokens = learn(name, only=seen, **still, **more)[0].tokens
        torch.testing.assert_close(tokens["<cup-0-instance>"], started)
        # A region that nobody described: its word.
        torch.testing.assert_close(tokens["<metal-ball-1-instance>"], row_of(backbone, "metal ball"))
        noun = learn(name, only=seen, **(still | more | {"start": "noun"}))[0].tokens
        torch.testing.assert_close(noun["<cup-0-instance>"], cup)
    tokens = learn("dreambooth", only=seen, steps=1, prior_images=0, start="hints")[0].tokens
    torch.testing.assert_close(tokens["<cup-0-instance>"], 0.75 * red + 0.25 * green)
    assert torch.equal(tokens["<metal-ball-1-instance>"], row_of(backbone, "ohwx"))
    assert torch.equal(tokens["<cup-0>"], cup)


@pytest.mark.parametrize("name", LEARNERS)
def test_timesteps_and_area(
    learn: Learn, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told: list[float] = []
    add_noise = backbone.add_noise
    monkeypatch.setattr(
        backbone,
        "add_noise",
        lambda latents, noise, shares: told.extend(shares.tolist()) or add_noise(latents, noise, shares),
    )
    options = {"steps": 4, "attention_weight": 0} if name in ("break-a-scene", "conceptexpress") else {"steps": 4}
    options |= {"prior_images": 0} if name in ("break-a-scene", "dreambooth") else {}
    plain = learn(name, timestep_range=(0.4, 0.45), **options)[1]
    assert told and all(0.4 <= share <= 0.45 for share in told)
    weighed = learn(name, timestep_range=(0.4, 0.45), by_area=True, **options)[1]
    assert weighed[0].losses["reconstruction"] > 2 * plain[0].losses["reconstruction"]
    with pytest.raises(ValueError, match="two rising shares"):
        learn(name, timestep_range=(0.9, 0.4))


@pytest.mark.parametrize(("name", "kill_at"), [
    ("textual-inversion", 3), ("dreambooth", 3), ("break-a-scene", 2), ("break-a-scene", 3), ("conceptexpress", 5),
    ("conceptexpress", 9), ("conceptexpress", 12),
])  # fmt: skip
def test_a_killed_run_goes_on_bit_for_bit(learn: Learn, name: str, kill_at: int) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    whole = learn(name, **settings)[0]
    memory = Memory()
    with pytest.raises(Killed):
        learn(name, memory, kill_at=kill_at, **settings)
    resumed, steps = learn(name, memory, **settings)
    assert steps[-1].step == (14 if name == "conceptexpress" else 4)
    assert_same(resumed.tokens, whole.tokens)
    assert_same(resumed.lora, whole.lora)
    with pytest.raises(InputError, match="other settings"):
        learn(name, memory, **(settings | {"flip_probability": 0.0}))


def test_a_broken_loss_names_itself(learn: Learn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conceptexpress, "contrastive_loss", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(RunError, match=r"the contrastive loss became nan in step 1 .*nothing was learned before it"):
        learn("conceptexpress")
    monkeypatch.setattr(break_a_scene, "attention_loss", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(RunError, match=r"the attention loss became nan in step 1"):
        learn("break-a-scene")


def test_an_empty_mask_is_refused(learn: Learn) -> None:
    with pytest.raises(InputError, match=r"the mask of 'cup' \(concept 0\) is empty"):
        learn("textual-inversion", only=[Region(0, "cup", 0.1, torch.zeros(128, 128, dtype=torch.bool))])
