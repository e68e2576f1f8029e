"""Stable Diffusion, taken apart, against diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from pydantic import ValidationError
from safetensors.torch import save_file

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.protocols import NO_TOKENS, Attention, Conditioning, FineTuning, InputError, Look, PosteriorBackbone
from icekit.testing import tiny


def settings(model, **others) -> StableDiffusion.Settings:
    return StableDiffusion.Settings(model=str(model), **others)


@pytest.fixture(scope="module")
def backbone(sd_folder) -> StableDiffusion:
    return StableDiffusion(settings(sd_folder), "cpu")


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def row(seed: int, *, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def token(seed: int, *, requires_grad: bool = False) -> dict[str, torch.Tensor]:
    return {"clip_l": row(seed, requires_grad=requires_grad)}


def tiny_lora(seed: int = 0) -> FineTuning:
    """An adapter that visibly changes the picture, by diffusers' keys."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = tiny.tiny_pipeline().unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    return FineTuning({f"unet.{name}": tensor.clone() for name, tensor in get_peft_model_state_dict(unet).items()})


def with_schedule(**changes) -> StableDiffusionPipeline:
    """A tiny pipeline whose scheduler is another."""
    pipeline = tiny.tiny_pipeline()
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **changes)
    return pipeline


def test_facts(backbone):
    assert backbone.image_size == (128, 128)
    assert backbone.latent_shape == (4, 16, 16)
    assert backbone.word_grids == backbone.pixel_grids == ((16, 16), (8, 8), (4, 4), (2, 2))
    assert backbone.rows == {"clip_l": 32}
    assert backbone.device == torch.device("cpu")
    assert backbone.knows("griffin")
    assert not backbone.unet.training
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())


@pytest.mark.parametrize(("wanted", "expected"), [(192, (192, 192)), ([128, 192], (128, 192)), ((96, 64), (96, 64))])
def test_another_image_size(sd_folder, wanted, expected):
    """One side, or height and width, as a settings file writes them."""
    backbone = StableDiffusion(StableDiffusion.Settings(model=str(sd_folder), image_size=wanted), "cpu")
    height, width = expected
    assert backbone.image_size == expected
    assert backbone.latent_shape == (4, height // 8, width // 8)
    grid = height // 16, width // 16
    assert backbone.word_grids[1] == grid
    looked = backbone.predict(
        torch.zeros(1, *backbone.latent_shape),
        torch.tensor([0.5]),
        backbone.encode_prompts(["a cup"]),
        Look(words=(min(grid),), pixels=(min(grid),)),
    )
    [words], [pixels] = looked.attention.words, looked.attention.pixels
    assert words.shape == (1, 77, *grid)
    assert pixels.shape == (1, *grid, *grid)
    assert backbone.generate(["a cup"], seeds=[0], steps=1)[0].size == (width, height)


@pytest.mark.parametrize("wanted", [100, (128, 100)])
def test_an_image_size_that_does_not_fit(sd_folder, wanted):
    with pytest.raises(InputError, match=r"backbone.image_size = \[1.., 100\]: both sides must be multiples of 8"):
        StableDiffusion(settings(sd_folder, image_size=wanted), "cpu")
    with pytest.raises(ValidationError, match=r"one side in pixels, or two: \[height, width\]"):
        settings(sd_folder, image_size=0)


def test_a_picture_that_is_not_square_is_the_pipelines(sd_folder):
    image = StableDiffusion(settings(sd_folder, image_size=(64, 128)), "cpu").generate(["a cup"], seeds=[5], steps=2)[0]
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        "a cup", height=64, width=128, num_inference_steps=2, generator=torch.Generator().manual_seed(5)
    ).images[0]
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_identity_is_what_tokens_depend_on(backbone, sd_folder, sd15_folder, sd_v_folder, tmp_path):
    """Not the folder's name, and not the noise predictor."""
    assert backbone.identity.startswith("clip_l 646x32 ")
    copied = StableDiffusion(settings(shutil.copytree(sd_folder, tmp_path / "copy")), "cpu")
    assert copied.identity == backbone.identity
    others = [StableDiffusion(settings(folder), "cpu").identity for folder in (sd15_folder, sd_v_folder)]
    assert len({backbone.identity, *others}) == 3


def test_shares_are_the_steps_of_the_models_own_schedule(backbone):
    """Share 0.25 of 1000 steps is step 250; the ends are the first and the last step there is."""
    latents, noise = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = backbone.add_noise(latents, noise, torch.tensor([0.0, 0.25, 0.7504, 1.0]))
    torch.testing.assert_close(noisy, schedule.add_noise(latents, noise, torch.tensor([0, 250, 750, 999])))


@pytest.mark.parametrize(
    ("prediction_type", "expected"), [("epsilon", 3.0), ("v_prediction", 0.8 * 3.0 - 0.6 * 2.0), ("sample", 2.0)]
)
def test_targets_by_hand(prediction_type, expected):
    """A schedule of two steps, with 0.64 of the picture's variance left after the second: roots 0.8 and 0.6."""
    pipeline = with_schedule(trained_betas=[0.2, 0.2], num_train_timesteps=2, prediction_type=prediction_type)
    backbone = StableDiffusion.from_pipeline(pipeline, "cpu")
    latents, noise, shares = torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), 3.0), torch.tensor([0.5])
    torch.testing.assert_close(backbone.add_noise(latents, noise, shares), torch.full((1, 4, 2, 2), 3.4))
    target = backbone.training_target(latents, noise, shares)
    torch.testing.assert_close(target, torch.full((1, 4, 2, 2), expected))


def test_a_model_that_predicts_something_unknown_is_refused():
    pipeline = tiny.tiny_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(InputError, match=r"it predicts 'flow_prediction'; supported are epsilon, v_prediction, sample"):
        StableDiffusion.from_pipeline(pipeline, "cpu")


@pytest.mark.parametrize("folder", ["sd_folder", "sd15_folder", "sd_v_folder"])
def test_noise_and_targets_are_the_schedulers(folder, noise, request):
    folder = request.getfixturevalue(folder)
    backbone = StableDiffusion(settings(folder), "cpu")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    latents, eps = noise
    shares, timesteps = torch.tensor([0.003, 0.87]), torch.tensor([3, 870])
    noisy = backbone.add_noise(latents, eps, shares)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, eps, timesteps))
    target = backbone.training_target(latents, eps, shares)
    if folder == request.getfixturevalue("sd_v_folder"):
        torch.testing.assert_close(target, scheduler.get_velocity(latents, eps, timesteps))
    else:
        assert torch.equal(target, eps)


def test_latents_of_images_are_the_autoencoders(backbone, sd_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(images)
    assert latents.shape == (2, 4, 16, 16)
    with torch.no_grad():
        expected = pipeline.vae.encode(2 * images - 1).latent_dist.mode() * 0.18215
        torch.testing.assert_close(latents, expected)
        decoded = pipeline.image_processor.postprocess(pipeline.vae.decode(latents / 0.18215).sample, output_type="pt")
    torch.testing.assert_close(backbone.decode_latents(latents), decoded)


def test_the_posterior_of_images_is_the_autoencoders(backbone, sd_folder):
    """Mean and deviation, such that a sample of it is diffusers' own from the same noise."""
    assert isinstance(backbone, PosteriorBackbone)
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, deviation = backbone.posterior(images)
        gaussian = pipeline.vae.encode(2 * images - 1).latent_dist
    assert torch.equal(mean, backbone.encode_images(images))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    expected = gaussian.sample(torch.Generator().manual_seed(7)) * 0.18215
    torch.testing.assert_close(mean + deviation * noise, expected)
    assert (deviation > 0).all()


def test_an_image_depends_on_its_prompt_and_seed_alone(backbone):
    prompts, seeds = ["a cup", "a ball", "a cup"], [1, 2, 3]
    images = backbone.generate(prompts, seeds=seeds, steps=3)
    assert all(image.mode == "RGB" and image.size == (128, 128) for image in images)
    assert len({image.tobytes() for image in images}) == 3
    backwards = backbone.generate(prompts[::-1], seeds=seeds[::-1], steps=3)[::-1]
    assert [image.tobytes() for image in backwards] == [image.tobytes() for image in images]
    alone = backbone.generate(["a ball"], seeds=[2], steps=3)[0]
    assert alone.tobytes() == images[1].tobytes()
    with pytest.raises(ValueError, match="2 prompts need as many seeds, not 1"):
        backbone.generate(["a cup", "a ball"], seeds=[1])


def test_several_images_at_once_are_the_same_up_to_rounding(backbone, sd_folder):
    prompts, seeds = ["a cup", "a ball", "a bowl"], [1, 2, 3]
    one_at_a_time = backbone.generate(prompts, seeds=seeds, steps=3)
    at_once = StableDiffusion(settings(sd_folder, images_at_once=2), "cpu").generate(prompts, seeds=seeds, steps=3)
    for image, other in zip(one_at_a_time, at_once, strict=True):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_an_interrupted_batch_ends_with_the_same_bits(sd_folder):
    """Images that are there already are left out, and change nothing of those that are not."""
    backbone = StableDiffusion(settings(sd_folder, images_at_once=2), "cpu")
    prompts, seeds = ["a cup", "a ball", "a bowl", "a cube", "a vase"], [1, 2, 3, 4, 5]
    seen: dict[int, bytes] = {}
    images = backbone.generate(
        prompts, seeds=seeds, steps=1, on_image=lambda place, image: seen.update({place: image.tobytes()})
    )
    assert list(seen) == [0, 1, 2, 3, 4]
    assert list(seen.values()) == [image.tobytes() for image in images]
    calls = []
    handle = backbone.unet.register_forward_hook(lambda *_: calls.append(1))
    rest: dict[int, bytes] = {}
    others = backbone.generate(
        prompts,
        seeds=seeds,
        steps=1,
        skip=[0, 1, 2],
        on_image=lambda place, image: rest.update({place: image.tobytes()}),
    )
    handle.remove()
    assert len(calls) == 2  # nothing is made of the batch that is there already
    assert len(others) == 2
    assert rest == {place: seen[place] for place in (3, 4)}


def test_the_backbones_own_sampling_settings(sd_folder):
    """They hold wherever a caller says nothing else."""
    backbone = StableDiffusion(settings(sd_folder, steps=2, guidance_scale=3.0), "cpu")
    own = backbone.generate(["a cup"], seeds=[1])[0].tobytes()
    assert own == backbone.generate(["a cup"], seeds=[1], steps=2, guidance_scale=3.0)[0].tobytes()
    for other in ({"steps": 3}, {"guidance_scale": 7.5}, {"guidance_scale": 0.0}):
        assert own != backbone.generate(["a cup"], seeds=[1], **other)[0].tobytes(), other


def test_a_wrong_prompt_is_refused_before_any_image_is_made(backbone):
    seen = []
    with pytest.raises(InputError, match="unknown token <nothing-0>"):
        backbone.generate(["a cup", "a <nothing-0>"], seeds=[0, 0], on_image=lambda place, image: seen.append(place))
    assert not seen


def test_guidance_matters_and_can_be_off(backbone):
    with_guidance, without = (
        backbone.generate(["a cup"], seeds=[1], steps=2, guidance_scale=scale)[0].tobytes() for scale in (7.5, 1.0)
    )
    assert with_guidance != without


@pytest.mark.parametrize("folder", ["sd_folder", "sd15_folder"])
def test_tokens_are_what_load_textual_inversion_makes_of_them(folder, request, tmp_path):
    """Vectors saved one file a token give other tools the very prompt embeddings they have here."""
    folder = request.getfixturevalue(folder)
    backbone = StableDiffusion(settings(folder), "cpu")
    tokens = {"<cup-0>": token(0), "<cup-0-colour>": token(1)}
    prompt = "a photo of <cup-0> and <cup-0-colour>, red"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for name, rows in tokens.items():
        save_file({name: rows["clip_l"]}, tmp_path / "token.safetensors")
        pipeline.load_textual_inversion(tmp_path / "token.safetensors")
    expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(backbone.encode_prompts([prompt], tokens).parts["sequence"], expected)


def test_gradient_of_the_denoising_loss_reaches_the_row_alone(backbone, noise):
    latents, eps = noise
    learned = token(0, requires_grad=True)
    tokens = {"<cup-0>": learned, "<cup-0-colour>": token(1)}
    shares = torch.tensor([0.1, 0.5])
    conditioning = backbone.encode_prompts(["a <cup-0>", "a <cup-0-colour>"], tokens)
    prediction = backbone.predict(backbone.add_noise(latents, eps, shares), shares, conditioning, Look(words=(16,)))
    [position] = backbone.token_positions("a <cup-0>", ["<cup-0>"], tokens)
    loss = (prediction.output - eps).square().mean() + prediction.attention.words[0][0, position].mean()
    loss.backward()
    assert learned["clip_l"].grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.unet.parameters())


def test_a_token_of_another_family_is_refused(backbone):
    tokens = {"<cup-0>": {"clip_g": row(0), "t5xxl": row(1)}}
    with pytest.raises(InputError, match="<cup-0> has rows for clip_g, t5xxl, and this model reads rows for clip_l"):
        backbone.encode_prompts(["a <cup-0>"], tokens)


def test_a_lora_adapter_is_there_for_the_call(backbone):
    def make(tuning=None):
        return backbone.generate(["a cup"], seeds=[1], steps=2, tuning=tuning)[0].tobytes()

    parameters = {name: id(parameter) for name, parameter in backbone.unet.named_parameters()}
    plain = make()
    adapted = make(tiny_lora())
    assert adapted != plain
    assert make() == plain
    assert make(FineTuning()) == plain
    assert make(tiny_lora()) == adapted
    assert {name: id(parameter) for name, parameter in backbone.unet.named_parameters()} == parameters
    wrong = FineTuning({name: torch.zeros(3, 3) for name in tiny_lora().lora})
    with pytest.raises(InputError, match="LoRA adapter was trained for another model"):
        make(wrong)
    assert make() == plain


def test_reduced_precision(sd_folder, noise):
    backbone = StableDiffusion(settings(sd_folder, dtype="bfloat16"), "cpu")
    assert backbone.unet.dtype == torch.bfloat16
    shares = torch.tensor([0.01, 0.5])
    conditioning = backbone.encode_prompts(["a cup", "a ball"])
    assert conditioning.parts["sequence"].dtype == torch.float32
    prediction = backbone.predict(noise[0], shares, conditioning, Look(words=(8,), pixels=(8,)))
    assert prediction.output.dtype == torch.float32
    torch.testing.assert_close(prediction.attention.words[0].sum(1), torch.ones(2, 8, 8))
    full = StableDiffusion(settings(sd_folder), "cpu").predict(noise[0], shares, conditioning)
    assert full.attention == Attention()
    assert (prediction.output - full.output).norm() < 0.05 * full.output.norm()
    assert backbone.generate(["a cup"], seeds=[0], steps=2)[0].size == (128, 128)


def test_from_a_pipeline_in_memory(backbone):
    built = StableDiffusion.from_pipeline(tiny.tiny_pipeline(), "cpu")
    images = [model.generate(["a red cup"], seeds=[0], steps=2)[0].tobytes() for model in (built, backbone)]
    assert images[0] == images[1]


def test_nothing_is_printed(sd_folder, capfd):
    model = StableDiffusion(settings(sd_folder, dtype="bfloat16"), "cpu")
    model.generate(["a <cup-0>"], seeds=[0], steps=1, tokens={"<cup-0>": token(0)}, tuning=tiny_lora())
    assert capfd.readouterr() == ("", "")


class TestModelsThatCannotBeUsed:
    """One line each, naming what was typed and what would be right."""

    def refused(self, model) -> str:
        with pytest.raises(InputError) as caught:
            StableDiffusion(settings(model), "cpu")
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"backbone.model = {str(model)!r}: ")
        return message

    def test_no_such_folder(self, tmp_path):
        assert "there is no such folder" in self.refused(tmp_path / "nothing")

    def test_unknown_id(self):
        assert "the Hugging Face hub does not give it" in self.refused("icekit/no-such-model")

    def test_not_a_model(self, tmp_path):
        assert "the folder has no model_index.json" in self.refused(tmp_path)
        (tmp_path / "model_index.json").write_text("{")
        assert "model_index.json cannot be read" in self.refused(tmp_path)

    def test_another_pipeline(self, tmp_path):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
        message = self.refused(tmp_path)
        assert "made for StableDiffusionXLPipeline; supported is StableDiffusionPipeline" in message

    def test_weights_missing_or_pickled(self, sd_folder, tmp_path):
        folder = shutil.copytree(sd_folder, tmp_path / "model")
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        message = self.refused(folder)
        assert "cannot be loaded from safetensors files" in message
        assert "diffusion_pytorch_model" in message

    def test_inpainting(self):
        pipeline = tiny.tiny_pipeline()
        pipeline.unet.register_to_config(in_channels=9)
        with pytest.raises(InputError, match=r"takes 9 channels .*inpainting"):
            StableDiffusion.from_pipeline(pipeline, "cpu")


class WordsAlone(StableDiffusion):
    """Hides the end of a prompt and the padding from the noise predictor."""

    def encode_prompts(self, prompts, tokens=NO_TOKENS) -> Conditioning:
        states, mask = self._text.encode_words(prompts, self._own_rows(tokens))
        return Conditioning({"sequence": states, "mask": mask})


def test_a_subclass_may_hide_positions_of_the_prompt(sd_folder: Path) -> None:
    backbone = WordsAlone(settings(sd_folder), "cpu")
    conditioning = backbone.encode_prompts(["a cup"])
    sequence, mask = conditioning.parts["sequence"], conditioning.parts["mask"]
    assert mask[0].nonzero().flatten().tolist() == [
        0,
        *backbone.token_positions("a cup", ["a"])[0],
        *backbone.token_positions("a cup", ["cup"])[0],
    ]
    noisy, shares = torch.randn(1, *backbone.latent_shape), torch.tensor([0.5])
    with torch.no_grad():
        prediction = backbone.predict(noisy, shares, conditioning, Look(words=(8,)))
        assert prediction.attention.words[0][0, ~mask[0]].max() < 1e-6
        changed = sequence.masked_fill(~mask[..., None], 7.0)
        same = backbone.predict(noisy, shares, Conditioning({"sequence": changed, "mask": mask}))
    torch.testing.assert_close(same.output, prediction.output)


@pytest.mark.parametrize(("guidance", "empty"), [(7.5, [1]), (1.0, [])])
def test_hidden_positions_are_hidden_while_generating(sd_folder: Path, guidance: float, empty: list[int]) -> None:
    backbone = WordsAlone(settings(sd_folder), "cpu")
    masks: list[torch.Tensor] = []
    handle = backbone.unet.register_forward_hook(
        lambda _unet, _arguments, named, _output: masks.append(named["encoder_attention_mask"]), with_kwargs=True
    )
    backbone.generate(["a cup"], seeds=[0], steps=1, guidance_scale=guidance)
    handle.remove()
    [mask] = masks
    words = [place for places in backbone.token_positions("a cup", ["a", "cup"]) for place in places]
    assert mask.sum(dim=1).tolist() == [*empty, 1 + len(words)]  # the empty prompt, then the prompt
    assert not backbone.unet._forward_pre_hooks
