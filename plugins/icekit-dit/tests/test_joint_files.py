"""Stable Diffusion 3.x and FLUX.1 in one file: read offline, as the very model that it was written from."""

from __future__ import annotations

import functools
import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_transformers as tiny
import torch
import transformers
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.loaders import single_file_model
from icekit_dit.flux import Flux
from icekit_dit.sd3 import StableDiffusion3
from icekit_dit.settings import LAYOUTS
from joint_files import PREDICTOR, write_file
from safetensors.torch import load_file, save_file

from icekit import InputError, Settings
from icekit.backbones import file_layouts
from icekit.backbones.common import quiet
from icekit.backbones.file_layouts import Layout, layout_of, read_layout, unpack
from icekit.backbones.single_file import clip_tokenizer
from icekit.plugins import installed
from icekit.protocols import Prediction

CLASSES: dict[str, Any] = {"sd3": StableDiffusion3, "flux": Flux, "schnell": Flux}
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
SIZES: dict[str, Any] = {"sd3": (64, 64), "flux": (48, 64), "schnell": (48, 64)}


def published(name: str) -> Layout:
    return read_layout(f"package:icekit_dit/layouts/{name}.json")


@functools.cache
def t5_tokenizer(folder: Path) -> Any:
    """The one that ships with the layouts."""
    unpack(published("flux-dev"), folder)
    return transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_2", model_max_length=512)


def of_the_vocabulary(model: Any, size: int) -> Any:
    """A text encoder of this kind, with a table of as many rows as its published vocabulary has."""
    config = type(model.config)(**(model.config.to_dict() | {"vocab_size": size}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return type(model)(config).eval()


@pytest.fixture(scope="session", params=["sd3", "flux"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A family, a tiny folder with the published tokenizers, and its pipeline."""
    return write_pair(request.param, tmp_path_factory.mktemp("model"))


@functools.cache
def of_folder(name: str, folder: Path) -> Any:
    """The backbone of a folder, as it is."""
    return loaded(name, folder)


def write_pair(name: str, place: Path) -> tuple[str, Path, Any]:
    plain = tiny.write_sd3(place / "plain") if name == "sd3" else tiny.write_flux(place / "plain", dev=name == "flux")
    with quiet():
        kind: Any = StableDiffusion3Pipeline if name == "sd3" else FluxPipeline
        pipeline: Any = kind.from_pretrained(plain)
        for part in ("tokenizer", "tokenizer_2", "tokenizer_3")[: 3 if name == "sd3" else 2]:
            encoder = part.replace("tokenizer", "text_encoder")
            model = getattr(pipeline, encoder)
            if isinstance(model, transformers.T5EncoderModel):
                setattr(pipeline, part, t5_tokenizer(place))
                setattr(pipeline, encoder, of_the_vocabulary(model, 32128))
            else:
                setattr(pipeline, part, clip_tokenizer("!" if part[-1] == "2" else "<|endoftext|>"))
                setattr(pipeline, encoder, of_the_vocabulary(model, 49408))
        if name == "sd3":
            torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.save_pretrained(place / "model")
    return name, place / "model", pipeline


@pytest.fixture(autouse=True)
def tiny_layouts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Layouts with the sizes of the tiny models in the place of the published ones, and diffusers' conversion of
    FLUX.1, which knows no width but the published one, for theirs.
    """
    if "pair" not in request.fixturenames:
        return
    _, folder, pipeline = request.getfixturevalue("pair")

    def tiny_layout(place: str) -> Layout:
        layout = read_layout(place)
        if layout.pipeline != type(pipeline).__name__:
            return layout
        changed = {}
        for path, content in layout.files.items():
            if path.endswith("config.json") and (folder / path).exists() and not path.startswith("tokenizer"):
                changed[path] = json.loads((folder / path).read_text())
            else:
                changed[path] = content
        tensor, axis, _ = layout.input
        channels = pipeline.transformer.config.in_channels
        return replace(layout, files=changed, input=(tensor, axis, channels))

    monkeypatch.setattr(file_layouts, "read_layout", tiny_layout)
    conversions: dict[str, Any] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(conversions, "checkpoint_mapping_fn", narrow_conversion(32))


def narrow_conversion(width: int) -> Any:
    """Diffusers' own function with another width in the place of 3072."""
    plain: Any = single_file_model.convert_flux_transformer_checkpoint_to_diffusers
    constants = tuple(width if one == 3072 else one for one in plain.__code__.co_consts)
    assert constants != plain.__code__.co_consts
    return types.FunctionType(plain.__code__.replace(co_consts=constants), plain.__globals__)


def loaded(name: str, model: Path, **settings: Any) -> Any:
    kind = CLASSES[name]
    return kind(kind.Settings(model=str(model), steps=2, image_size=SIZES[name], **settings), "cpu")


def predicted(backbone: Any) -> Prediction:
    noisy = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: Prediction = backbone.predict(noisy, torch.tensor([0.5]), backbone.encode_prompts(["a red cup"]))
    return result


def assert_same(one: Any, other: Any) -> None:
    """The same weights, the same prediction, tokens that mean the same."""
    for part in PARTS:
        if getattr(other._pipeline, part, None) is None:
            assert getattr(one._pipeline, part, None) is None
            continue
        own, theirs = (getattr(backbone._pipeline, part).state_dict() for backbone in (one, other))
        assert own.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(own[key], value, msg=f"{part}: {key}")
    assert one.identity == other.identity and dict(one.rows) == dict(other.rows)
    assert torch.equal(predicted(one).output, predicted(other).output)


def test_the_file_is_the_model(pair: tuple[str, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts in one file, offline; the family is read from it, and no pipeline is said to load it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, folder, pipeline = pair
    file = write_file(pipeline, tmp_path / "model.safetensors")
    read = loaded(name, file)
    assert_same(read, of_folder(name, folder))
    assert read.pipeline_source is None
    given = Settings.model_validate({"backbone": {"model": str(file)}})
    assert installed().resolve(given).components.backbone == name
    need = type(read).memory_needed(type(read).Settings(model=str(file), image_size=64), torch.device("cpu"), 1)
    whole = type(read).memory_needed(type(read).Settings(model=str(folder), image_size=64), torch.device("cpu"), 1)
    assert need is not None and whole is not None and abs(need.weights - whole.weights) < 2**20


@pytest.mark.slow
def test_what_a_file_lacks_comes_from_a_folder(pair: tuple[str, Path, Any], tmp_path: Path) -> None:
    """The transformer alone, as most people have FLUX.1: the rest is named, or taken from where it is said to be."""
    name, folder, pipeline = pair
    file = write_file(pipeline, tmp_path / "model.safetensors", alone=True)
    with pytest.raises(
        InputError, match=r"the file has no .*text_encoder.*vae.*Settings\(backbone=\{\"encoders\": FOLDER\}\)"
    ):
        loaded(name, file)
    assert_same(loaded(name, file, encoders=str(folder)), of_folder(name, folder))
    with pytest.raises(InputError, match=r"backbone\.encoders = 'nowhere': there is no such folder"):
        loaded(name, file, encoders="nowhere")
    with pytest.raises(InputError, match=r"backbone\.encoders = .*: it is for a model in one file"):
        loaded(name, folder, encoders=str(folder))


def test_files_of_other_things(pair: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, _, pipeline = pair
    weights = load_file(write_file(pipeline, tmp_path / "model.safetensors"))

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(InputError) as error:
            loaded(name, tmp_path / "other.safetensors")
        assert "\n" not in str(error.value)
        return str(error.value)

    quantised = weights | {"model.diffusion_model.final_layer.linear.scale_weight": torch.zeros(1)}
    assert "its weights are quantised" in refused(quantised)
    wide = {"x_embedder.proj.weight": torch.zeros(32, 33, 2, 2), "img_in.weight": torch.zeros(32, 384)}
    [(stem, other)] = [(PREDICTOR + key, value) for key, value in wide.items() if PREDICTOR + key in weights]
    assert "channels (an inpainting or editing model?)" in refused(weights | {stem: other})
    lost = {key: value for key, value in weights.items() if not key.startswith(f"{PREDICTOR}final_layer.linear")}
    assert "the file has not all weights of its transformer" in refused(lost)
    narrow = weights | {stem.replace("weight", "bias"): torch.zeros(40)}
    assert "its weights cannot be read as those of" in refused(narrow)
    lora = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(1, 8)}
    assert "is a LoRA adapter" in refused(lora)
    kind: Any = StableDiffusion3 if name != "sd3" else Flux
    with pytest.raises(InputError, match=f"made for {type(pipeline).__name__}; supported is {kind.family.pipeline}"):
        kind(kind.Settings(model=str(tmp_path / "model.safetensors")), "cpu")


@pytest.mark.parametrize("pair", ["sd3"], indirect=True)
def test_stable_diffusion_3_without_t5(pair: tuple[str, Path, Any], tmp_path: Path) -> None:
    """A file without it, and a folder whose T5 is left out, are one and the same model."""
    name, folder, pipeline = pair
    without = write_file(pipeline, tmp_path / "without.safetensors", without=["text_encoder_3"])
    backbones = [loaded(name, without), loaded(name, folder, t5=False)]
    for backbone in backbones:
        assert dict(backbone.rows) == {"clip_l": 8, "clip_g": 16}
        assert backbone.pipeline_without == ("tokenizer_3", "text_encoder_3")
        assert_same(backbone, backbones[0])
    assert dict(loaded(name, without, encoders=str(folder)).rows) == {"clip_l": 8, "clip_g": 16, "t5xxl": 32}
    device = torch.device("cpu")
    needs = [
        StableDiffusion3.memory_needed(StableDiffusion3.Settings(model=str(folder), image_size=64, t5=t5), device, 1)
        for t5 in (True, False)
    ]
    assert needs[0] is not None and needs[1] is not None and needs[1].weights < needs[0].weights


@pytest.mark.slow
def test_a_file_of_schnell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two it is, its weights say; and diffusers' conversion as it is, at the published width."""
    monkeypatch.setattr(tiny, "FluxTransformer2DModel", wide_transformer)
    name, folder, pipeline = write_pair("schnell", tmp_path)
    file = write_file(pipeline, tmp_path / "file.safetensors", alone=True)
    config = json.loads((folder / "transformer" / "config.json").read_text())

    def narrower(place: str) -> Layout:
        layout = read_layout(place)
        if layout.pipeline != "FluxPipeline":
            return layout
        tensor, axis, _ = layout.input
        files = {**layout.files, "transformer/config.json": config}
        return replace(layout, files=files, input=(tensor, axis, config["in_channels"]))

    monkeypatch.setattr(file_layouts, "read_layout", narrower)
    found = layout_of(file, LAYOUTS, "file")
    assert found.files["scheduler/scheduler_config.json"]["use_dynamic_shifting"] is False
    read = loaded(name, file, encoders=str(folder), dtype="bfloat16")
    assert_same(read, loaded(name, folder, dtype="bfloat16"))


def wide_transformer(**options: Any) -> Any:
    """FLUX.1's transformer of the published width, with one block of each kind."""
    wide: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128}
    wide |= {"num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    model = diffusers.FluxTransformer2DModel(**(options | wide))
    return model.to(torch.bfloat16)


# --- What ships with the plugin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "transformer", "others"),
    [
        ("sd3-medium", 2_028_328_000, {"text_encoder": 123.65, "text_encoder_2": 694.66, "text_encoder_3": 4762.31}),
        ("sd3.5-medium", 2_243_171_520, {"text_encoder_3": 4762.31}),
        ("sd3.5-large", 8_056_627_520, {"vae": 83.82}),
        ("flux-dev", 11_901_408_320, {"text_encoder": 123.06, "text_encoder_2": 4762.31, "vae": 83.82}),
        ("flux-schnell", 11_891_178_560, {}),
    ],
)
def test_the_layouts_have_the_published_sizes(name: str, transformer: int, others: dict[str, float]) -> None:
    layout = published(name)

    def count(part: str) -> int:
        library, kind = layout.index[part]
        config = layout.files[f"{part}/config.json"]
        with torch.device("meta"):
            if library == "diffusers":
                model = getattr(diffusers, kind).from_config(config)
            else:
                model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
        return sum(weight.numel() for weight in model.parameters())

    assert count("transformer") == transformer
    assert {part: round(count(part) / 1e6, 2) for part in others} == others


def test_the_tokenizer_is_t5s(tmp_path: Path) -> None:
    """The ids that T5's authors and every published model give these."""
    tokenizer = t5_tokenizer(tmp_path)
    ids = tokenizer("translate English to German: The house is wonderful.").input_ids
    assert ids == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]
    assert len(tokenizer) == 32100 and tokenizer.pad_token_id == 0 and tokenizer.model_max_length == 512
