"""The plugin as icekit finds it: by its entry point, and through the program in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from icekit.plugins import installed
from icekit.testing.scenes import two_objects

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tabletop.png"


def test_entry_point() -> None:
    [entry] = entry_points(group="icekit", name="detector")
    assert entry.dist is not None and entry.dist.name == "icekit-detector"
    plugins = installed()
    assert [str(broken) for broken in plugins.broken if broken.origin.plugin == "detector"] == []
    for role, name, kind in [
        ("segmentor", "clipseg", "ClipSeg"),
        ("segmentor", "grounded-sam", "GroundedSam"),
        ("retriever", "grounding-dino", "GroundingDinoRetriever"),
    ]:
        registered = plugins.offered(role)[name]
        assert registered.origin.distribution == "icekit-detector"
        component = plugins.component(role, name)
        assert component.__name__ == kind
        assert registered.summary == (component.__doc__ or "").partition("\n")[0]


def test_declaring_them_is_quick() -> None:
    """Whoever lists plugins waits for none of the libraries that take seconds to import."""
    heavy = ("torch", "torchvision", "transformers", "diffusers", "numpy")
    code = f"import sys, icekit_detector; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_run_on_the_tabletop_from_end_to_end(clipseg_folder: Path, tmp_path: Path) -> None:
    from icekit_process import icekit

    picture = Image.open(EXAMPLE).convert("RGB")
    picture.crop((0, 0, picture.width, picture.height * 3 // 4)).save(tmp_path / "wide.png")
    done = icekit(
        [
            "run", "wide.png", "--out", "run", "--json", "--device", "cpu", "--backbone", "tabletop",
            "--segmentor", "clipseg", "--set", f"segmentor.model={clipseg_folder}", "--set", "segmentor.threshold=0.6",
            "--attribute", "colour", "--max-concepts", "2", "--set", "learner.steps=2", "--set", "learner.word_steps=0",
            "--set", "samples=1", "--set", "sample_steps=1",
        ],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["components"]["segmentor"] == "clipseg"
    assert manifest["concepts"]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_run_on_a_backbone_of_wide_pictures(dino_folder: Path, sam_folder: Path, tmp_path: Path) -> None:
    """Its retriever and its segmentor together; the pictures of the model are wider than high."""
    from icekit_process import icekit

    from icekit.testing import tiny

    model = tiny.write_stable_diffusion(tmp_path / "sd")
    two_objects((96, 160)).picture.save(tmp_path / "picture.png")
    (tmp_path / "words.txt").write_text("cup\nball\nbowl\n", encoding="utf-8")
    done = icekit(
        [
            "run", "picture.png", "--out", "run", "--json", "--device", "cpu", "--attribute", "colour",
            "--backbone", "sd21", "--set", f"backbone.model={model}", "--set", "backbone.image_size=[96,160]",
            "--retriever", "grounding-dino", "--set", f"retriever.model={dino_folder}",
            "--set", "retriever.vocabulary=words.txt", "--set", "retriever.threshold=0.1",
            "--segmentor", "grounded-sam", "--set", f"segmentor.detector={dino_folder}",
            "--set", f"segmentor.sam={sam_folder}", "--max-concepts", "2",
            "--set", "learner.steps=2", "--set", "samples=1", "--set", "sample_steps=1",
        ],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert (manifest["components"]["retriever"], manifest["components"]["segmentor"]) == (
        "grounding-dino",
        "grounded-sam",
    )
    assert {concept["label"] for concept in manifest["concepts"]} <= {"cup", "ball", "bowl"}
    assert all(0 <= concept["score"] <= 1 for concept in manifest["concepts"])


@pytest.mark.slow
def test_a_wrong_model_is_one_line(dino_folder: Path, tmp_path: Path) -> None:
    from icekit_process import icekit

    picture = two_objects((64, 64)).picture
    picture.save(tmp_path / "picture.png")
    done = icekit(
        [
            "run", "picture.png", "--backbone", "tabletop",
            "--segmentor", "clipseg", "--set", f"segmentor.model={dino_folder}",
        ],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if "segmentor.model" in line]
    assert "made for GroundingDinoForObjectDetection; it should be for CLIPSegForImageSegmentation" in line
    assert "Traceback" not in done.stderr
