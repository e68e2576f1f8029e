"""The node for ComfyUI, by the protocol of nodes: without ComfyUI, and without icekit on its side."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from icekit import Extraction
from icekit.testing.exporters import two_concepts

NODES = Path(__file__).parents[1] / "integrations" / "comfyui"


def folder_paths(place: Path) -> types.ModuleType:
    """As much of ComfyUI's module as there must be."""
    module = types.ModuleType("folder_paths")
    known = {"embeddings": [str(place / "models" / "embeddings")]}
    module.models_dir = str(place / "models")  # type: ignore[attr-defined]
    module.add_model_folder_path = lambda kind, path: known.setdefault(kind, []).append(path)  # type: ignore[attr-defined]
    module.get_folder_paths = lambda kind: list(known[kind])  # type: ignore[attr-defined]
    return module


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "icekit"
    folder.mkdir(parents=True)
    shutil.copytree(two_concepts().run_dir, folder / "photo")
    return folder


@pytest.fixture
def comfyui(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The custom node as ComfyUI loads it: a package from its folder."""
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths(tmp_path))
    name = "icekit_comfyui"
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py", submodule_search_locations=[str(NODES)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop(f"{name}.nodes", None)


def node_of(comfyui: Any) -> Any:
    [kind] = comfyui.NODE_CLASS_MAPPINGS.values()
    return kind


def test_the_protocol_of_nodes(comfyui: Any) -> None:
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    node = node_of(comfyui)
    inputs = node.INPUT_TYPES()
    assert {*inputs} == {"required"} and {*inputs["required"]} == {"token", "text"}
    assert inputs["required"]["token"][0] == [
        f"photo / {concept} / {part}"
        for concept in ("ball-0", "cube-1")
        for part in ("object", "category", "instance", "colour", "material")
    ]
    assert callable(getattr(node(), node.FUNCTION)) and node.CATEGORY == "icekit"
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == 3


def test_an_embedding_a_mask_and_a_picture(comfyui: Any, runs: Path, tmp_path: Path) -> None:
    node = node_of(comfyui)
    run = Extraction.open(runs / "photo")
    text, mask, image = node().load("photo / cube-1 / colour", "a cup, {}, on a table")
    assert text == "a cup, embedding:icekit/photo-cube-1-colour, on a table"
    file = tmp_path / "models" / "embeddings" / "icekit" / "photo-cube-1-colour.safetensors"
    read = load_file(file)
    assert {*read} == {"clip_l"}
    assert torch.equal(read["clip_l"], run.concepts[1].embeddings["colour"]["clip_l"][None])
    assert mask.shape == (1, 64, 64) and mask.dtype == torch.float32
    assert torch.equal(mask[0] > 0.5, torch.from_numpy(run.concepts[1].mask())) and {*mask.unique().tolist()} == {0, 1}
    picture = np.asarray(Image.open(runs / "photo" / "image.png").convert("RGB"))
    assert image.shape == (1, 64, 64, 3) and torch.equal((image[0] * 255).round().byte(), torch.tensor(picture))
    text, _, _ = node().load("photo / ball-0 / object", "a photo of a")
    assert text == "a photo of a embedding:icekit/photo-ball-0-instance embedding:icekit/photo-ball-0"
    assert {one.name for one in file.parent.iterdir()} == {
        "photo-cube-1-colour.safetensors", "photo-ball-0-instance.safetensors", "photo-ball-0.safetensors",
    }  # fmt: skip

    # The run is made anew: the node is run again, and the file is another one.
    asked = "photo / cube-1 / colour", "{}"
    before = node.IS_CHANGED(*asked)
    assert before == node.IS_CHANGED(*asked)
    rows = load_file(runs / "photo" / "embeddings.safetensors")
    save_file({key: row + 1 for key, row in rows.items()}, runs / "photo" / "embeddings.safetensors")
    assert node.IS_CHANGED(*asked) != before
    node().load(*asked)
    assert torch.equal(load_file(file)["clip_l"], read["clip_l"] + 1)


def test_several_text_encoders_and_rows(comfyui: Any, runs: Path, tmp_path: Path) -> None:
    shutil.move(runs / "photo", runs / "My photo.v2")
    place = runs / "My photo.v2"
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["backbone"]["rows"] = {"clip_l": 4, "clip_g": 8}
    [first, _] = manifest["concepts"]
    manifest["concepts"], first["tokens"] = [first], {"instance": "<ink-0-instance>", "instance2": "<ink-0-instance2>"}
    (place / "manifest.json").write_text(json.dumps(manifest))
    rows = {f"{token}.{name}": torch.randn(length) for token in first["tokens"].values()
            for name, length in manifest["backbone"]["rows"].items()}  # fmt: skip
    save_file(rows, place / "embeddings.safetensors")
    [whole, instance] = node_of(comfyui).INPUT_TYPES()["required"]["token"][0]
    assert (whole, instance) == ("My photo.v2 / ball-0 / object", "My photo.v2 / ball-0 / instance")
    text, _, _ = node_of(comfyui)().load(whole, "{}")
    name = text.removeprefix("embedding:icekit/")
    assert name.startswith("My-photo-v2-") and name.endswith("-ink-0-instance") and " " not in name
    read = load_file(tmp_path / "models" / "embeddings" / "icekit" / f"{name}.safetensors")
    for encoder in ("clip_l", "clip_g"):
        expected = [rows[f"{token}.{encoder}"] for token in first["tokens"].values()]
        assert torch.equal(read[encoder], torch.stack(expected))


def test_nothing_outside_a_run_is_read(comfyui: Any, runs: Path, tmp_path: Path) -> None:
    node, place = node_of(comfyui), runs / "photo"
    (tmp_path / "secret.png").write_bytes((place / "masks" / "0-ball.png").read_bytes())
    for typed in ("../photo / ball-0 / object", "/etc / passwd / object", "photo", ""):
        with pytest.raises(ValueError, match="icekit: there is no "):
            node().load(typed, "{}")
    manifest = json.loads((place / "manifest.json").read_text())
    for mask in ("../../../secret.png", str(tmp_path / "secret.png"), "masks", "link.png", "nowhere.png"):
        if mask == "link.png":
            os.symlink(tmp_path / "secret.png", place / mask)
        manifest["concepts"][0]["mask"] = mask
        (place / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"^icekit: "):
            node().load("photo / ball-0 / colour", "{}")
    (place / "embeddings.safetensors").unlink()
    os.symlink(tmp_path / "secret.png", place / "embeddings.safetensors")
    with pytest.raises(ValueError, match="leads out of the run"):
        node().load("photo / cube-1 / colour", "{}")
    # What is no run is not offered, and breaks nothing.
    for content in ("{", "[]", '{"icekit_version": "1", "image": {"width": 1, "height": 1}, "concepts": [{}]}'):
        (place / "manifest.json").write_text(content)
        assert node.INPUT_TYPES()["required"]["token"][0] == [
            "no runs: put run directories into models/icekit, press R"
        ]


def test_it_needs_nothing_of_icekit(tmp_path: Path) -> None:
    """ComfyUI need not have icekit, diffusers or transformers."""
    (tmp_path / "folder_paths.py").write_text(
        "models_dir = '.'\ndef add_model_folder_path(*_): pass\ndef get_folder_paths(_): return []\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(NODES.parent)!r}]\n"
        "import comfyui; print(comfyui.NODE_CLASS_MAPPINGS['IcekitToken'].INPUT_TYPES()['required']['token'][0])\n"
        "print([one for one in ('icekit', 'diffusers', 'transformers', 'pydantic') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['no runs: put run directories into models/icekit, press R']", "[]"]
