"""A photograph of any shape is seen whole: ``image.fit``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from icekit_tabletop import render_scene
from icekit_tabletop.backbone import Tabletop
from PIL import Image

from icekit import Extraction, extract
from icekit.pixels import fit, middle, shape_for
from icekit.protocols import Look
from icekit.settings import load_settings
from icekit.testing.tiny import tiny_backbone


@pytest.mark.parametrize(
    ("picture", "native", "multiple", "shape"),
    [
        ((4032, 3024), (1024, 1024), 8, (888, 1184)),
        ((3000, 4000), (512, 512), 8, (576, 432)),
        ((1500, 1000), (512, 512), 8, (416, 624)),
        ((1000, 1000), (512, 512), 8, (512, 512)),
        ((1500, 1000), (64, 64), 4, (56, 84)),
        ((9000, 1000), (512, 512), 8, (256, 1024)),  # a panorama: what is beyond 4 to 1 is cut
    ],
)
def test_shapes(picture: tuple[int, int], native: tuple[int, int], multiple: int, shape: tuple[int, int]) -> None:
    assert shape_for(picture, native, multiple) == shape


def test_no_common_photograph_is_cut() -> None:
    for ratio in (1, 5 / 4, 4 / 3, 1.414, 3 / 2, 16 / 10, 16 / 9, 2, 21 / 9, 3):
        for picture in ((round(3000 * ratio), 3000), (3000, round(3000 * ratio))):
            for native, multiple in (((512, 512), 8), ((768, 768), 8), ((1024, 1024), 8)):
                shape = shape_for(picture, native, multiple)
                assert middle(picture, shape) == (0, 0, *picture), (picture, shape)
                assert 0.7 < shape[0] * shape[1] / (native[0] * native[1]) < 1.3


def test_what_is_nearly_of_a_shape_is_not_cut() -> None:
    picture = Image.new("RGB", (101, 100), "black")
    picture.putpixel((0, 50), (255, 255, 255))
    assert np.asarray(fit(picture, (100, 100)))[50, 0].max() > 100
    assert middle((110, 100), (100, 100)) == (5, 0, 105, 100)


def test_a_model_for_another_shape_shares_its_weights_and_changes_nothing() -> None:
    backbone = tiny_backbone()
    size, shape, grids = backbone.image_size, backbone.latent_shape, backbone.word_grids
    assert backbone.for_picture(64, 96) is backbone  # its settings say the size
    free = Tabletop(Tabletop.Settings(), "cpu")
    wide = free.for_picture(200, 300)
    assert wide.unet is free.unet and wide.image_size == (48, 72) and free.image_size == (64, 64)
    assert (backbone.image_size, backbone.latent_shape, backbone.word_grids) == (size, shape, grids)
    latents = wide.encode_images(torch.rand(1, 3, 48, 72))
    assert latents.shape[1:] == wide.latent_shape
    prompts = wide.encode_prompts(["a cup"])
    seen = wide.predict(latents, torch.tensor([0.3]), prompts, Look(words=(16,), pixels=(16,))).attention
    assert (
        tuple(seen.words[0].shape[2:]) == wide.word_grids[0] and tuple(seen.pixels[0].shape[1:3]) == wide.pixel_grids[0]
    )
    [image] = wide.generate(["a cup"], seeds=[0], steps=2)
    assert image.size == (72, 48)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes side by side, 256 by 128, with an object of its own in each half; a JPEG turned by its EXIF data."""
    left, right = (render_scene(seed, n_objects=1, size=128).image for seed in (11, 12))
    picture = Image.new("RGB", (256, 128))
    picture.paste(left, (0, 0))
    picture.paste(right, (128, 0))
    file = tmp_path_factory.mktemp("photo") / "wide.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    picture.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95)
    return file


@pytest.mark.slow
def test_a_wide_photograph_keeps_its_whole_content(photo: Path, tmp_path: Path) -> None:
    """Masks are also there in the photograph's own size, upright."""
    options = {"components": {"backbone": "tabletop"}, "learner": {"steps": 2, "word_steps": 0}, "device": "cpu"}
    whole, square = tmp_path / "whole", tmp_path / "square"
    extract(photo, whole, load_settings(options=options | {"samples": 1, "sample_steps": 2}))
    extract(photo, square, load_settings(options=options | {"samples": 0, "image": {"fit": "square"}}))
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["image"]["fitted"] == {"source_width": 256, "source_height": 128, "box": [0, 0, 256, 128]}
    width, height = Image.open(whole / "image.png").size
    assert width / height == pytest.approx(2, rel=0.02) and 0.7 < width * height / 64**2 < 1.3
    assert Image.open(square / "image.png").size == (64, 64)
    run = Extraction.open(whole)
    sides = set()
    for concept in run.concepts:
        mask = concept.mask()
        assert mask.shape == (height, width)
        original = np.asarray(Image.open(whole / f"masks/original/{concept.index}-{concept.label}.png"))
        assert original.shape == (128, 256) and set(np.unique(original)) <= {0, 255}
        assert (original > 0).mean() == pytest.approx(mask.mean(), rel=0.15)
        sides.add("left" if np.argwhere(original > 0)[:, 1].mean() < 128 else "right")
    assert sides == {"left", "right"}
    assert Image.open(next((whole / "samples").glob("*.png"))).size == (width, height)


def test_a_run_of_before_goes_on_with_its_picture_cut(photo: Path, tmp_path: Path) -> None:
    """Its settings do not say how the picture was fitted."""
    options = {"components": {"backbone": "tabletop", "learner": "words"}, "samples": 0, "device": "cpu"}
    out = tmp_path / "run"
    extract(photo, out, load_settings(options=options | {"image": {"fit": "square"}}))
    manifest = json.loads((out / "manifest.json").read_text())
    settings = (out / "settings.toml").read_text()
    assert '[image]\nfit = "square"\n' in settings
    (out / "checkpoint").mkdir()
    values = load_settings(out / "settings.toml").model_dump(mode="json")
    del values["image"]
    begun = {"schema_version": 2, "ready": True, "source": str(photo), "settings": values}
    (out / "checkpoint" / "run.json").write_text(
        json.dumps(begun | {"sha256": manifest["image"]["sha256"], "plugins": []})
    )
    for name in ("manifest.json", "README.md", "vectors.safetensors"):  # what came later
        (out / name).unlink()
    done = extract(photo, out, load_settings(options=options), resume=True)
    assert done.manifest["image"]["width"] == 64 and done.manifest["image"]["height"] == 64
