"""Numbers that a model cannot hold: named with the number format and the way out, in whatever stage they show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import torch
from learning import learn_watched, noise_image, two_regions
from PIL import Image
from torch import Tensor

from icekit import RunError, extract
from icekit.attention.looking import look_at
from icekit.backbones.common import to_pictures
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.builtin.learners.ice import IceLearner, IceSettings
from icekit.learning.training import check_finite
from icekit.plugins import Plugins
from icekit.protocols import Look, Prediction
from icekit.run.compose import compose
from icekit.run.learning import NoCheckpoint
from icekit.settings import load_settings

PARTS = {"backbone": "sd21", "retriever": "plain", "segmentor": "plain", "learner": "random"}
WAY_OUT = r'Settings\(backbone={"dtype": "float32"}\)'
HALF = rf"the noise predictor \(unet\) in float16 gives numbers that are NaN or infinite; .*{WAY_OUT}"


def load(folder: Path, **settings: Any) -> StableDiffusion:
    return StableDiffusion(StableDiffusion.Settings(model=str(folder), steps=2, **settings), "cpu")


def final_norm(backbone: StableDiffusion) -> Any:
    """The last layer of its text encoder."""
    [norm] = [one for name, one in backbone._text.model.named_modules() if name.endswith("final_layer_norm")]
    return norm


def enlarged(backbone: StableDiffusion) -> StableDiffusion:
    """Its first layer gives numbers that a norm makes small again, and that float16 cannot hold."""
    with torch.no_grad():
        backbone.unet.conv_in.weight.sign_().mul_(6e4)
    return backbone


@pytest.fixture(scope="module")
def half(sd_folder: Path) -> StableDiffusion:
    return enlarged(load(sd_folder, dtype="float16"))


@pytest.fixture
def plugins() -> Plugins:
    return plain.beside_builtins()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = (noise_image().permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(found: Plugins, photo: Path, out: Path, folder: Path, backbone: StableDiffusion, **options: Any) -> Any:
    values = {"components": PARTS, "samples": 0, "naming": "retrieved", "retriever": {"ghosts": 0}, "max_concepts": 1}
    model = {"backbone": {"model": str(folder), "steps": 2}}
    settings = load_settings(options=values | model | options)
    return extract(photo, out, settings, installed=found, backbone=backbone, overwrite=True)


# --- Half precision --------------------------------------------------------------------------------------------------


def test_the_same_model_works_in_float32(sd_folder: Path) -> None:
    backbone = enlarged(load(sd_folder, dtype="float32"))
    [picture] = backbone.generate(["a cup"], seeds=[0])
    assert picture.size == (128, 128)


def test_in_stage_one(half: StableDiffusion) -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RunError, match=f"^{HALF}$"):
        look_at(half, noise_image(), "a cup", Look(words=(8,)), shares=(0.5,), generator=generator)


def test_in_learning(half: StableDiffusion) -> None:
    """Nobody blames the learning rate."""
    with pytest.raises(RunError, match=f"^{HALF}$"):
        learn_watched(IceLearner(IceSettings(steps=2), half), two_regions(), ())


def test_in_every_stage_of_a_run(half: StableDiffusion, plugins: Plugins, photo: Path, sd_folder: Path) -> None:
    place = photo.parent
    for stage, options in {
        "localise": {"components": PARTS | {"segmentor": "xattn"}},
        "learn": {"components": PARTS | {"learner": "ice"}},
        "attention": {},
    }.items():
        with pytest.raises(RunError, match=HALF):
            run(plugins, photo, place / stage, sd_folder, half, **options)
        assert not (place / stage / "manifest.json").exists()


def test_in_sampling_and_compositions(
    half: StableDiffusion, plugins: Plugins, photo: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=HALF):
        half.generate(["a cup"], seeds=[0])
    whole = load(sd_folder, dtype="float32")
    run(plugins, photo, photo.parent / "whole", sd_folder, whole)
    monkeypatch.setattr("icekit.run.compose.load_backbone", lambda *_given, **_named: half)
    with pytest.raises(RunError, match=HALF):
        compose("{a}", {"a": photo.parent / "whole"}, n=1, out=photo.parent / "composed", installed=plugins)
    assert not list((photo.parent / "composed").glob("*.png"))


# --- Every part ------------------------------------------------------------------------------------------------------

PLANTED: dict[str, tuple[Callable[[StableDiffusion], Tensor], Callable[[StableDiffusion], object], str]] = {
    "autoencoder's decoder in float32": (
        lambda model: model._vae.decoder.conv_out.weight,
        lambda model: model.generate(["a cup"], seeds=[0]),
        "get the model again",
    ),
    "autoencoder's encoder in float32": (
        lambda model: model._vae.encoder.conv_out.weight,
        lambda model: model.encode_images(noise_image()[None]),
        "get the model again",
    ),
    "text encoder in float32": (
        lambda model: final_norm(model).weight,
        lambda model: model.generate(["a cup"], seeds=[0]),
        "get the model again",
    ),
    r"noise predictor \(unet\) in float32": (
        lambda model: model.unet.conv_out.weight,
        lambda model: model.generate(["a cup"], seeds=[0]),
        "get the model again",
    ),
}


@pytest.mark.parametrize("part", PLANTED)
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_each_part_is_named(part: str, value: float, sd_folder: Path) -> None:
    """NaN among its weights, or weights with which its numbers overflow."""
    weights, use, way_out = PLANTED[part]
    backbone = load(sd_folder)
    with torch.no_grad():
        weights(backbone).fill_(value)
        if value > 0 and part.startswith("text"):
            final_norm(backbone).bias.fill_(3e38)
    with (
        torch.no_grad(),
        pytest.raises(RunError, match=f"^the {part} gives numbers that are NaN or infinite; .*{way_out}"),
    ):
        use(backbone)


def test_a_token_that_is_too_large_is_named(sd_folder: Path) -> None:
    """Not the model that it was made for."""
    backbone = load(sd_folder)
    tokens = {
        "<cup-0>": {"clip_l": torch.full((32,), 0.1)},
        "<ball-1>": {"clip_l": torch.arange(32) * 1e30},
    }
    with pytest.raises(RunError, match=r"^the token <ball-1> makes the text encoder give .* lower learning rate$"):
        backbone.generate(["a <cup-0> and a <ball-1>"], seeds=[0], tokens=tokens)


# --- Learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e9, 1e5])
def test_a_learning_rate_that_is_too_high(rate: float, sd_folder: Path) -> None:
    """It ends well, or the rate is named."""
    learner = IceLearner(IceSettings(steps=6, learning_rate=rate, weight_decay=1e9), load(sd_folder))
    with pytest.raises(RunError, match=r"learning[ _]rate") as error:
        learn_watched(learner, two_regions(), ())
    assert "\n" not in str(error.value) and "get the model again" not in str(error.value)


def test_a_gradient_that_is_no_number(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import icekit.builtin.learners.ice as ice

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient * float("nan")

    masked = ice.IceLesson.masked_loss
    monkeypatch.setattr(ice.IceLesson, "masked_loss", lambda self, *given: Broken.apply(masked(self, *given)))
    with pytest.raises(
        RunError, match=r"^the gradient of the loss became nan in step 1 .*; nothing was learned before it"
    ):
        learn_watched(IceLearner(IceSettings(steps=2), load(sd_folder)), two_regions(), ())


def test_what_the_trainer_says() -> None:
    check_finite({"total": 1.0}, "object", 1)
    with pytest.raises(RunError, match=r"^the b loss became inf in step 2 \(phase object\)$"):
        check_finite({"a": 1.0, "b": float("inf")}, "object", 2)


# --- Backbones of other people, which check nothing ------------------------------------------------------------------


def test_what_another_backbone_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    predict = plain.PlainBackbone.predict

    def blind(self: Any, *given: Any) -> Prediction:
        seen = predict(self, *given)
        words = tuple(one * float("nan") for one in seen.attention.words)
        return Prediction(seen.output, dataclasses.replace(seen.attention, words=words))

    monkeypatch.setattr(plain.PlainBackbone, "predict", blind)
    generator, image = torch.Generator().manual_seed(0), torch.rand(3, 32, 32)
    with pytest.raises(RunError, match=r"^the backbone's attention gives numbers that are NaN"):
        look_at(backbone, image, "a cup", Look(words=(8,)), shares=(0.5,), generator=generator)
    monkeypatch.setattr(plain.PlainBackbone, "encode_images", lambda self, images: images * float("inf"))
    region = [dataclasses.replace(two_regions()[0], mask=torch.ones(32, 32, dtype=torch.bool))]
    learner = IceLearner(IceSettings(steps=2), backbone)
    with pytest.raises(RunError, match=r"^the backbone's autoencoder gives numbers that are NaN"):
        learner.learn(image, region, (), seed=0, checkpoint=NoCheckpoint(), on_step=lambda step: None)


def test_a_picture_of_nan_is_not_black() -> None:
    assert len(to_pictures(torch.rand(2, 3, 4, 4))) == 2
    for value in (float("nan"), float("inf")):
        with pytest.raises(RunError, match=r"^the autoencoder's decoder gives numbers that are NaN"):
            to_pictures(torch.full((1, 3, 4, 4), value))
