"""CLIPSeg's masks against transformers itself, on the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_detectors
import torch
import torch.nn.functional as F
from icekit_detector.clipseg import ClipSeg
from torch import Tensor
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from icekit.protocols import InputError
from icekit.settings import validate
from icekit.testing.asserting import generator_of
from icekit.testing.scenes import Scene, two_objects
from icekit.testing.subjects import kit_backbone


def clipseg(folder: Path, **values: Any) -> ClipSeg:
    settings = validate(ClipSeg.Settings, {"model": str(folder), **values}, prefix="segmentor.")
    return ClipSeg(settings, kit_backbone())


def heat_by_transformers(folder: Path, scene: Scene, text: str) -> Tensor:
    """As its documentation has it, brought to the picture's size."""
    processor: Any = CLIPSegProcessor.from_pretrained(folder)
    model = CLIPSegForImageSegmentation.from_pretrained(folder)
    inputs = processor(text=[text], images=[scene.picture], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    square = logits.reshape(1, 1, 64, 64)
    return F.interpolate(square, scene.size, mode="bilinear", align_corners=False)[0, 0].sigmoid()


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (130, 70)])
def test_the_mask_is_what_the_model_says(clipseg_folder: Path, size: tuple[int, int]) -> None:
    scene = two_objects(size)
    heat = heat_by_transformers(clipseg_folder, scene, "a photo of a cup")
    mask = clipseg(clipseg_folder, threshold=0.6).segment(scene.view(), "cup", generator_of(0))
    assert torch.equal(mask, heat > 0.6)
    assert 0.05 < float(mask.float().mean()) < 0.95
    asked = clipseg(clipseg_folder, threshold=0.6, template="one {} here").segment(scene.view(), "cup", generator_of(0))
    assert torch.equal(asked, heat_by_transformers(clipseg_folder, scene, "one cup here") > 0.6)
    assert not torch.equal(asked, mask)


def test_a_share_of_the_hottest_visible_pixel(clipseg_folder: Path) -> None:
    scene = two_objects()
    heat = heat_by_transformers(clipseg_folder, scene, "a photo of a cup")
    segmentor = clipseg(clipseg_folder, threshold=0.1, of_peak=0.5)
    assert torch.equal(segmentor.segment(scene.view(), "cup", generator_of(0)), heat > 0.5 * heat.max())
    # With the hottest half erased, in a view whose pixels are as before, the hottest of what is left counts.
    view = scene.view()
    visible = heat < heat.median()
    mask = segmentor.segment(type(view)(view.original, view.pixels, visible), "cup", generator_of(0))
    assert torch.equal(mask, (heat > max(0.1, 0.5 * float(heat[visible].max()))) & visible)
    assert bool(mask.any())


def test_a_folder_of_earlier_versions_is_the_same(clipseg_folder: Path, tmp_path: Path) -> None:
    folder = tiny_detectors.as_published(tiny_detectors.write_clipseg(tmp_path / "published"))
    assert not (folder / "processor_config.json").exists() and (folder / "merges.txt").exists()
    view = two_objects((64, 96)).view()
    old, new = clipseg(folder), clipseg(clipseg_folder)
    assert torch.equal(old.heat(view.pixels, "red cup"), new.heat(view.pixels, "red cup"))


def test_the_model_is_frozen(clipseg_folder: Path) -> None:
    segmentor = clipseg(clipseg_folder)
    model = segmentor._loaded.model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    with torch.enable_grad():
        assert not segmentor.heat(two_objects().image, "cup").requires_grad


def test_a_phrase_that_is_too_long(clipseg_folder: Path) -> None:
    with pytest.raises(InputError, match=r"segmentor 'clipseg': 'red red .* CLIPSeg reads 77"):
        clipseg(clipseg_folder).segment(two_objects().view(), "red " * 80, generator_of(0))


@pytest.mark.parametrize(
    ("key", "value"),
    [("threshold", 1.0), ("threshold", -0.1), ("of_peak", 1.5), ("template", "a photo"), ("model", "")],
)
def test_settings_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"segmentor.{key}"):
        validate(ClipSeg.Settings, {key: value}, prefix="segmentor.")
