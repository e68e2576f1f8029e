"""Stable Diffusion, taken apart, against diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from icekit.backbones.stable_diffusion import StableDiffusion, diffuse, velocity
from icekit.protocols import Backbone, InputError, PosteriorBackbone


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


def tiny_lora(seed: int = 0) -> dict[str, torch.Tensor]:
    """An adapter that visibly changes the picture, by diffusers' keys."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = tiny_models.tiny_pipeline().unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    return {f"unet.{name}": tensor.clone() for name, tensor in get_peft_model_state_dict(unet).items()}


def test_it_offers_all_that_a_backbone_must(backbone):
    for name, member in vars(Backbone).items():
        if name.startswith("_"):
            continue
        assert hasattr(backbone, name), name
        if inspect.isfunction(member):
            expected = [parameter.name for parameter in inspect.signature(member).parameters.values()]
            assert list(inspect.signature(getattr(StableDiffusion, name)).parameters) == expected, name
    for name in Backbone.__annotations__:
        assert hasattr(backbone, name), name


def test_facts(backbone):
    assert backbone.image_size == 128
    assert backbone.latent_shape == (4, 16, 16)
    assert backbone.attention_resolutions == (16, 8, 4, 2)
    assert backbone.embedding_dim == 32
    assert backbone.num_timesteps == 1000
    assert backbone.device == torch.device("cpu")
    assert backbone.knows("griffin")
    assert backbone.suggestions == {}
    assert not backbone.unet.training
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())


def test_another_image_size(sd_folder):
    backbone = StableDiffusion(settings(sd_folder, image_size=192), "cpu")
    assert backbone.latent_shape == (4, 24, 24)
    assert backbone.attention_resolutions == (24, 12, 6, 3)
    with backbone.capture_attention(self_=[12]) as maps:
        backbone.predict(torch.zeros(1, 4, 24, 24), torch.tensor([5]), backbone.encode_prompts(["a cup"]))
    assert maps.self_(12).shape == (1, 144, 144)
    assert backbone.generate(["a cup"], seeds=[0], steps=1)[0].size == (192, 192)
    with pytest.raises(InputError, match=r"backbone.image_size = 100: it must be a multiple of 8"):
        StableDiffusion(settings(sd_folder, image_size=100), "cpu")


def test_noise_and_targets_by_hand():
    latents, noise = torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0]]]])
    alpha_bar = torch.tensor([0.64])  # roots 0.8 and 0.6
    torch.testing.assert_close(diffuse(latents, noise, alpha_bar), torch.tensor([[[[3.4]]]]))
    torch.testing.assert_close(velocity(latents, noise, alpha_bar), torch.tensor([[[[1.2]]]]))


@pytest.mark.parametrize("folder", ["sd_folder", "sd15_folder", "sd_v_folder"])
def test_noise_and_targets_are_the_schedulers(folder, noise, request):
    folder = request.getfixturevalue(folder)
    backbone = StableDiffusion(settings(folder), "cpu")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    latents, eps = noise
    timesteps = torch.tensor([3, 870])
    noisy = backbone.add_noise(latents, eps, timesteps)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, eps, timesteps))
    target = backbone.training_target(latents, eps, timesteps)
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


@pytest.mark.parametrize("folder", ["sd_folder", "sd15_folder"])
def test_generation_is_the_pipelines(folder, request):
    """The same image as StableDiffusionPipeline makes of the same prompt with the same sampler."""
    folder = request.getfixturevalue(folder)
    image = StableDiffusion(settings(folder), "cpu").generate(["a red cup"], seeds=[5], steps=4)[0]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        "a red cup", num_inference_steps=4, guidance_scale=7.5, generator=torch.Generator().manual_seed(5)
    ).images[0]
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1


def test_an_image_depends_on_its_prompt_and_seed_alone(backbone):
    seen = []
    prompts, seeds = ["a cup", "a ball", "a cup"], [1, 2, 3]
    images = backbone.generate(prompts, seeds=seeds, steps=3, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
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


def test_a_wrong_prompt_is_refused_before_any_image_is_made(backbone):
    seen = []
    with pytest.raises(InputError, match="unknown token <nothing-0>"):
        backbone.generate(["a cup", "a <nothing-0>"], seeds=[0, 0], on_step=lambda done, total: seen.append(done))
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
    rows = {"<cup-0>": row(0), "<cup-0-colour>": row(1)}
    backbone.set_tokens(rows)
    prompt = "a photo of <cup-0> and <cup-0-colour>, red"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for name, tensor in rows.items():
        save_file({name: tensor}, tmp_path / "token.safetensors")
        pipeline.load_textual_inversion(tmp_path / "token.safetensors")
    expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(backbone.encode_prompts([prompt]).sequence, expected)


def test_gradient_of_the_denoising_loss_reaches_the_row_alone(backbone, noise):
    latents, eps = noise
    learned = row(0, requires_grad=True)
    backbone.set_tokens({"<cup-0>": learned, "<cup-0-colour>": row(1)})
    timesteps = torch.tensor([100, 500])
    conditioning = backbone.encode_prompts(["a <cup-0>", "a <cup-0-colour>"])
    with backbone.capture_attention(cross=[16], places=["down", "up"]) as maps:
        prediction = backbone.predict(backbone.add_noise(latents, eps, timesteps), timesteps, conditioning)
    position = backbone.token_positions("a <cup-0>", ["<cup-0>"])[0]
    loss = (prediction - eps).square().mean() + maps.cross(16)[0, position].mean()
    loss.backward()
    assert learned.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.unet.parameters())


def test_a_lora_adapter_is_there_for_the_call(backbone):
    def make(lora=None):
        return backbone.generate(["a cup"], seeds=[1], steps=2, lora=lora)[0].tobytes()

    parameters = {name: id(parameter) for name, parameter in backbone.unet.named_parameters()}
    plain = make()
    adapted = make(tiny_lora())
    assert adapted != plain
    assert make() == plain
    assert make(tiny_lora()) == adapted
    assert {name: id(parameter) for name, parameter in backbone.unet.named_parameters()} == parameters
    wrong = {name: torch.zeros(3, 3) for name in tiny_lora()}
    with pytest.raises(InputError, match="LoRA adapter was trained for another model"):
        make(wrong)
    assert make() == plain


def test_reduced_precision(sd_folder, noise):
    backbone = StableDiffusion(settings(sd_folder, dtype="bfloat16"), "cpu")
    assert backbone.unet.dtype == torch.bfloat16
    conditioning = backbone.encode_prompts(["a cup", "a ball"])
    assert conditioning.sequence.dtype == torch.float32
    with backbone.capture_attention(cross=[8], self_=[8]) as maps:
        prediction = backbone.predict(noise[0], torch.tensor([10, 500]), conditioning)
    assert prediction.dtype == torch.float32
    torch.testing.assert_close(maps.cross(8).sum(1), torch.ones(2, 8, 8))
    full = StableDiffusion(settings(sd_folder), "cpu").predict(noise[0], torch.tensor([10, 500]), conditioning)
    assert (prediction - full).norm() < 0.05 * full.norm()
    assert backbone.generate(["a cup"], seeds=[0], steps=2)[0].size == (128, 128)


def test_from_a_pipeline_in_memory(backbone):
    built = StableDiffusion.from_pipeline(tiny_models.tiny_pipeline(), "cpu")
    images = [model.generate(["a red cup"], seeds=[0], steps=2)[0].tobytes() for model in (built, backbone)]
    assert images[0] == images[1]


def test_nothing_is_printed(sd_folder, capfd):
    model = StableDiffusion(settings(sd_folder, dtype="bfloat16"), "cpu")
    model.set_tokens({"<cup-0>": row(0)})
    model.generate(["a <cup-0>"], seeds=[0], steps=1, lora=tiny_lora())
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
        pipeline = tiny_models.tiny_pipeline()
        pipeline.unet.register_to_config(in_channels=9)
        with pytest.raises(InputError, match=r"takes 9 channels .*inpainting"):
            StableDiffusion.from_pipeline(pipeline, "cpu")


def test_words_only_hides_the_end_and_the_padding(sd_folder: Path) -> None:
    settings = StableDiffusion.Settings(model=str(sd_folder), words_only=True)
    backbone = StableDiffusion(settings, "cpu")
    conditioning = backbone.encode_prompts(["a cup"])
    assert conditioning.extra["mask"][0].nonzero().flatten().tolist() == [
        0,
        *backbone.token_positions("a cup", ["a"])[0],
        *backbone.token_positions("a cup", ["cup"])[0],
    ]
    noisy, timesteps = torch.randn(1, *backbone.latent_shape), torch.tensor([500])
    with torch.no_grad(), backbone.capture_attention(cross=[8]) as maps:
        prediction = backbone.predict(noisy, timesteps, conditioning)
        hidden = ~conditioning.extra["mask"][0]
        assert maps.cross(8)[0, hidden].max() < 1e-6
        changed = conditioning.sequence.clone()
        changed[:, hidden] = 7.0
        same = backbone.predict(noisy, timesteps, dataclasses.replace(conditioning, sequence=changed))
    torch.testing.assert_close(same, prediction)


def test_words_only_holds_while_generating(sd_folder: Path) -> None:
    backbone = StableDiffusion(StableDiffusion.Settings(model=str(sd_folder), words_only=True), "cpu")
    masks: list[torch.Tensor] = []
    handle = backbone.unet.register_forward_hook(
        lambda _unet, _arguments, named, _output: masks.append(named["encoder_attention_mask"]), with_kwargs=True
    )
    backbone.generate(["a cup"], seeds=[0], steps=1)
    handle.remove()
    [mask] = masks
    words = [place for places in backbone.token_positions("a cup", ["a", "cup"]) for place in places]
    assert mask.sum(dim=1).tolist() == [1, 1 + len(words)]  # the empty prompt, then the prompt
    assert not backbone.unet._forward_pre_hooks
