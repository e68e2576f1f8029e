"""The conformance checks of backbones, on every family there is, and on backbones that are wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from icekit_tabletop import model_dir
from icekit_tabletop.backbone import Tabletop
from joint_attention import ENCODERS, JointAttention
from PIL import Image

from icekit.backbones.common import quiet
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.backbones.stable_diffusion_xl import StableDiffusionXL
from icekit.protocols import NO_TOKENS, Attention, Conditioning, FineTuning, InputError, Prediction, Tuned
from icekit.testing import BackboneUnderTest, check_backbone, checks_of, parametrize_with_checks

CHECKS = {check.__name__: check for check in checks_of("backbone")}


def stable_diffusion(
    cls: type, folder: Path, subject: type[BackboneUnderTest] = BackboneUnderTest, **settings: Any
) -> BackboneUnderTest:
    """A model of Stable Diffusion 1.x or 2.x, beside the pipeline with the sampler that the backbone has."""
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    return subject(cls(cls.Settings(model=str(folder), steps=2, **settings), "cpu"), pipeline)


def xl(folder: Path) -> BackboneUnderTest:
    """A model of Stable Diffusion XL, not square, beside the pipeline with the sampler that the backbone has.

    The pipeline is told where a prompt ends: by itself it reads the pooled text at the highest token id.
    """
    with quiet():
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    settings = StableDiffusionXL.Settings(model=str(folder), steps=2, image_size=(64, 96))
    encoders = {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")}
    return BackboneUnderTest(StableDiffusionXL(settings, "cpu"), pipeline, encoders=encoders)


class WordsAloneUnderTest(BackboneUnderTest):
    """The noise predictor attends to the start and the words of a prompt: the pipeline's is handed the mask for it."""

    def reference_picture(self, prompt: str, seed: int, **others: Any) -> Image.Image:
        tokenizer, guided = self.reference.tokenizer, others.get("guidance_scale", self.guidance_scale) > 1
        prompts = ["", prompt] if guided else [prompt]
        ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        mask = (ids == tokenizer.eos_token_id).cumsum(dim=1) == 0
        handle = self.denoiser.register_forward_pre_hook(
            lambda _, arguments, named: (arguments, named | {"encoder_attention_mask": mask}), with_kwargs=True
        )
        try:
            return super().reference_picture(prompt, seed, **others)
        finally:
            handle.remove()


class JointAttentionUnderTest(BackboneUnderTest):
    """Its time is shifted."""

    def share_of(self, timestep: float) -> float:
        return self.backbone.share_of(timestep)


FAMILIES = ("tabletop", "sd1", "sd2-v", "sdxl", "joint")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> BackboneUnderTest:
    def folder(fixture: str) -> Path:
        return request.getfixturevalue(fixture)

    match request.param:
        case "tabletop":
            return stable_diffusion(Tabletop, model_dir(), WordsAloneUnderTest)
        case "sd1":
            return stable_diffusion(StableDiffusion, folder("sd15_folder"), image_size=64)
        case "sd2-v":  # neither square nor epsilon
            return stable_diffusion(StableDiffusion, folder("sd_v_folder"), image_size=(64, 96))
        case "sdxl":
            return xl(folder("sdxl_folder"))
        case _:
            with quiet():
                pipeline = StableDiffusion3Pipeline.from_pretrained(folder("joint_folder"))
            settings = JointAttention.Settings(model=str(folder("joint_folder")), steps=2)
            return JointAttentionUnderTest(JointAttention(settings, "cpu"), pipeline, encoders=ENCODERS)


@parametrize_with_checks("backbone")
def test_backbone(check, subject):
    check(subject)


# --- The checks find what is wrong ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(sd_v_folder: Path) -> BackboneUnderTest:
    """A backbone that predicts v, for pictures that are not square."""
    return stable_diffusion(StableDiffusion, sd_v_folder, image_size=(64, 96))


Fault = tuple[str, str, Callable[[StableDiffusion], Callable[..., Any]]]
FAULTS: dict[str, Fault] = {}
"""What is wrong -> the check that finds it, the method that is wrong, and what makes the wrong one."""


def fault(check: str, method: str) -> Callable[[Callable[[Any], Callable[..., Any]]], None]:
    return lambda make: FAULTS.update({make.__name__: (check, method, make)})


@fault("it_offers_everything", "generate")
def another_signature(right):
    return lambda prompts, *, seeds, on_step=None: []


@fault("its_facts_are_consistent", "image_size")
def one_side(right):
    return 64


@fault("what_it_lacks_is_true", "lacks")
def lacks_what_it_has(right):
    return ("similarity",)


@fault("what_it_lacks_is_true", "lacks")
def lacks_what_it_can_train(right):
    return ("fine_tuning",)


@fault("latents_of_pictures", "encode_images")
def latents_are_drawn(right):
    encode = right.encode_images
    return lambda images: encode(images) + torch.rand(())


@fault("latents_are_the_pipelines", "encode_images")
def latents_are_not_scaled(right):
    encode = right.encode_images
    return lambda images: encode(images) / 0.18215


@fault("latents_are_the_pipelines", "decode_latents")
def decoded_darker(right):
    decode = right.decode_latents
    return lambda latents: decode(latents) * 0.98


@fault("noise_grows_with_the_share", "add_noise")
def shares_the_other_way_round(right):
    add = right.add_noise
    return lambda latents, noise, shares: add(latents, noise, 1 - shares)


@fault("noise_grows_with_the_share", "add_noise")
def one_share_for_all(right):
    add = right.add_noise
    return lambda latents, noise, shares: add(latents, noise, shares[:1].expand(len(latents)))


@fault("the_training_target_tells_picture_from_noise", "training_target")
def the_noisy_latents_are_the_target(right):
    return right.add_noise


@fault("a_perfect_prediction_is_the_picture", "training_target")
def the_target_of_another_prediction_type(right):
    return lambda latents, noise, shares: noise


@fault("rows_of_words", "word_rows")
def rows_of_another_word(right):
    rows = right.word_rows
    return lambda word, pieces="mean": rows(word[::-1], pieces)


@fault("tokens_are_arguments", "encode_prompts")
def tokens_of_the_first_call(right):
    encode, first = right.encode_prompts, {}

    def encode_prompts(prompts, tokens=NO_TOKENS):
        return encode(prompts, {name: first.setdefault(name, row) for name, row in tokens.items()})

    return encode_prompts


@fault("unknown_tokens_are_refused", "encode_prompts")
def tokens_are_remembered(right):
    encode, known = right.encode_prompts, {}

    def encode_prompts(prompts, tokens=NO_TOKENS):
        known.update(tokens)
        return encode(prompts, known)

    return encode_prompts


@fault("unknown_tokens_are_refused", "generate")
def pictures_before_the_prompts_are_read(right):
    generate = right.generate

    def one_by_one(prompts, *, seeds, **others):
        return [generate([prompt], seeds=[seed], **others)[0] for prompt, seed in zip(prompts, seeds, strict=True)]

    return one_by_one


@fault("wrong_rows_and_prompts_are_refused", "encode_prompts")
def another_kind_of_error(right):
    encode = right.encode_prompts

    def encode_prompts(prompts, tokens=NO_TOKENS):
        try:
            return encode(prompts, tokens)
        except InputError as error:
            raise ValueError(str(error)) from error

    return encode_prompts


@fault("texts_are_points", "embed_texts")
def points_of_any_length(right):
    embed = right.embed_texts
    return lambda texts, tokens=NO_TOKENS, pool=None: 2 * embed(texts, tokens, pool)


@fault("a_batch_is_its_parts", "predict")
def one_prompt_for_all(right):
    predict = right.predict
    return lambda noisy, shares, prompts, look=None: predict(noisy, shares, prompts[[0] * len(noisy)], look)


@fault("a_look_changes_nothing", "predict")
def a_look_moves_the_prediction(right):
    predict = right.predict

    def moved(noisy, shares, prompts, look=None):
        prediction = predict(noisy, shares, prompts, look)
        return dataclasses.replace(prediction, output=prediction.output * (1.01 if look else 1))

    return moved


def with_attention(right, change: Callable[[Attention], Attention]) -> Callable[..., Prediction]:
    predict = right.predict

    def predicted(noisy, shares, prompts, look=None):
        prediction = predict(noisy, shares, prompts, look)
        return Prediction(prediction.output, change(prediction.attention))

    return predicted


@fault("maps_of_words", "predict")
def maps_on_their_side(right):
    return with_attention(right, lambda seen: Attention(tuple(one.mT for one in seen.words), seen.pixels))


@fault("maps_of_words", "token_positions")
def positions_beyond_the_prompt(right):
    positions = right.token_positions
    return lambda prompt, words, tokens=NO_TOKENS: [
        [place + 70 for place in places] for places in positions(prompt, words, tokens)
    ]


@fault("maps_of_pixels", "predict")
def pixels_that_do_not_sum_to_one(right):
    return with_attention(right, lambda seen: Attention(seen.words, tuple(2 * one for one in seen.pixels)))


@fault("gradients_reach_every_row", "encode_prompts")
def prompts_without_a_gradient(right):
    encode = right.encode_prompts
    return lambda prompts, tokens=NO_TOKENS: Conditioning(
        {name: part.detach().requires_grad_() for name, part in encode(prompts, tokens).parts.items()}
    )


@fault("gradients_reach_every_row_through_the_maps", "predict")
def maps_without_a_gradient(right):
    return with_attention(right, lambda seen: Attention(tuple(one.detach().requires_grad_() for one in seen.words)))


@fault("the_prediction_is_the_pipelines", "predict")
def another_time(right):
    predict = right.predict
    return lambda noisy, shares, prompts, look=None: predict(noisy, shares * 0.95, prompts, look)


@fault("the_picture_is_the_pipelines", "generate")
def its_own_guidance(right):
    generate = right.generate
    return lambda prompts, *, guidance_scale=None, **others: generate(prompts, guidance_scale=7.5, **others)


@fault("pictures_are_made", "generate")
def nothing_is_skipped(right):
    generate = right.generate
    return lambda prompts, *, skip=(), **others: generate(prompts, **others)


@fault("pictures_are_made", "generate")
def pictures_by_chance(right):
    generate = right.generate
    return lambda prompts, *, seeds, **others: generate(
        prompts, seeds=torch.randint(99, (len(seeds),)).tolist(), **others
    )


@fault("a_lora_adapter", "fine_tuned")
def keys_without_the_pipelines_part(right):
    fine_tuned = right.fine_tuned

    @contextmanager
    def tuned(trained, rank, generator):
        with fine_tuned(trained, rank, generator) as inner:

            def kept() -> FineTuning:
                lora = {key.removeprefix("unet."): value for key, value in inner.kept().lora.items()}
                return dataclasses.replace(inner.kept(), lora=lora)

            yield Tuned(inner.parameters, kept)

    return tuned


@fault("whole_weights", "fine_tuned")
def weights_that_stay(right):
    fine_tuned = right.fine_tuned

    @contextmanager
    def tuned(trained, rank, generator):
        with fine_tuned(trained, rank, generator) as inner:
            yield inner
            weights = {name: value.clone() for name, value in inner.parameters.items()}
        right.unet.load_state_dict(weights)

    return tuned


@fault("a_lora_adapter", "generate")
def pictures_without_what_was_trained(right):
    generate = right.generate
    return lambda prompts, *, tuning=None, **others: generate(prompts, **others)


@fault("the_tuning_of_another_model_is_refused", "generate")
def any_tuning_is_taken(right):
    generate = right.generate
    return lambda prompts, *, tuning=None, **others: generate(prompts, **others)


@fault("saved_tokens_are_loaded_by_the_pipeline", "generate")
def other_rows_than_were_saved(right):
    generate = right.generate

    def halved(prompts, *, tokens=NO_TOKENS, **others):
        rows = {name: {key: row / 2 for key, row in token.items()} for name, token in tokens.items()}
        return generate(prompts, tokens=rows, **others)

    return halved


@fault("calls_leave_nothing_behind", "predict")
def a_little_more_every_time(right):
    predict, calls = right.predict, iter(range(1, 1000))

    def predicted(*arguments, **named):
        prediction = predict(*arguments, **named)
        return dataclasses.replace(prediction, output=prediction.output + next(calls))

    return predicted


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, right: BackboneUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    check, method, make = FAULTS[name]
    weights = {key: value.clone() for key, value in right.backbone.unet.state_dict().items()}
    monkeypatch.setattr(right.backbone, method, make(right.backbone), raising=False)
    try:
        with pytest.raises(AssertionError) as found:
            CHECKS[check](right)
    finally:
        right.backbone.unet.load_state_dict(weights)
    assert str(found.value)


def test_every_check_finds_something() -> None:
    assert {check for check, _, _ in FAULTS.values()} == set(CHECKS)
    for check in CHECKS.values():
        assert check.__doc__ and check.__doc__.strip()


def test_all_checks_without_pytest(right: BackboneUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a command would run them: one that fails does not stop the others, and what needs a pipeline is left out."""
    alone = dataclasses.replace(right, reference=None)
    monkeypatch.setattr(right.backbone, "training_target", right.backbone.add_noise)
    monkeypatch.setattr(right.backbone, "lacks", ("fine_tuning",), raising=False)
    monkeypatch.setattr(right.backbone, "posterior", None)
    results = {result.name: result for result in check_backbone(alone)}
    assert list(results) == list(CHECKS)
    failed = {name for name, result in results.items() if result.outcome == "failed"}
    assert failed == {"what_it_lacks_is_true", "the_training_target_tells_picture_from_noise", "latents_of_pictures"}
    assert "the latents x cannot be told from them" in results["the_training_target_tells_picture_from_noise"].found
    assert results["latents_of_pictures"].found.startswith("TypeError: ")
    skipped = {name: result.found for name, result in results.items() if result.outcome == "skipped"}
    assert skipped["the_prediction_is_the_pipelines"] == "no reference pipeline was handed in"
    assert skipped["a_lora_adapter"] == "the family lacks 'fine_tuning'"


def test_importing_the_room_takes_no_torch() -> None:
    code = "import sys, icekit.testing; sys.exit('torch' in sys.modules or 'pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
