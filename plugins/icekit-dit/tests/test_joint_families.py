"""Stable Diffusion 3.x and FLUX.1 as backbones: conformance, what is their own, and what is wrong with a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import subjects_under_test as under_test
import torch
from icekit_dit.attention import mean_weights
from icekit_dit.flux import Flux, image_ids, pack, unpack
from icekit_dit.sd3 import StableDiffusion3
from icekit_dit.transformer import dynamic_shift, shifted, unshifted
from tiny_transformers import change
from torch import Tensor

from icekit.protocols import InputError, Look
from icekit.testing import BackboneUnderTest, check_backbone, parametrize_with_checks


@pytest.fixture(scope="module", params=["sd3", "flux"])
def subject(request: pytest.FixtureRequest) -> BackboneUnderTest:
    """SD 3 with the CLIP configurations and sizes as they are, FLUX.1-dev for pictures that are not square."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    return under_test.sd3(folder) if request.param == "sd3" else under_test.flux(folder, image_size=(48, 64))


@parametrize_with_checks("backbone")
def test_conformance(check: Callable[[Any], None], subject: BackboneUnderTest) -> None:
    check(subject)


@pytest.mark.slow
def test_conformance_without_t5_and_without_guidance(sd3_without_t5_folder: Path, schnell_folder: Path) -> None:
    for one in (under_test.sd3(sd3_without_t5_folder), under_test.flux(schnell_folder, image_size=(64, 48))):
        failed = [str(result) for result in check_backbone(one) if result.outcome == "failed"]
        assert not failed


# --- Formulas by hand -------------------------------------------------------------------------------------------------


def test_a_shift_makes_more_of_the_schedule_noisy() -> None:
    """A shift of 3 makes half of the schedule three quarters of noise: 3 / 2 over 1 + 2 / 2."""
    shares = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shifted(shares, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert unshifted(0.75, 3.0) == pytest.approx(0.5)


def test_a_shift_by_size_is_the_pipelines() -> None:
    """The shift is e^mu, and mu 0.5 at 256 places and 1.15 at 4096; the schedule that diffusers makes of it is ours."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert dynamic_shift(schedule.config, 256) == pytest.approx(torch.tensor(0.5).exp().item())
    assert dynamic_shift(schedule.config, 4096) == pytest.approx(torch.tensor(1.15).exp().item())
    schedule.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=1.15)
    ours = shifted(torch.tensor([1.0, 0.6, 0.2]), dynamic_shift(schedule.config, 4096))
    torch.testing.assert_close(schedule.sigmas[:-1], ours)


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 8)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(packed, (3, 4)), latents)
    assert torch.equal(image_ids((3, 4)), FluxPipeline._prepare_latent_image_ids(1, 3, 4, "cpu", torch.float32))


def test_mean_weights_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of heads at a time, with and without a gradient: softmax over all keys, read at some."""
    query, key = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 7, 5)
    expected = (query @ key.transpose(-1, -2) / 5**0.5).softmax(dim=-1).mean(dim=1)
    for most in (1, 2**26):
        monkeypatch.setattr("icekit_dit.attention.MOST_WEIGHTS", most)
        first, rest = mean_weights(query, key, [slice(0, 2), slice(2, None)])
        torch.testing.assert_close(torch.cat([first, rest], dim=-1), expected)
        [wanted] = torch.autograd.grad(expected[..., 1].sum(), query, retain_graph=True)
        [given] = torch.autograd.grad(first[..., 1].sum(), query)
        torch.testing.assert_close(given, wanted)
        with torch.no_grad():
            torch.testing.assert_close(mean_weights(query, key, [slice(0, 7)])[0], expected)


# --- What is their own ------------------------------------------------------------------------------------------------


def sd3(folder: Path, **settings: Any) -> StableDiffusion3:
    return StableDiffusion3(StableDiffusion3.Settings(model=str(folder), steps=2, **settings), "cpu")


def flux(folder: Path, **settings: Any) -> Flux:
    return Flux(Flux.Settings(model=str(folder), **{"steps": 2, "image_size": (48, 64), **settings}), "cpu")


def test_stable_diffusion_3_without_t5(sd3_folder: Path, sd3_without_t5_folder: Path) -> None:
    """A token has no row for it, and a word no position; zeros are where T5's states would be."""
    whole, without = sd3(sd3_folder), sd3(sd3_without_t5_folder)
    assert dict(without.rows) == {"clip_l": 8, "clip_g": 16}
    assert whole.token_positions("a red cup", ["cup"]) == [[3, 77 + 2]]
    assert without.token_positions("a red cup", ["cup"]) == [[3]]
    sequence = without.encode_prompts(["a red cup"]).parts["sequence"]
    assert torch.equal(sequence[:, :77], whole.encode_prompts(["a red cup"]).parts["sequence"][:, :77])
    assert sequence.shape == (1, 77 + 256, 32) and not sequence[:, 77:].any()
    [image] = without.generate(["a red cup"], seeds=[0], steps=1)
    assert image.size == (64, 64)


def test_flux_is_told_of_guidance_where_it_was_distilled(flux_folder: Path, schnell_folder: Path) -> None:
    """Dev predicts otherwise under another guidance, and schnell is not told of any; a step is one pass."""
    noisy, at = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    for folder, differs in ((flux_folder, True), (schnell_folder, False)):
        outputs = []
        for guidance in (1.0, 3.5):
            backbone = flux(folder, learning_guidance=guidance)
            outputs.append(backbone.predict(noisy, at, backbone.encode_prompts(["a cup"])).output.detach())
        assert torch.equal(*outputs) is not differs
        assert backbone.passes(4, 3.5) == 4


def test_schnell_takes_few_steps(flux_folder: Path, schnell_folder: Path) -> None:
    """Where nobody says how many: 4, as it was trained, and 28 with dev. A setting wins, and a call over it."""
    taken: list[int] = []
    for folder, steps in ((flux_folder, 28), (schnell_folder, 4)):
        backbone = flux(folder, steps=None)
        assert backbone.passes(None, 3.5) == steps and flux(folder, steps=3).passes(None, 3.5) == 3
        backbone.transformer.register_forward_hook(lambda *_: taken.append(1))
        backbone.generate(["a cup"], seeds=[0])
        assert len(taken) == steps
        taken.clear()
        backbone.generate(["a cup"], seeds=[0], steps=1)
        assert len(taken) == 1
        taken.clear()


def test_places_divide_their_attention_among_the_prompt_and_the_picture(flux_folder: Path) -> None:
    """Joint softmax in all blocks: to words and to places together it sums to one, so that words alone do not."""
    backbone = flux(flux_folder)
    with backbone._seeing(True, True, 512) as seen, torch.no_grad():
        backbone._predicted(torch.zeros(1, 4, 12, 16), torch.tensor([0.5]), backbone.encode_prompts(["a cup"]))
        words, pixels = seen()
    assert words is not None and pixels is not None
    assert (words.shape, pixels.shape) == ((1, 48, 512), (1, 48, 48))
    torch.testing.assert_close(words.sum(-1) + pixels.sum(-1), torch.ones(1, 48))
    assert 0 < float(words.sum(-1).max()) < 1


def test_pictures_of_any_shape(sd3_folder: Path, flux_folder: Path) -> None:
    """The proportions are kept, about as many pixels as the model is used to; SD 3 has no place beyond its table."""
    from_sd3 = sd3(sd3_folder).for_picture(100, 400)
    height, width = from_sd3.image_size
    assert height < width <= 16 * 8 and height % 8 == 0 and from_sd3.latent_shape == (4, height // 4, width // 4)
    backbone = flux(flux_folder, image_size=None)
    assert backbone.image_size == (512, 512)  # 128 latents of 4 pixels
    assert backbone.for_picture(100, 200).image_size == (360, 720)
    fixed = flux(flux_folder)
    assert fixed.for_picture(100, 200) is fixed
    with pytest.raises(InputError, match=r"image_size = \[136, 64\]: both sides must be multiples of 8 of at most 128"):
        sd3(sd3_folder, image_size=(136, 64))
    with pytest.raises(InputError, match=r"image_size = \[44, 64\]: both sides must be multiples of 8$"):
        flux(flux_folder, image_size=(44, 64))


@pytest.mark.parametrize("family", [sd3, flux])
def test_saving_memory_changes_nothing(family: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    """Gradients of rows through maps and prediction, and pictures, with blocks computed twice and parts in turn."""

    def results(**settings: Any) -> list[Tensor]:
        backbone = family(request.getfixturevalue(f"{family.__name__}_folder"), **settings)
        rows = {name: row.clone().requires_grad_() for name, row in backbone.word_rows("cup").items()}
        encoded = backbone.encode_prompts(["a photo of <x>"], {"<x>": rows})
        noisy = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        seen = backbone.predict(noisy, torch.tensor([0.4]), encoded, Look(words=(8,), pixels=(8,)))
        # Not their sums, which are one whatever the row.
        weighing = torch.linspace(0, 1, seen.attention.words[0].numel()).view_as(seen.attention.words[0])
        loss = seen.output.square().mean() + (seen.attention.words[0] * weighing).sum()
        loss.backward()
        [image] = backbone.generate(["a cup"], seeds=[3], steps=1)
        gradients = [row.grad for row in rows.values() if row.grad is not None]
        assert len(gradients) == len(rows)
        return [*gradients, torch.tensor(list(image.tobytes()))]

    plain = results()
    for settings in ({"gradient_checkpointing": True}, {"low_memory": "on"}):
        for one, other in zip(results(**settings), plain, strict=True):
            torch.testing.assert_close(one, other)


def test_half_precision(flux_folder: Path) -> None:
    """bfloat16 is close to float32, T5 alone among the encoders has it, and rows get float32 gradients."""
    backbone, plain = flux(flux_folder, dtype="bfloat16"), flux(flux_folder)
    assert backbone.transformer.dtype == torch.bfloat16
    assert {name: text.table.dtype for name, text in backbone._texts.items()} == {
        "clip_l": torch.float32, "t5xxl": torch.bfloat16,
    }  # fmt: skip
    rows = {name: row.requires_grad_() for name, row in backbone.word_rows("cup").items()}
    noisy, at = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    output = backbone.predict(noisy, at, backbone.encode_prompts(["a <x>"], {"<x>": rows})).output
    output.square().mean().backward()
    assert output.dtype == torch.float32
    assert all(row.grad is not None and row.grad.dtype == torch.float32 and row.grad.any() for row in rows.values())
    expected = plain.predict(noisy, at, plain.encode_prompts(["a cup"])).output
    assert float((output.detach() - expected).norm() / expected.norm()) < 0.05


# --- What is wrong with a folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "model_index.json: text_encoder is .*CLIPTextModel"),
        ("model_index.json", {"_class_name": "PixArtSigmaPipeline"}, "made for PixArt.*supported is FluxPipeline"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler is a DDIMScheduler"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": False, "shift": 0}, "shift is 0; .* above 0"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas = true"),
        ("transformer/config.json", {"joint_attention_dim": 24}, "transformer"),
    ],
)
def test_a_wrong_folder_is_one_line(
    file: str, values: dict[str, Any], says: str, flux_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(flux_folder, tmp_path / "model"))
    change(folder / file, **values)
    with pytest.raises(InputError, match=rf"^backbone\.model = .*{says}") as error:
        flux(folder)
    assert "\n" not in str(error.value)
