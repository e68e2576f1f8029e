"""A model in one file: read offline, as the very model that it was written from, whatever wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from single_files import write_single_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from icekit import InputError
from icekit.backbones import file_layouts
from icekit.backbones.file_layouts import Layout, read_layout
from icekit.backbones.single_file import clip_tokenizer
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.backbones.stable_diffusion_xl import StableDiffusionXL
from icekit.testing.tiny import tiny_pipeline, tiny_xl_pipeline

CHANNELS = "model.diffusion_model.input_blocks.0.0.weight"
BACKBONES: dict[str, Any] = {"sd1": StableDiffusion, "sd2": StableDiffusion, "sdxl": StableDiffusionXL}


def published(name: str) -> Layout:
    return read_layout(f"package:icekit/backbones/layouts/{name}.json")


def of_clips_vocabulary(model: Any) -> Any:
    """A text encoder as it was, with a table of as many rows as CLIP's vocabulary has."""
    config = model.config.to_dict() | {"vocab_size": 49408}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return type(model)(CLIPTextConfig(**config)).eval()


def pipeline_of(layout: str) -> Any:
    """A tiny pipeline whose tokenizers are CLIP's own."""
    pipeline: Any = tiny_xl_pipeline() if layout == "sdxl" else tiny_pipeline(version=int(layout[-1]))
    for part, padding in published(layout).padding.items():
        encoder = part.replace("tokenizer", "text_encoder")
        setattr(pipeline, part, clip_tokenizer(padding))
        setattr(pipeline, encoder, of_clips_vocabulary(getattr(pipeline, encoder)))
    return pipeline


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """Its layout's name, the pipeline, and the file."""
    pipeline = pipeline_of(request.param)
    return request.param, pipeline, write_single_file(pipeline, tmp_path_factory.mktemp("file") / "model.safetensors")


@pytest.fixture(autouse=True)
def tiny_layouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Layouts with the sizes of the tiny models, in the place of the published ones."""

    def tiny(place: str) -> Layout:
        name = Path(place).stem
        folder = tmp_path / f"layout-{name}"
        if not folder.exists():
            pipeline_of(name).save_pretrained(folder)
        layout = read_layout(place)
        return replace(layout, files={path: json.loads((folder / path).read_text()) for path in layout.files})

    monkeypatch.setattr(file_layouts, "read_layout", tiny)


def test_the_file_is_the_model(written: tuple[str, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: all weights are as they were, and so are the picture and the prediction."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    layout, pipeline, file = written
    cls = BACKBONES[layout]
    settings = {"image_size": 64, "steps": 2, "prediction_type": "epsilon"}
    read = cls(cls.Settings(model=str(file), **settings), "cpu")
    for part in cls.family.weights:
        weights = getattr(read._pipeline, part).state_dict()
        own = {name.replace("embedding.table.", "embedding."): value for name, value in weights.items()}
        assert own.keys() == getattr(pipeline, part).state_dict().keys()
        for name, value in getattr(pipeline, part).state_dict().items():
            torch.testing.assert_close(own[name], value)
    made = cls.from_pipeline(pipeline_of(layout), "cpu", cls.Settings(**settings))
    assert read.identity == made.identity
    one, other = (backbone.generate(["a photo of a cup"], seeds=[3]) for backbone in (read, made))
    assert one[0].tobytes() == other[0].tobytes()
    assert read.pipeline_source is None


def test_what_a_file_says_of_its_schedule(tmp_path: Path) -> None:
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    file = write_single_file(pipeline_of("sdxl"), tmp_path / "v.safetensors", **marks)
    backbone = StableDiffusionXL(StableDiffusionXL.Settings(model=str(file), image_size=64), "cpu")
    assert backbone._schedule.config.prediction_type == "v_prediction"
    assert backbone._schedule.config.rescale_betas_zero_snr


def test_what_it_predicts_is_found_out_by_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives its input back is one that predicts noise; one that does not, predicts v."""
    file = write_single_file(pipeline_of("sd2"), tmp_path / "model.safetensors")
    settings = StableDiffusion.Settings(model=str(file), image_size=64)
    backbone = StableDiffusion(settings, "cpu")
    assert backbone._prediction_type == "v_prediction"
    monkeypatch.setattr(
        UNet2DConditionModel, "forward", lambda self, noisy, *_, **__: type("Out", (), {"sample": noisy})
    )
    assert backbone._predicts() == "epsilon"


# --- What is refused --------------------------------------------------------------------------------------------------


def refused(cls: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        cls(cls.Settings(**settings), "cpu")
    return str(error.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04.")
    said = refused(StableDiffusion, model=str(file))
    assert f"a {suffix} file is a pickle, which can run code" in said and ".safetensors" in said


def test_another_family(written: tuple[str, Any, Path]) -> None:
    layout, _, file = written
    other = StableDiffusion if layout == "sdxl" else StableDiffusionXL
    said = refused(other, model=str(file))
    assert f"it is made for {BACKBONES[layout].family.pipeline}; supported is {other.family.pipeline}" in said


def test_files_of_other_things(tmp_path: Path, written: tuple[str, Any, Path]) -> None:
    layout, _, file = written
    cls, weights = BACKBONES[layout], load_file(file)

    def said_of(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "other.safetensors")
        return refused(cls, model=str(tmp_path / "other.safetensors"), prediction_type="epsilon")

    assert "is not a whole model" in said_of({"emb_params": torch.zeros(1, 8)})
    assert "is a LoRA adapter" in said_of({"lora_unet_x.lora_down.weight": torch.zeros(1, 8)})
    unet = {name: value for name, value in weights.items() if name.startswith("model.")}
    assert "its text encoder is not" in said_of(unet)
    wide = weights | {CHANNELS: torch.zeros(32, 9, 3, 3)}
    assert "takes 9 channels" in said_of(wide)
    lost = dict(weights)
    lost.pop("first_stage_model.decoder.conv_in.weight")
    assert "the file has not all weights of its vae" in said_of(lost)
    narrow = weights | {"model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3)}
    assert "its weights cannot be read as those of" in said_of(narrow)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1000])
    assert "it cannot be read as a safetensors file" in refused(cls, model=str(tmp_path / "cut.safetensors"))


# --- What ships with icekit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "millions"),
    [
        ("sd1", {"unet": 859.52, "vae": 83.65, "text_encoder": 123.06}),
        ("sd2", {"unet": 865.91, "vae": 83.65, "text_encoder": 340.39}),
        ("sdxl", {"unet": 2567.46, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.66}),
    ],
)
def test_the_layouts_have_the_published_sizes(layout: str, millions: dict[str, float]) -> None:
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    clips: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    files = published(layout).files
    for part, count in millions.items():
        with torch.device("meta"):
            config = files[f"{part}/config.json"]
            model = kinds[part].from_config(config) if part in kinds else clips[part](CLIPTextConfig(**config))
        assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 2) == count, part


@pytest.mark.parametrize("text", ["a photo of a red cup, on the table!", "Café naïve — 2024's BIG dog", "x" * 40])
def test_the_tokenizer_is_clips(text: str) -> None:
    [theirs] = open_clip.get_tokenizer("ViT-L-14")([text]).tolist()
    tokenizer = clip_tokenizer("<|endoftext|>")
    own = tokenizer(text, padding="max_length", max_length=77).input_ids
    length = theirs.index(49407) + 1
    assert own[:length] == theirs[:length] and set(own[length:]) <= {49407}
    assert clip_tokenizer("!").pad_token_id == 0
