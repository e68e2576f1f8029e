"""Settings with which a model needs less memory: the result is the same, and the parts go where they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icekit.backbones.common import predictor_dtype
from icekit.backbones.residence import Residence
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.backbones.stable_diffusion_xl import StableDiffusionXL
from icekit.backbones.unet import UNetBackbone
from icekit.protocols import FineTuning, Look
from icekit.testing import tiny

CPU, META = torch.device("cpu"), torch.device("meta")
Make = Callable[..., UNetBackbone]


@pytest.fixture(scope="module", params=["sd21", "sdxl"])
def make(request) -> Make:
    """Makes a backbone of this family with these settings."""
    kind, pipeline = {
        "sd21": (StableDiffusion, tiny.tiny_pipeline),
        "sdxl": (StableDiffusionXL, tiny.tiny_xl_pipeline),
    }[request.param]
    return lambda **settings: kind.from_pipeline(pipeline(seed=0), "cpu", kind.Settings(steps=1, **settings))


def learning_step(backbone: UNetBackbone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a token's rows and of a LoRA adapter: a loss on the prediction, on its attention, and on a text."""
    token = {name: nn.Parameter(row) for name, row in backbone.word_rows("cup").items()}
    tokens, shares = {"<cup-0>": token}, torch.tensor([0.3])
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = backbone.encode_images(torch.full((1, 3, *backbone.image_size), 0.5))
    with backbone.fine_tuned("lora", 2, torch.Generator().manual_seed(0)) as tuned:
        for weight in tuned.parameters.values():
            weight.data += 0.01
        encoded = backbone.encode_prompts(["a <cup-0>"], tokens)
        with torch.no_grad():
            backbone.encode_prompts(["a cup"])  # as prior preservation does, in the middle of a step
        noisy = backbone.add_noise(latents, noise, shares)
        prediction = backbone.predict(noisy, shares, encoded, Look(words=(16, 8)))
        texts = backbone.embed_texts(["<cup-0>"], tokens)
        maps = sum(words[:, 2].square().mean() for words in prediction.attention.words)
        (prediction.output.square().mean() + maps + texts.mean()).backward()
        return (
            {name: row.grad for name, row in token.items() if row.grad is not None},
            {name: one.grad.clone() for name, one in tuned.parameters.items() if one.grad is not None},
        )


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"low_memory": "on"}])
def test_learning_and_drawing_are_the_same_bits(make: Make, settings: dict[str, Any]) -> None:
    plain, saving = make(image_size=64), make(image_size=64, **settings)
    expected = learning_step(plain)
    assert len(expected[0]) == len(plain.rows) and expected[1]
    torch.testing.assert_close(learning_step(saving), expected, rtol=0, atol=0)
    tuning = FineTuning(lora={name: torch.full_like(grad, 0.02) for name, grad in expected[1].items()})

    def drawn(model: UNetBackbone) -> list[bytes]:
        token = {"<b-0>": model.word_rows("ball")}
        images = model.generate(["a red cup", "a <b-0>"], seeds=[0, 1], tokens=token)
        return [one.tobytes() for one in images + model.generate(["a cup"], seeds=[2], tuning=tuning)]

    assert drawn(saving) == drawn(plain)


def test_pictures_as_one_batch_are_decoded_one_by_one(make: Make) -> None:
    plain, saving = make(image_size=64, images_at_once=2), make(image_size=64, images_at_once=2, low_memory="on")
    latents = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(saving.decode_latents(latents), plain.decode_latents(latents), rtol=1e-4, atol=1e-4)


def test_the_autoencoder_works_in_tiles_where_it_should(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {how: make(vae_tiling=how, image_size=(64, 192)) for how in ("off", "auto", "on")}
    picture = torch.linspace(0, 1, models["on"].image_size[1]).expand(1, 3, *models["on"].image_size)

    @torch.no_grad()
    def pictures() -> dict[str, Tensor]:
        return {how: model.decode_latents(model.encode_images(picture)) for how, model in models.items()}

    whole = pictures()
    assert torch.equal(whole["auto"], whole["off"]) and not torch.equal(whole["on"], whole["off"])
    reference = models["off"]._vae
    reference.enable_tiling()
    with torch.no_grad():
        encoded = reference.encode(picture * 2 - 1).latent_dist.mean
        decoded = (reference.decode(encoded).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(whole["on"], decoded, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("icekit.backbones.pipeline.TILED_ABOVE", 1000)
    assert torch.equal(pictures()["auto"], whole["on"])


@pytest.mark.parametrize(
    ("wanted", "device", "capability", "expected"),
    [
        ("auto", "cpu", None, torch.float32),
        ("auto", "mps", None, torch.float32),
        ("auto", "cuda", (7, 5), torch.float16),
        ("auto", "cuda", (8, 0), torch.bfloat16),
        ("auto", "cuda", (9, 0), torch.bfloat16),
        ("float32", "cuda", (9, 0), torch.float32),
        ("float16", "cpu", None, torch.float16),
    ],
)
def test_the_number_format_is_the_cards(wanted, device, capability, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert predictor_dtype(wanted, torch.device(device)) == expected


# --- Where the parts are ----------------------------------------------------------------------------------------------


class Places(Residence):
    """Parts of one number each, and where they would be: nothing is moved, for here there is one device alone."""

    def __init__(self, *, in_turn: bool) -> None:
        super().__init__({name: [nn.Linear(1, 1)] for name in ("texts", "unet", "vae")}, CPU, in_turn=in_turn)
        self.there = set() if in_turn else {"texts", "unet", "vae"}
        self._away = META

    def _move(self, name: str, device: torch.device) -> None:
        self.there = self.there | {name} if device == CPU else self.there - {name}


def test_all_parts_stay_where_memory_is_not_short() -> None:
    residence = Places(in_turn=False)
    residence.use("vae")
    assert residence.there == {"texts", "unet", "vae"}


@torch.no_grad()
def test_one_part_at_a_time_without_gradients() -> None:
    residence = Places(in_turn=True)
    for name in ("texts", "unet", "vae", "unet"):
        residence.use(name)
        assert residence.there == {name}


def test_what_learning_used_stays_until_something_else_begins() -> None:
    residence = Places(in_turn=True)
    residence.use("texts")
    residence.use("unet")
    with torch.no_grad():
        residence.use("texts")
        assert residence.there == {"texts", "unet"}
        residence.release()
        residence.use("vae")
        assert residence.there == {"vae"}


@torch.no_grad()
def test_what_is_being_changed_stays() -> None:
    residence = Places(in_turn=True)
    with residence.pinned("unet"):
        residence.use("vae")
        assert residence.there == {"unet", "vae"}
    residence.use("texts")
    assert residence.there == {"texts"}


def test_a_graph_keeps_what_it_was_built_with() -> None:
    """What goes to the device meta has no numbers any more: the gradient is of those that were there before."""
    text = nn.Linear(2, 3).requires_grad_(False)
    residence = Residence({"texts": [text], "vae": []}, CPU, in_turn=True)
    residence._away = META
    given = torch.ones(1, 2, requires_grad=True)
    residence.use("texts")
    output = text(given)
    expected = 2 * output.detach() @ text.weight
    residence.release()
    residence.use("vae")
    assert {one.device for one in text.parameters()} == {META} and not any(
        one.requires_grad for one in text.parameters()
    )
    output.square().sum().backward()
    torch.testing.assert_close(given.grad, expected)
