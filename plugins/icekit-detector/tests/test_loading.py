"""What is wrong with a model's folder is said in one line that names the setting and the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from icekit_detector.clipseg import ClipSeg
from icekit_detector.grounded_sam import GroundedSam
from icekit_detector.retriever import GroundingDinoRetriever
from icekit_detector.settings import ClipSegSettings, GroundedSamSettings, GroundingDinoSettings
from safetensors.torch import load_file, save_file

from icekit.protocols import InputError, RunError
from icekit.testing.scenes import NOUNS, two_objects
from icekit.testing.subjects import kit_backbone
from icekit.testing.tiny import tiny_tokenizer


def change(name: str, **values: Any) -> Callable[[Path], None]:
    """Other values in a JSON file of the folder."""

    def changed(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | values), encoding="utf-8")

    return changed


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def weights(changed: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Other weights in the folder."""

    def rewritten(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(changed(load_file(file)), file, metadata={"format": "pt"})

    return rewritten


def nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Damaged in the last layer norm of each part, whatever the family."""
    return {name: torch.full_like(one, torch.nan) if "norm" in name else one for name, one in tensors.items()}


def second_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[len(tensors) // 2 :])


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}.")  # an empty dictionary
    (folder / "model.safetensors").unlink()


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}', encoding="utf-8")


def other_tokenizer(folder: Path) -> None:
    tiny_tokenizer(["cup"] + [f"word{number}" for number in "abcdefghij"] * 40).save_pretrained(folder)


HUGE = {"image_processor_type": "ViTImageProcessor", "size": {"height": 10**6, "width": 10**6}}
EVERY_FOLDER: list[tuple[Callable[[Path], None], str]] = [
    (shutil.rmtree, "there is no such folder, and it is no id of a hub model"),
    (remove("config.json"), "the folder has no config.json, so it is no model in transformers' format"),
    (remove("processor_config.json"), "has no processor_config.json and no preprocessor_config.json"),
    (remove("model.safetensors"), "pickled weights are not loaded"),
    (pickled, "pickled weights are not loaded"),
    (cut, "no whole safetensors file"),
    (weights(second_half), "weights of its .* are not in its safetensors files"),
    (change("config.json", model_type="bert", architectures=["BertModel"]), "made for BertModel; it should be for"),
    (change("config.json", auto_map={"AutoModel": "evil.Model"}), "asks for code to be run"),
    (change("processor_config.json", auto_map={"AutoProcessor": "evil.Processor"}), "asks for code to be run"),
    (change("config.json", quantization_config={"bits": 4}), "quantised weights are not supported"),
    (change("config.json", use_timm_backbone=True), "use_timm_backbone takes a part from another model or library"),
    (change("config.json", backbone="owner/name"), "backbone takes a part from another model or library"),
    (adapter, "it is an adapter of another model"),
    (lambda folder: (folder / "config.json").write_text("{") and None, "should be a JSON object"),
]
CLIPSEG_FOLDER: list[tuple[Callable[[Path], None], str]] = [
    (remove("tokenizer.json"), "has no tokenizer.json, and no vocab.json with merges.txt: its tokenizer"),
    (change("config.json", architectures=["CLIPSegModel"]), "made for CLIPSegModel; it should be for"),
    (change("processor_config.json", image_processor=HUGE), "size.height is 1000000, at most 8192"),
    (change("config.json", extract_layers=[0, 1, 7]), "its files do not fit together"),
    (other_tokenizer, "its tokenizer files are missing or another model's"),
]
DINO_FOLDER: list[tuple[Callable[[Path], None], str]] = [
    (remove("tokenizer.json", "vocab.txt"), "has no tokenizer.json, and no vocab.txt: its tokenizer"),
    (change("config.json", backbone_config={"model_type": "timm_backbone"}), "takes a part from another model"),
    (change("config.json", backbone_config={"model_type": "no-such"}), "cannot be loaded as Grounding DINO"),
    (change("config.json", encoder_layers=10**6), "it is damaged"),
]


def copy_of(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "model"))


def refused(build: Callable[[], object], setting: str, folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build()
    assert str(caught.value).startswith(f"{setting} = {str(folder)!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spoil", "message"), EVERY_FOLDER + CLIPSEG_FOLDER)
def test_a_bad_clipseg_folder(
    clipseg_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = copy_of(clipseg_folder, tmp_path)
    spoil(folder)
    refused(lambda: ClipSeg(ClipSegSettings(model=str(folder)), kit_backbone()), "segmentor.model", folder, message)


@pytest.mark.parametrize(("spoil", "message"), EVERY_FOLDER + DINO_FOLDER)
def test_a_bad_grounding_dino_folder(
    dino_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = copy_of(dino_folder, tmp_path)
    spoil(folder)
    settings = GroundingDinoSettings(model=str(folder), vocabulary=NOUNS)
    refused(lambda: GroundingDinoRetriever(settings, kit_backbone()), "retriever.model", folder, message)


@pytest.mark.parametrize(("spoil", "message"), EVERY_FOLDER)
def test_a_bad_sam_folder(
    dino_folder: Path, sam_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = copy_of(sam_folder, tmp_path)
    spoil(folder)
    settings = GroundedSamSettings(detector=str(dino_folder), sam=str(folder))
    refused(lambda: GroundedSam(settings, kit_backbone()), "segmentor.sam", folder, message)


def test_the_models_in_each_others_place(clipseg_folder: Path, dino_folder: Path) -> None:
    with pytest.raises(InputError, match=r"segmentor\.model = .*made for GroundingDinoForObjectDetection"):
        ClipSeg(ClipSegSettings(model=str(dino_folder)), kit_backbone())
    with pytest.raises(InputError, match=r"segmentor\.sam = .*made for CLIPSegForImageSegmentation.*for SamModel"):
        GroundedSam(GroundedSamSettings(detector=str(dino_folder), sam=str(clipseg_folder)), kit_backbone())


def test_nan_is_said(clipseg_folder: Path, dino_folder: Path, sam_folder: Path, tmp_path: Path) -> None:
    spoilt = {}
    for name, folder in (("clipseg", clipseg_folder), ("dino", dino_folder), ("sam", sam_folder)):
        (tmp_path / name).mkdir()
        spoilt[name] = str(copy_of(folder, tmp_path / name))
        weights(nan)(Path(spoilt[name]))
    saying = "model gives numbers that are NaN or infinite; its weights are damaged"
    with pytest.raises(RunError, match=rf"^segmentor\.model = .*CLIPSeg {saying}"):
        ClipSeg(ClipSegSettings(model=spoilt["clipseg"]), kit_backbone())
    with pytest.raises(RunError, match=rf"^segmentor\.detector = .*Grounding DINO {saying}"):
        GroundedSam(GroundedSamSettings(detector=spoilt["dino"], sam=str(sam_folder)), kit_backbone())
    with pytest.raises(RunError, match=rf"^segmentor\.sam = .*SAM {saying}"):
        GroundedSam(GroundedSamSettings(detector=str(dino_folder), sam=spoilt["sam"]), kit_backbone())


def test_a_hub_model_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network, which no test has, it says how to do without."""
    with pytest.raises(InputError, match=r"segmentor\.model = 'owner/none': .*hub does not give it: offline") as caught:
        ClipSeg(ClipSegSettings(model="owner/none"), kit_backbone())
    assert "give a folder in transformers' format" in str(caught.value)


def test_a_hub_model_of_the_cache(clipseg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By OWNER/NAME, as the cache has it after a download."""
    place = tmp_path / "cache" / "models--owner--clipseg"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (place / "snapshots").mkdir()
    snapshot = shutil.copytree(clipseg_folder, place / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    image = two_objects().image
    cached = ClipSeg(ClipSegSettings(model="owner/clipseg"), kit_backbone()).heat(image, "cup")
    assert torch.equal(cached, ClipSeg(ClipSegSettings(model=str(clipseg_folder)), kit_backbone()).heat(image, "cup"))
    change("config.json", model_type="bert", architectures=["BertModel"])(Path(snapshot))
    with pytest.raises(InputError, match=r"^segmentor\.model = 'owner/clipseg': config.json is made for BertModel"):
        ClipSeg(ClipSegSettings(model="owner/clipseg"), kit_backbone())
