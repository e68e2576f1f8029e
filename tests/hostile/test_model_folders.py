"""Model folders of somebody else's: nothing in them is run, and what is wrong with them is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from icekit import model_files
from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.builtin.metrics.image_encoders import dino_encoder
from icekit.clip import load_clip, safe_weights
from icekit.protocols import InputError, Look, RunError
from icekit.settings import validate

Change = Callable[[Path], Any]
CPU = torch.device("cpu")
UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"
DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000


def copied(folder: Path, to: Path) -> Path:
    """A folder's copy of links: a change replaces a file and leaves the original alone."""
    return Path(shutil.copytree(folder, to, copy_function=lambda source, target: os.symlink(source, target)))


def put(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edit(name: str, **values: Any) -> Change:
    """Set keys of a JSON file; nested ones are joined by ``__``."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        for key, value in values.items():
            *outer, last = key.split("__")
            place = whole
            for one in outer:
                place = place.setdefault(one, {})
            place[last] = value
        put(name, json.dumps(whole))(folder)

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def cut(name: str, length: int) -> Change:
    return lambda folder: put(name, (folder / name).read_bytes()[:length])(folder)


def of(name: str, other: str) -> Change:
    return lambda folder: put(name, (folder / other).read_bytes())(folder)


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def weights(name: str, change_all: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        change_all(tensors)
        (folder / name).unlink()
        save_file(tensors, folder / name)

    return change


DAMAGED: dict[str, tuple[Change, str]] = {
    "index a list": (put("model_index.json", "[]"), "model_index.json cannot be read: .*a list"),
    "index a number": (put("model_index.json", "3"), "model_index.json cannot be read: .*a number"),
    "index null": (put("model_index.json", "null"), "model_index.json cannot be read: .*null"),
    "index deep": (put("model_index.json", DEEP), "model_index.json cannot be read: .*nested too deeply"),
    "index not UTF-8": (put("model_index.json", b"\xff\xfe{"), "model_index.json cannot be read"),
    "index a long number": (put("model_index.json", '{"a": ' + "9" * 5000 + "}"), "model_index.json cannot be read"),
    "index a pipe": (pipe("model_index.json"), "model_index.json: it is no plain file"),
    "class a list": (edit("model_index.json", _class_name=["a", "B"]), "made for a pipeline of its own"),
    "class null": (edit("model_index.json", _class_name=None), "made for a pipeline of its own"),
    "part null": (edit("model_index.json", unet=[None, None]), "unet is .*it should be .*UNet2DConditionModel"),
    "part a number": (edit("model_index.json", vae=7), "vae is 7; it should be .*AutoencoderKL"),
    "part nested": (edit("model_index.json", vae=[["diffusers"], {}]), "vae is .*AutoencoderKL"),
    "part swapped": (edit("model_index.json", unet=["diffusers", "AutoencoderKL"]), "unet is a AutoencoderKL"),
    "scheduler unknown": (edit("model_index.json", scheduler=["diffusers", "Fast"]), "no scheduler 'Fast'"),
    "scheduler no scheduler": (edit("model_index.json", scheduler=["diffusers", "logging"]), "no scheduler 'logging'"),
    "scheduler of flows": (
        edit("model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "FlowMatchEulerDiscreteScheduler is of another family",
    ),
    "no folder of a part": (lambda folder: shutil.rmtree(folder / "vae"), "no vae/"),
    "no configuration": (without("unet/config.json"), "unet/config.json: there is no such file"),
    "no steps": (edit("scheduler/scheduler_config.json", num_train_timesteps=0), "from 1 to"),
    "steps true": (edit("scheduler/scheduler_config.json", num_train_timesteps=True), "from 1 to"),
    "steps too many": (edit("scheduler/scheduler_config.json", num_train_timesteps=10**9), "from 1 to"),
    "betas NaN": (edit("scheduler/scheduler_config.json", beta_start=float("nan")), "its betas should be"),
    "betas infinite": (edit("scheduler/scheduler_config.json", beta_end=float("inf")), "its betas should be"),
    "betas a text": (edit("scheduler/scheduler_config.json", beta_start="low"), "scheduler.* cannot be"),
    "betas null": (edit("scheduler/scheduler_config.json", beta_start=None), "scheduler.* cannot be"),
    "betas zero": (edit("scheduler/scheduler_config.json", beta_start=0, beta_end=0), "no noise"),
    "betas listed, too few": (edit("scheduler/scheduler_config.json", trained_betas=[0.1]), "one a step"),
    "beta schedule unknown": (edit("scheduler/scheduler_config.json", beta_schedule="steep"), "scheduler.* cannot be"),
    "spacing unknown": (edit("scheduler/scheduler_config.json", timestep_spacing="wide"), "scheduler.* cannot be"),
    "prediction unknown": (edit("scheduler/scheduler_config.json", prediction_type="x"), "it predicts 'x'"),
    "scheduler a list": (put("scheduler/scheduler_config.json", "[1]"), "scheduler_config.json cannot be read"),
    "no tokenizer files": (without("tokenizer/tokenizer.json"), "tokenizer/ has no tokenizer.json"),
    "tokenizer empty": (put("tokenizer/tokenizer.json", "{}"), "tokenizer"),
    "tokenizer of other size": (
        lambda folder: (
            weights(TEXT, lambda tensors: grown(tensors, "embeddings.token_embedding.weight", 2000))(folder)
            or edit("text_encoder/config.json", vocab_size=2000)(folder)
        ),
        "its tokenizer has 646 entries and its text encoder rows for 2,000",
    ),
    "unet configuration a number": (put("unet/config.json", "5"), "unet/config.json cannot be read"),
    "unet configuration of the vae": (of("unet/config.json", "vae/config.json"), "made for AutoencoderKL"),
    "unet configuration empty": (put("unet/config.json", "{}"), "unet"),
    "unet sides a text": (edit("unet/config.json", sample_size="big"), "sample_size is 'big'"),
    "unet sides negative": (edit("unet/config.json", sample_size=-4), "sample_size is -4"),
    "unet sides endless": (edit("unet/config.json", sample_size=10**9), "sample_size is 1000000000"),
    "tokenizer length a text": (
        edit("tokenizer/tokenizer_config.json", model_max_length="x"),
        "model_max_length is 'x'",
    ),
    "unet channels a text": (edit("unet/config.json", block_out_channels="x"), "its unet cannot be loaded"),
    "unet of endless layers": (edit("unet/config.json", layers_per_block=10**9), "layers_per_block is 1000000000"),
    "unet activation unknown": (edit("unet/config.json", act_fn="x"), "its unet cannot be loaded"),
    "unet that wants more": (edit("unet/config.json", freq_shift="x"), "do not work together"),
    "unet version null": (edit("unet/config.json", _diffusers_version=None), "do not make a pipeline"),
    "unet heads true": (edit("unet/config.json", attention_head_dim=True), "do not work together"),
    "unet quantised": (edit("unet/config.json", quantization_config={"a": 1}), "quantised weights"),
    "unet weights of the vae": (of(UNET, VAE), "unet"),
    "vae weights of the text encoder": (of(VAE, TEXT), "vae"),
    "text encoder weights of the unet": (of(TEXT, UNET), "text_encoder/: .* of another part or model"),
    "unet weights missing one": (weights(UNET, lambda tensors: tensors.popitem()), "1 weights of its UNet2D"),
    "unet weights cut": (cut(UNET, 5000), "unet/.* is no whole safetensors file"),
    "unet weights nearly whole": (lambda folder: cut(UNET, (folder / UNET).stat().st_size - 1)(folder), "no whole"),
    "unet weights no bytes": (put(UNET, b""), "unet/.* is no whole safetensors file"),
    "unet weights of no tensors": (put(UNET, b"\x02\0\0\0\0\0\0\0{}"), "has no weights in it"),
    "unet weights a picture": (put(UNET, b"\x89PNG\r\n\x1a\n" + b"\0" * 200), "no whole safetensors file"),
    "unet weights pickled": (
        lambda folder: (folder / UNET).rename((folder / UNET).with_suffix(".bin")),
        "there is no unet/diffusion_pytorch_model.safetensors",
    ),
    "unet weights a pipe": (pipe(UNET), "unet/.*there is no such file"),
    "shards pickled": (
        lambda folder: (
            without(TEXT)(folder)
            or put("text_encoder/model.safetensors.index.json", '{"weight_map": {"a": "model.bin"}}')(folder)
        ),
        "weight_map should name .safetensors files",
    ),
    "shards elsewhere": (
        lambda folder: (
            without(TEXT)(folder)
            or put("text_encoder/model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}')(folder)
        ),
        "weight_map should name .safetensors files",
    ),
    "text encoder of another width": (edit("text_encoder/config.json", hidden_size=64), "text_encoder"),
    "text encoder layers a text": (edit("text_encoder/config.json", num_hidden_layers="x"), "text_encoder"),
}


def grown(tensors: dict[str, torch.Tensor], ending: str, rows: int) -> None:
    [name] = [name for name in tensors if name.endswith(ending)]
    tensors[name] = torch.zeros(rows, tensors[name].shape[1])


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_one_line(sd_folder: Path, tmp_path: Path, case: str) -> None:
    change, message = DAMAGED[case]
    folder = copied(sd_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        StableDiffusion(StableDiffusion.Settings(model=str(folder)), "cpu")
    said = str(caught.value)
    assert said.startswith(f"backbone.model = {str(folder)!r}: ")
    assert "\n" not in said
    assert len(said) < 1000


CLIP_WEIGHTS = "open_clip_model.safetensors"
DAMAGED_CLIPS: dict[str, tuple[Change, str]] = {
    "a list": (put("open_clip_config.json", "[]"), "open_clip_config.json cannot be read: .*a list"),
    "deep": (put("open_clip_config.json", DEEP), "nested too deeply"),
    "no model": (put("open_clip_config.json", "{}"), "model_cfg should be a JSON object"),
    "text null": (edit("open_clip_config.json", model_cfg__text_cfg=None), "text_cfg should be a JSON object"),
    "width a text": (edit("open_clip_config.json", model_cfg__embed_dim="x"), "open_clip can load"),
    "endless layers": (edit("open_clip_config.json", model_cfg__text_cfg__layers=10**9), "layers is 1000000000"),
    "unknown key": (edit("open_clip_config.json", model_cfg__colour=1), "open_clip can load"),
    "means a text": (edit("open_clip_config.json", preprocess_cfg__mean="x"), "open_clip can load"),
    "cut": (cut(CLIP_WEIGHTS, 3000), "is no whole safetensors file"),
    "no bytes": (put(CLIP_WEIGHTS, b""), "is no whole safetensors file"),
    "others": (weights(CLIP_WEIGHTS, lambda tensors: tensors.popitem()), "open_clip can load"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer"),
    "another tokenizer": (
        lambda folder: edit("open_clip_config.json", model_cfg__text_cfg__hf_tokenizer_name="")(folder),
        "its tokenizer has 49,408 entries and its text encoder rows for 646",
    ),
    "tokenizer option unknown": (
        edit("open_clip_config.json", model_cfg__text_cfg__tokenizer_kwargs={"proxies": {}}),
        "tokenizer_kwargs can have .*, not proxies",
    ),
    "pickled": (lambda folder: (folder / CLIP_WEIGHTS).rename(folder / "x.bin"), "no weights as .safetensors"),
    "decoy": (
        lambda folder: (
            (folder / CLIP_WEIGHTS).rename(folder / "decoy.safetensors")
            and (folder / "open_clip_pytorch_model.bin").write_bytes(b"x")
        ),
        "several weights .decoy.safetensors, open_clip_pytorch_model.bin.: name the right",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_CLIPS)
def test_a_damaged_clip_is_one_line(clip_folder: Path, tmp_path: Path, case: str) -> None:
    change, message = DAMAGED_CLIPS[case]
    folder = copied(clip_folder, tmp_path / "clip")
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_clip(str(folder), "", CPU)
    said = str(caught.value)
    assert said.startswith(f"retriever.model: {folder}")
    assert "\n" not in said


@pytest.fixture
def planted(tmp_path: Path) -> tuple[str, Path]:
    """Python code, and the file that it leaves when it is run."""
    mark = tmp_path / "it-ran"
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own:\n    pass\n", mark


AUTO_MAP = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoModel": "own.Own", "AutoConfig": "own.Own"}
CODE: dict[str, Change] = {
    "a pipeline of its own": edit("model_index.json", _class_name=["own", "Own"]),
    "a custom pipeline": edit("model_index.json", custom_pipeline="own"),
    "a part of its own": edit("model_index.json", unet=["own", "Own"]),
    "a part of another package": edit("model_index.json", scheduler=["own", "Own"]),
    "a part that is a dotted path": edit("model_index.json", tokenizer=["transformers.own", "Own"]),
    "text encoder": edit("text_encoder/config.json", auto_map=AUTO_MAP, model_type="own"),
    "tokenizer": edit("tokenizer/tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Own"),
    "unet": edit("unet/config.json", auto_map={"AutoModel": "own.Own"}),
    "vae": edit("vae/config.json", trust_remote_code=True),
    "scheduler": edit("scheduler/scheduler_config.json", auto_map={"AutoModel": "own.Own"}),
    "a kernel": edit("text_encoder/config.json", _attn_implementation="somebody/kernel"),
}


@pytest.mark.parametrize("case", CODE)
def test_code_in_a_model_is_not_run(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: tuple[str, Path], case: str
) -> None:
    code, mark = planted
    folder = copied(sd_folder, tmp_path / "model")
    for place in (folder, *(part for part in folder.iterdir() if part.is_dir())):
        (place / "own.py").write_text(code)
    CODE[case](folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=r"it should be|code to be run|pipeline of its own"):
        StableDiffusion(StableDiffusion.Settings(model=str(folder)), "cpu")
    assert not mark.exists()


CLIP_CODE: dict[str, Change] = {
    "trusting tokenizer options": edit(
        "open_clip_config.json", model_cfg__text_cfg__tokenizer_kwargs={"trust_remote_code": True}
    ),
    "tokenizer": edit("tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Own"),
    "both": lambda folder: (CLIP_CODE["tokenizer"](folder), CLIP_CODE["trusting tokenizer options"](folder)),
    "configuration": lambda folder: put("config.json", json.dumps({"auto_map": AUTO_MAP, "model_type": "own"}))(folder),
    "a text encoder's folder": lambda folder: (
        put("config.json", json.dumps({"model_type": "own"}))(folder),
        edit("open_clip_config.json", model_cfg__text_cfg__hf_model_name=str(folder))(folder),
    ),
    "a place of an image encoder": edit(
        "open_clip_config.json", model_cfg__vision_cfg__timm_model_name="local-dir:somewhere"
    ),
}


@pytest.mark.parametrize("case", CLIP_CODE)
def test_code_in_a_clip_is_not_run(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: tuple[str, Path], case: str
) -> None:
    code, mark = planted
    folder = copied(clip_folder, tmp_path / "clip")
    (folder / "own.py").write_text(code)
    CLIP_CODE[case](folder)
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=r"code to be run|owner/name of a hub model|a name of timm's"):
        load_clip(f"local-dir:{folder}", "", CPU)
    assert not mark.exists()


def test_code_in_a_dino_is_not_run(tmp_path: Path, planted: tuple[str, Path]) -> None:
    code, mark = planted
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": AUTO_MAP}))
    with pytest.raises(InputError, match=r"^metric.dino: .*code to be run"):
        dino_encoder(str(tmp_path), CPU)
    assert not mark.exists()


def test_an_adapter_of_another_model_is_not_followed(sd_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    """Libraries load the model that an adapter names, from wherever it is."""
    other = json.dumps({"base_model_name_or_path": "somebody/else", "peft_type": "LORA"})
    folder = copied(sd_folder, tmp_path / "model")
    (folder / "text_encoder" / "adapter_config.json").write_text(other)
    with pytest.raises(InputError, match="an adapter of another model"):
        StableDiffusion(StableDiffusion.Settings(model=str(folder)), "cpu")
    clip = copied(clip_folder, tmp_path / "clip")
    (clip / "adapter_config.json").write_text(other)
    with pytest.raises(InputError, match="an adapter of another model"):
        load_clip(f"local-dir:{clip}", "", CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "adapter_config.json").write_text(other)
    with pytest.raises(InputError, match="an adapter of another model"):
        dino_encoder(str(tmp_path), CPU)


def test_safetensors_beside_pickles_are_what_is_read(clip_folder: Path, tmp_path: Path) -> None:
    folder = copied(clip_folder, tmp_path / "clip")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"not read")
    model, _ = load_clip(str(folder), "", CPU)
    assert torch.equal(model.text_projection, load_file(clip_folder / CLIP_WEIGHTS)["text_projection"])


def test_where_weights_of_a_name_are_on_the_hub() -> None:
    assert safe_weights({"hf_hub": "laion/CLIP/"}) == ("laion/CLIP", "open_clip_model.safetensors")
    assert safe_weights({"hf_hub": "apple/D/open_clip_pytorch_model.bin"}) == ("apple/D", "open_clip_model.safetensors")
    assert safe_weights({"hf_hub": "a/b/c.pt"}) == ("a/b", "c.safetensors")
    assert safe_weights({"url": "https://somewhere/x.pt", "hf_hub": ""}) is None


def cached(cache: Path, repository: str, folder: Path) -> Path:
    """The hub's cache as it is after a download."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    return copied(folder, place / "snapshots" / ("0" * 40))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_of_the_hubs_cache(sd_folder: Path, cache: Path) -> None:
    snapshot = cached(cache, "somebody/model", sd_folder)
    backbone = StableDiffusion(StableDiffusion.Settings(model="somebody/model", local_files_only=True), "cpu")
    assert backbone.pipeline_source == "somebody/model"
    edit("model_index.json", unet=["own", "Own"])(snapshot)
    with pytest.raises(InputError, match=r"model_index.json: unet is \['own', 'Own'\]"):
        StableDiffusion(StableDiffusion.Settings(model="somebody/model"), "cpu")


def test_a_clip_of_the_hubs_cache(clip_folder: Path, cache: Path) -> None:
    snapshot = cached(cache, "somebody/clip", clip_folder)
    cached(cache, "somebody/words", clip_folder)
    edit("open_clip_config.json", model_cfg__text_cfg__hf_tokenizer_name="somebody/words")(snapshot)
    model, tokenizer = load_clip("hf-hub:somebody/clip", "", CPU)
    expected, its_tokenizer = load_clip(str(clip_folder), "", CPU)
    assert torch.equal(tokenizer(["a cup"]), its_tokenizer(["a cup"]))
    assert torch.equal(model.text_projection, expected.text_projection)
    (snapshot / CLIP_WEIGHTS).rename(snapshot / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match=r"hub does not give it: .*has not got open_clip_model.safetensors"):
        load_clip("hf-hub:somebody/clip", "", CPU)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that takes requests and never answers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_files, "HUB_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_does_not_answer(sd_folder: Path, cache: Path) -> None:
    for load in (
        lambda: StableDiffusion(StableDiffusion.Settings(), "cpu"),
        lambda: load_clip("ViT-B-32", "laion2b_s34b_b79k", CPU),
        lambda: load_clip("hf-hub:somebody/clip", "", CPU),
        lambda: dino_encoder("somebody/dino", CPU),
    ):
        start = time.monotonic()
        with pytest.raises(InputError, match=r"no network: .*folder.*downloaded before .*HF_HUB_OFFLINE=1") as caught:
            load()
        assert time.monotonic() - start < 3
        assert "\n" not in str(caught.value)
    cached(cache, "somebody/model", sd_folder)
    backbone = StableDiffusion(StableDiffusion.Settings(model="somebody/model"), "cpu")  # what the cache has is used
    assert backbone.pipeline_source == "somebody/model"


def test_one_model_however_it_is_written(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(sd_folder.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    backbones = [
        StableDiffusion(StableDiffusion.Settings(model=model), "cpu")
        for model in (str(sd_folder), f"{sd_folder}/", f"./models/{sd_folder.name}", f"~/models/{sd_folder.name}")
    ]
    assert {backbone.pipeline_source for backbone in backbones} == {str(sd_folder.resolve())}
    assert len({backbone.identity for backbone in backbones}) == 1


@pytest.mark.parametrize("model", ["~nosuchuser/model", "a" * 5000])
def test_paths_that_lead_nowhere(model: str) -> None:
    for load in (
        lambda: StableDiffusion(StableDiffusion.Settings(model=model), "cpu"),
        lambda: load_clip(f"local-dir:{model}", "", CPU),
        lambda: dino_encoder(model, CPU),
    ):
        with pytest.raises(InputError, match=r"^(backbone.model|retriever.model|metric.dino)") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(InputError, match=r"^setting 'backbone.model' cannot be 'x\\x00y': .*NUL"):
        validate(StableDiffusion.Settings, {"model": "x\0y"}, "backbone.")
    for load in (lambda: load_clip("local-dir:x\0y", "", CPU), lambda: dino_encoder("x\0y", CPU)):
        with pytest.raises(InputError, match=r"^(retriever.model|metric.dino)"):
            load()


NAN = {
    "unet": (UNET, "conv_out.bias", r"noise predictor \(unet\) in float32"),
    "encoder": (VAE, "encoder.conv_out.bias", "autoencoder's encoder in float32"),
    "decoder": (VAE, "decoder.conv_out.bias", "autoencoder's decoder in float32"),
    "text encoder": (TEXT, "final_layer_norm.bias", "text encoder in float32"),
}


@pytest.mark.parametrize("case", NAN)
def test_weights_that_are_nan(sd_folder: Path, tmp_path: Path, case: str) -> None:
    name, ending, message = NAN[case]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        [key] = [key for key in tensors if key.endswith(ending)]
        tensors[key] = torch.full_like(tensors[key], float("nan"))

    folder = copied(sd_folder, tmp_path / "model")
    weights(name, spoil)(folder)
    with pytest.raises(RunError, match=f"^backbone.model = .*: the {message} gives .* NaN .*get the model again"):
        StableDiffusion(StableDiffusion.Settings(model=str(folder)), "cpu")


def test_numbers_that_do_not_fit_into_half_precision(sd_folder: Path) -> None:
    backbone = StableDiffusion(StableDiffusion.Settings(model=str(sd_folder), dtype="bfloat16", steps=2), "cpu")
    noisy, share, prompt = torch.zeros(1, 4, 16, 16), torch.ones(1), backbone.encode_prompts(["a cup"])
    with torch.no_grad():
        backbone.unet.conv_out.bias.fill_(float("inf"))
    message = r'^the noise predictor \(unet\) in bfloat16 gives .*try Settings\(backbone={"dtype": "float32"}\)$'
    with torch.no_grad(), pytest.raises(RunError, match=message):
        backbone.predict(noisy, share, prompt, Look(words=(8,)))
    with pytest.raises(RunError, match=message):  # the first prediction of a learner
        backbone.predict(noisy, share, prompt)
    with pytest.raises(RunError, match=message):
        backbone.generate(["a cup"], seeds=[0])


def test_a_token_that_is_nan_is_named(sd_folder: Path) -> None:
    backbone = StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")
    with pytest.raises(RunError, match=r"^the token <cup-0> gives numbers that are NaN"):
        backbone.encode_prompts(["a <cup-0>"], {"<cup-0>": {"clip_l": torch.full((32,), float("nan"))}})
