"""Refinement: the noise predictor's weights, by an adapter or as a whole, its prompts, its rows and its prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import Killed, Memory, Taught, assert_same, learn_watched, recorded_generation, row_of, two_regions
from torch import Tensor, nn

from icekit.backbones.fine_tuning import replaced_weights, whole_weights
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.builtin.learners.ice import IceLearner, IceSettings
from icekit.learning.prior import prior_prompts
from icekit.protocols import Attribute, Checkpoint, FineTuning, InputError, Step
from icekit.randomness import seeded_generator
from icekit.run.directory import FileCheckpoint, RunDirectory

COLOUR = Attribute("colour", anchor="colour", vocabulary=("red", "green"))
MATERIAL = Attribute("material", anchor="material", vocabulary=("metal", "wood"))
QUICK: dict[str, Any] = {"steps": 2, "refine_steps": 2, "prior_images": 2, "prior_steps": 1, "weight_decay": 0}
PUBLISHED: dict[str, Any] = {
    "refine_weights": "all",
    "refine_learning_rate": 2e-6,
    "refine_prompts": "attributes",
    "refine_rows": "attributes",
    "prior_prompt": "a photo at the beach",
    "prior_weight": 1.0,
}
ROWS = [f"<{stem}-{kind}>" for stem in ("cup-0", "metal-ball-1") for kind in ("colour", "material")]


@pytest.fixture(scope="module")
def backbone(sd_folder: Path) -> StableDiffusion:
    return StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")


Learn = Callable[..., tuple[Taught, list[Step]]]


@pytest.fixture
def learn(backbone: StableDiffusion) -> Learn:
    def run(
        attributes: tuple[Attribute, ...] = (COLOUR, MATERIAL),
        checkpoint: Checkpoint | None = None,
        kill_at: int | None = None,
        on: StableDiffusion = backbone,
        **settings: Any,
    ) -> tuple[Taught, list[Step]]:
        learner = IceLearner(IceSettings(**(QUICK | settings)), on)
        return learn_watched(learner, two_regions(), attributes, checkpoint=checkpoint, kill_at=kill_at)

    return run


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- Whole weights ---------------------------------------------------------------------------------------------------


def test_every_weight_is_trained_at_the_published_rate_and_the_model_is_put_back(
    learn: Learn, backbone: StableDiffusion
) -> None:
    before, objects = state_of(backbone.unet), {name: id(one) for name, one in backbone.unet.named_parameters()}
    memory = Memory()
    learned, steps = learn(checkpoint=memory, refine_weights="all", refine_steps=1)
    assert [step.phase for step in steps] == ["object", "attributes", "refine"]
    assert_same(backbone.unet.state_dict(), before)
    assert {name: id(one) for name, one in backbone.unet.named_parameters()} == objects
    assert not any(one.requires_grad or one.grad is not None for one in backbone.unet.parameters())

    assert not learned.lora
    assert list(learned.weights) == list(before)
    assert {value.dtype for value in learned.weights.values()} == {torch.float16}
    assert learned.weights_config["_class_name"] == "UNet2DConditionModel"
    assert memory.held is not None
    moved = torch.cat([(memory.held[0][f"weights/{name}"] - before[name]).flatten().abs() for name in before])
    # AdamW's first step moves every number that has a gradient by the learning rate: 2e-6, unless told otherwise.
    assert float(moved.median()) == pytest.approx(2e-6, rel=0.1)
    assert all(not torch.equal(memory.held[0][f"weights/{name}"], before[name]) for name in before)
    for name, value in learned.weights.items():
        assert torch.equal(value, memory.held[0][f"weights/{name}"].half())


def test_without_refinement_no_weights_are_kept(learn: Learn) -> None:
    learned = learn(refine_steps=0, refine_weights="all")[0]
    assert not learned.weights and not learned.lora


def test_a_model_of_half_precision_is_trained_in_full(learn: Learn, sd_folder: Path) -> None:
    half = StableDiffusion(StableDiffusion.Settings(model=str(sd_folder), dtype="bfloat16"), "cpu")
    before, memory = state_of(half.unet), Memory()
    learn(on=half, checkpoint=memory, refine_weights="all", refine_steps=1)
    assert half.unet.dtype == torch.bfloat16
    assert_same(half.unet.state_dict(), before)
    assert memory.held is not None
    for name, value in before.items():
        trained = memory.held[0][f"weights/{name}"]
        assert trained.dtype == torch.float32
        # A step of 2e-6, which bfloat16 could not have made of most weights.
        assert not torch.equal(trained, value.float()) and torch.allclose(trained, value.float(), rtol=0, atol=1e-5)


# In the first step of refinement, within it and in its last.
@pytest.mark.parametrize(
    ("kill_at", "rows"),
    [pytest.param(3, "free", marks=pytest.mark.slow), (4, "words"), pytest.param(5, "free", marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_bit_for_bit(learn: Learn, tmp_path: Path, kill_at: int, rows: str) -> None:
    settings = PUBLISHED | {
        "refine_steps": 3, "checkpoint_every": 1, "refine_learning_rate": 1e-3, "attribute_rows": rows,
    }  # fmt: skip
    whole = learn(**settings)[0]
    checkpoint = FileCheckpoint(tmp_path / "learner.safetensors")
    with pytest.raises(Killed):
        learn(checkpoint=checkpoint, kill_at=kill_at, **settings)
    found = checkpoint.load()
    assert found is not None and found[1]["step"] == kill_at - 1
    resumed, steps = learn(checkpoint=checkpoint, **settings)
    assert [step.step for step in steps] == list(range(kill_at, 6))
    for again in (resumed, learn(checkpoint=checkpoint, **settings)[0]):  # the second was complete already
        assert_same(again.tokens, whole.tokens)
        assert_same(again.weights, whole.weights)
        assert again.weights_config == whole.weights_config
    with pytest.raises(InputError, match="other settings"):
        learn(checkpoint=checkpoint, **(settings | {"refine_weights": "lora"}))


def test_weights_are_put_back_when_training_breaks(learn: Learn, backbone: StableDiffusion) -> None:
    before = state_of(backbone.unet)
    with pytest.raises(Killed):
        learn(kill_at=3, refine_weights="all")
    assert_same(backbone.unet.state_dict(), before)
    assert not any(one.requires_grad or one.grad is not None for one in backbone.unet.parameters())


def test_whole_weights_of_any_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.float16)
    before = state_of(model)
    with whole_weights(model) as weights:
        assert list(weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert weights["0.weight"] is model[0].weight
        for weight in weights.values():
            weight.data += 1
    assert_same(model.state_dict(), before)


def test_replaced_weights_are_there_for_the_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = state_of(model)
    others = {name: (value + 1).half() if value.is_floating_point() else value + 1 for name, value in before.items()}
    with replaced_weights(model, others):
        for name, value in model.state_dict().items():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, others[name].to(value.dtype))
    assert_same(model.state_dict(), before)
    for wrong in ({"0.weight": others["0.weight"]}, others | {"0.bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match="another model"), replaced_weights(model, wrong):
            pass
    assert_same(model.state_dict(), before)


# --- Where they go ---------------------------------------------------------------------------------------------------


def test_the_run_directory_holds_a_model_that_diffusers_reads(
    learn: Learn, backbone: StableDiffusion, sd_folder: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    learned = learn(refine_weights="all", refine_learning_rate=1e-3)[0]
    run = RunDirectory(tmp_path / "run")
    run.save_learned(learned.learned)
    kept = run.load_tuning().weights
    assert_same(dict(sorted(kept.items())), dict(sorted(learned.weights.items())))
    assert not list((tmp_path / "run").rglob("*.part"))

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "unet")
    assert_same({name: value.half() for name, value in unet.state_dict().items()}, learned.weights)
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    UNet2DConditionModel.from_config(pipeline.unet.config).load_state_dict(kept)
    pipeline.unet = unet.float()
    theirs = StableDiffusion.from_pipeline(pipeline, "cpu").generate(["a red cup"], seeds=[3], steps=2)[0]

    def ours(weights: Mapping[str, Tensor] | None = None) -> bytes:
        tuning = FineTuning(weights=weights or {})
        return backbone.generate(["a red cup"], seeds=[3], steps=2, tuning=tuning)[0].tobytes()

    before, plain = state_of(backbone.unet), ours()
    assert ours(kept) == theirs.tobytes() != plain
    assert_same(backbone.unet.state_dict(), before)
    assert ours() == plain
    with pytest.raises(InputError, match="fine-tuned weights are of another model"):
        ours({"conv_in.weight": torch.zeros(1)})
    assert ours() == plain


# --- Prompts, rows and the triplet -----------------------------------------------------------------------------------


def prompts_of_refinement(
    learn: Learn, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[set[str], set[str]]:
    """The prompts that refinement predicts noise for: those with tokens, and those without."""
    seen: list[str] = []
    encode, generate = backbone.encode_prompts, backbone.generate

    def recorded(prompts: Sequence[str], *tokens: Any) -> Any:
        seen.extend(prompts)
        return encode(prompts, *tokens)

    def generated(prompts: Sequence[str], **options: Any) -> Any:
        images = generate(prompts, **options)
        seen.clear()  # what comes after the prior's images is refinement's
        return images

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "encode_prompts", recorded)
        patch.setattr(backbone, "generate", generated)
        learn(templates=("a photo of {}",), **settings)
    return {prompt for prompt in seen if "<" in prompt}, {prompt for prompt in seen if "<" not in prompt}


@pytest.mark.slow
def test_prompts_of_refinement(learn: Learn, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    phase_one = {"a photo of <cup-0-instance> <cup-0>", "a photo of <metal-ball-1-instance> <metal-ball-1>"}
    phase_two = {
        "a photo of <cup-0> <cup-0-colour> <cup-0-material>",
        "a photo of <metal-ball-1> <metal-ball-1-colour> <metal-ball-1-material>",
    }
    own, prior = prompts_of_refinement(learn, backbone, monkeypatch, refine_steps=6)
    assert own == phase_one | phase_two
    assert prior == {"a photo of cup", "a photo of metal ball"}
    own, prior = prompts_of_refinement(learn, backbone, monkeypatch, **(PUBLISHED | {"refine_steps": 4}))
    assert own == phase_two
    assert prior == {"a photo at the beach"}
    # Without attributes there is no phase two.
    own, _ = prompts_of_refinement(learn, backbone, monkeypatch, attributes=(), **(PUBLISHED | {"refine_steps": 4}))
    assert own == phase_one


def test_attribute_rows_change_only_when_asked_for(learn: Learn) -> None:
    before = learn(refine_steps=0)[0].tokens
    for weights in ("lora", "all"):
        frozen = learn(refine_weights=weights, refine_learning_rate=1e-3)[0].tokens
        assert_same(frozen, before)
        trained = learn(refine_weights=weights, refine_rows="attributes", refine_learning_rate=1e-3, refine_steps=1)[0]
        for name, row in trained.tokens.items():
            assert torch.equal(row, before[name]) == (name not in ROWS), name
        moved = torch.cat([trained.tokens[name] - before[name] for name in ROWS]).abs()
        assert float(moved.median()) == pytest.approx(1e-3, rel=0.01)  # the weights' rate is the rows'


def test_tokens_of_words_stay_of_words(learn: Learn, backbone: StableDiffusion) -> None:
    settings = {"attribute_rows": "words", "refine_rows": "attributes", "refine_learning_rate": 0.1}
    before, tokens = learn(**(settings | {"refine_steps": 0}))[0].tokens, learn(**settings)[0].tokens
    words = torch.stack([row_of(backbone, word) for word in COLOUR.vocabulary])
    for name in ("<cup-0-colour>", "<metal-ball-1-colour>"):
        weights = torch.linalg.lstsq(words.T, tokens[name]).solution
        torch.testing.assert_close(weights @ words, tokens[name])
        assert weights.sum().item() == pytest.approx(1, abs=1e-4)
        assert not torch.equal(tokens[name], before[name])


def test_the_triplet_is_kept_where_rows_are_trained(learn: Learn) -> None:
    kept = learn(**PUBLISHED)[1][-1].losses
    assert set(kept) == {"reconstruction", "attention", "triplet", "prior", "total"}
    terms = kept["reconstruction"] + 1e-5 * kept["attention"] + 5e-2 * kept["triplet"] + 1.0 * kept["prior"]
    assert kept["triplet"] > 0 and kept["total"] == pytest.approx(terms, rel=1e-5)
    for settings in (PUBLISHED | {"refine_rows": "none"}, PUBLISHED | {"attributes": ()}):
        assert set(learn(**settings)[1][-1].losses) == {"reconstruction", "attention", "prior", "total"}


@pytest.mark.slow
def test_the_triplet_moves_refined_rows(learn: Learn) -> None:
    settings = PUBLISHED | {"refine_steps": 12, "refine_learning_rate": 3e-3, "prior_images": 0}
    weak, strong = (learn(**settings, intrinsic_triplet_weight=weight)[1] for weight in (0.0, 1e3))
    assert strong[-1].losses["triplet"] < 0.9 * weak[-1].losses["triplet"]


def test_one_concept_a_step(learn: Learn, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted: list[int] = []
    predict = backbone.predict

    def counted(noisy: Tensor, *rest: Any) -> Tensor:
        predicted.append(len(noisy))
        return predict(noisy, *rest)

    monkeypatch.setattr(backbone, "predict", counted)
    for which, batch in (("one", 1), ("all", 2)):
        predicted.clear()
        learn(concepts_per_step=which, refine_steps=3)
        assert predicted[-6:] == [batch] * 6  # each step is of as many prior images as concepts


# --- The prior -------------------------------------------------------------------------------------------------------


def test_prior_images_are_sampled_as_asked_for(
    learn: Learn, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded_generation(backbone, monkeypatch)
    learn(**PUBLISHED, prior_images=3, prior_steps=2, prior_guidance=4.0, max_batch=2)
    assert [call["prompts"] for call in calls] == [["a photo at the beach"] * 2, ["a photo at the beach"]]
    assert {(call["steps"], call["guidance_scale"]) for call in calls} == {(2, 4.0)}
    assert len({seed for call in calls for seed in call["seeds"]}) == 3  # one prompt, as many pictures
    calls.clear()
    assert set(learn(**PUBLISHED, prior_images=0)[1][-1].losses) == {"reconstruction", "attention", "triplet", "total"}
    assert not calls


def test_prior_of_the_regions_words_by_default() -> None:
    settings = IceSettings(prior_images=4, templates=("a photo of {}", "the {}"))
    prompts, seeds = prior_prompts(settings, two_regions(), seeded_generator(0, "prior"))
    assert [prompt.removeprefix("a photo of ").removeprefix("the ") for prompt in prompts] == ["cup", "metal ball"] * 2
    assert len(set(seeds)) == 4
    again = prior_prompts(settings.model_copy(update={"prior_prompt": "a beach"}), [], seeded_generator(0, "prior"))
    assert again == (["a beach"] * 4, seeds)


def test_prior_is_of_the_untouched_model_after_a_kill(learn: Learn) -> None:
    settings = PUBLISHED | {"refine_learning_rate": 1e-2, "refine_steps": 2, "checkpoint_every": 1}
    memory = Memory()
    with pytest.raises(Killed):
        learn(checkpoint=memory, kill_at=4, **settings)
    assert memory.held is not None
    prior = memory.held[0]["prior"]
    learn(checkpoint=memory, **settings)
    assert torch.equal(memory.held[0]["prior"], prior)


def test_settings_refuse_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="none for the regions' words"):
        IceSettings(prior_prompt=" ")
    with pytest.raises(ValueError, match=r"'lora' or 'all'"):
        IceSettings(refine_weights="some")  # type: ignore[arg-type]
    assert IceSettings().prior_guidance is None
