"""A run's README.md: a model card that hubs read, whatever the run is called, and the same after any interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import plain_components as plain
import pytest
from huggingface_hub import ModelCard
from icekit_process import in_this_process
from markdown_it import MarkdownIt
from PIL import Image

from icekit import Extraction
from icekit.run.card import model_card
from icekit.run.directory import RunDirectory
from icekit.run.records import Manifest
from icekit.settings import Settings, load_settings
from icekit.testing.exporters import two_concepts

Icekit = Callable[..., tuple[int, str, str]]
RUN = ["run", "photo.png", *plain.OPTIONS, "--set", "learner.steps=2", "--max-concepts", "2"]


@pytest.fixture
def icekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Icekit:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    return in_this_process(tmp_path, monkeypatch, capsys)


def test_it_is_part_of_the_run(icekit: Icekit) -> None:
    assert icekit(*RUN, "--out", "run")[0] == 0
    run = Extraction.open("run")
    assert "README.md" in run.manifest["files"]
    card = ModelCard.load(Path("run/README.md"))
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["textual_inversion", "icekit"],
    }
    assert card.validate is not None and card.text.startswith("\n# Concepts of photo.png\n")
    shown = re.findall(r'<img src="([^"]+)"|!\[[^]]*\]\(([^)]+)\)', card.text)
    files = [unquote(one or other) for one, other in shown]
    assert {"image.png", "masks/0-cup.png", "samples/0-object-0.png", "samples/1-colour-0.png"} <= {*files}
    assert all((Path("run") / file).is_file() for file in files)
    for concept in run.concepts:
        assert all(f"`{token}`" in card.text for token in concept.tokens.values())
    assert "red" in card.text and str(Path.cwd()) not in card.text
    # What a run is called and when it was made changes nothing; it goes with the run.
    assert icekit(*RUN, "--out", "other")[0] == 0
    assert Path("run/README.md").read_bytes() == Path("other/README.md").read_bytes()
    assert icekit(*RUN, "--out", "run", "--overwrite", "--set", "samples=0", "--set", "words_alone=false")[0] == 0
    assert "samples/" not in Path("run/README.md").read_text()


def test_an_interrupted_run_ends_with_the_same_card(icekit: Icekit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert icekit(*RUN, "--out", "whole")[0] == 0
    save, saved = RunDirectory.save_sample, []

    def stop(*arguments: Any, **options: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(save(*arguments, **options))  # type: ignore[func-returns-value]

    with monkeypatch.context() as context:
        context.setattr(RunDirectory, "save_sample", stop)
        assert icekit(*RUN, "--out", "run")[0] == 130
    assert not Path("run/README.md").exists()
    assert icekit(*RUN, "--out", "run", "--resume")[0] == 0
    assert Path("run/README.md").read_bytes() == Path("whole/README.md").read_bytes()


def test_a_card_of_the_users_stays(icekit: Icekit) -> None:
    Path("run").mkdir()
    assert icekit(*RUN, "--out", "run")[0] == 0
    manifest = json.loads(Path("run/manifest.json").read_text())
    manifest["files"].remove("README.md")  # a run of a version that wrote none
    Path("run/manifest.json").write_text(json.dumps(manifest))
    Path("run/README.md").write_text("mine")
    status, _, err = icekit(*RUN, "--out", "run", "--overwrite")
    assert (status, Path("run/README.md").read_text()) == (2, "mine")
    assert "run/README.md is in the way: icekit did not write it" in err


def test_a_model_of_the_hub_and_what_was_trained(tmp_path: Path) -> None:
    source = two_concepts()
    settings = source.settings()
    backbone = {**source.manifest["backbone"], "pipeline_class": "StableDiffusionPipeline"}
    backbone |= {"pipeline_encoders": {"clip_l": ["tokenizer", "text_encoder"]}}
    manifest = Manifest.model_validate({**source.manifest, "backbone": backbone})
    (tmp_path / "lora.safetensors").write_bytes(b"")
    card = ModelCard(model_card(RunDirectory(tmp_path), manifest, settings))
    assert card.data.base_model == settings.values_of("backbone")["model"]
    assert card.data.tags == ["textual_inversion", "lora", "icekit"]
    assert 'pipe.load_lora_weights(".", weight_name="lora.safetensors")' in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert f'from_pretrained("{card.data.base_model}")' in code
    somewhere = load_settings(None, [], {"backbone": {"model": "/home/me/models/my-sd"}})
    text = model_card(RunDirectory(tmp_path), manifest, somewhere)
    assert "base_model" not in text and "/home/me" not in text and "model `my-sd`" in text


def test_what_others_wrote_means_nothing_in_it(tmp_path: Path) -> None:
    source = two_concepts()
    words = ["`x` | <script>alert(1)</script>", "[a](javascript:b)\n# c"]
    concept = {**source.manifest["concepts"][0], "words": {"colour": words}, "label": "a|b"}
    changed = {**source.manifest, "concepts": [concept]}
    changed["image"] = {**changed["image"], "source": "C:\\me\\--- <b>|.png"}
    text = model_card(RunDirectory(tmp_path), Manifest.model_validate(changed), Settings())
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(text).text)
    assert not re.findall('<script|<b>|javascript:[^<]*"|<h1>c', page) and page.count("<h1>") == 1
    assert page.count("<tr>") == 1 + len(concept["tokens"]) and page.count("<td>") == 6 * len(concept["tokens"])
