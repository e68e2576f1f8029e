"""What a run costs: the evaluations that it tells of are those of the noise predictor, all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from icekit import extract
from icekit.run.counting import counted
from icekit.run.directory import RunDirectory
from icekit.run.evaluations import Counter, Evaluations
from icekit.settings import Settings, load_settings
from icekit.testing.tiny import tiny_backbone


class Truth:
    """How many pictures the noise predictor was shown."""

    forward = 0
    backward = 0


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> Iterator[Truth]:
    seen, own = Truth(), UNet2DConditionModel.forward

    def forward(self: Any, sample: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        found = own(self, sample, *arguments, **named)
        seen.forward += len(sample)
        output = found[0] if isinstance(found, tuple) else found.sample
        seen.backward += len(sample) * output.requires_grad
        return found

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return seen


def settings_of(folder: Path, **given: Any) -> Settings:
    values = {
        "components": {"retriever": "words"},
        "backbone": {"model": str(folder), "image_size": [64, 64]},
        "retriever": {"words": ["cup"]},
        "segmentor": {"draws": 2, "refinement": False},
        "learner": {"steps": 2},
        "sample_steps": 2,
    }
    return load_settings(options=values | given)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray((picture * 255).byte().numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_run_tells_all_that_it_cost(truth: Truth, sd_folder: Path, photo: Path, tmp_path: Path) -> None:
    learner = {"steps": 4, "refine_steps": 1, "prior_images": 1, "prior_steps": 1}
    run = extract(photo, tmp_path / "run", settings_of(sd_folder, learner=learner))
    counts = run.manifest["evaluations"]
    concepts = len(run.concepts)
    tried = 1  # a model is tried once when it is loaded
    assert sum(count["forward"] for count in counts.values()) == truth.forward - tried
    assert sum(count["backward"] for count in counts.values()) == truth.backward
    assert list(counts) == [
        "localise", "learn object", "learn attributes", "learn refine", "attention maps", "samples",
        "samples of the words alone",
    ]  # fmt: skip
    assert counts["learn object"] == counts["learn attributes"] == {"forward": 2 * concepts, "backward": 2 * concepts}
    # Of each concept and its two attributes a picture, with guidance, in two steps.
    each = {"forward": concepts * 3 * 2 * 2, "backward": 0}
    assert counts["samples"] == counts["samples of the words alone"] == each
    assert counts["localise"]["backward"] == counts["attention maps"]["backward"] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<dt>samples</dt><dd>{each['forward']}</dd>" in page
    assert f"<dt>learn object</dt><dd>{2 * concepts} with a backward pass</dd>" in page
    assert f"<dt>total</dt><dd>{truth.forward - tried}</dd>" in page


def test_a_run_that_went_on_tells_what_all_its_sittings_cost(
    sd_folder: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(sd_folder)
    whole = extract(photo, tmp_path / "whole", settings).manifest["evaluations"]
    kept: list[int] = []

    def save_sample(self: RunDirectory, *place: Any, **named: Any) -> None:
        kept.append(0)
        if len(kept) == 2:
            raise KeyboardInterrupt
        own(self, *place, **named)

    own = RunDirectory.save_sample
    monkeypatch.setattr(RunDirectory, "save_sample", save_sample)
    with pytest.raises(KeyboardInterrupt):
        extract(photo, tmp_path / "run", settings)
    counts = extract(photo, tmp_path / "run", settings, resume=True).manifest["evaluations"]
    # The second of three samples was not kept. Maps are made anew in the place of those before, and count once.
    again = {"samples": whole["samples"]["forward"] // 3}
    for what, count in counts.items():
        assert count["forward"] == whole[what]["forward"] + again.get(what, 0)


def test_attention_is_looked_at_where_somebody_shows_it(sd_folder: Path, photo: Path, tmp_path: Path) -> None:
    run = extract(photo, tmp_path / "run", settings_of(sd_folder, exporters=[], samples=0))
    assert list(run.manifest["evaluations"]) == ["localise", "learn object", "learn attributes"]
    assert not (tmp_path / "run" / "attention").exists()


@pytest.mark.parametrize(("guidance", "each"), [(None, 4), (1.5, 4), (1.0, 2), (0.0, 2)])
def test_a_picture_is_counted_as_what_it_took(truth: Truth, guidance: float | None, each: int) -> None:
    backbone, counter = tiny_backbone(), Counter()
    truth.forward = 0
    one = counted(backbone, counter, backbone.Settings(steps=2))
    assert one is not backbone and one.identity == backbone.identity
    made = one.generate(["a cup", "a ball"], seeds=[0, 1], guidance_scale=guidance)
    counter.book("pictures")
    assert len(made) == 2
    assert counter.booked == {"pictures": Evaluations(2 * each)}
    assert truth.forward == 2 * each
    backbone.generate(["a cup"], seeds=[0])
    counter.book("nothing")
    assert list(counter.booked) == ["pictures"]  # the one that was handed in is not counted


def test_a_family_may_count_its_pictures_itself() -> None:
    backbone, counter = tiny_backbone(), Counter()
    vars(backbone)["passes"] = lambda steps, guidance_scale: steps  # a model that is told of guidance
    counted(backbone, counter, backbone.Settings()).generate(["a cup"], seeds=[0], steps=2)
    counter.book("pictures")
    assert counter.booked == {"pictures": Evaluations(2)}


def test_a_look_at_concepts_is_counted() -> None:
    backbone, counter = tiny_backbone(), Counter()
    vars(backbone)["concept_maps"] = lambda noisy, *given: torch.zeros(len(noisy), len(given[-1]), 2, 2)
    latents = torch.zeros(3, *backbone.latent_shape)
    one = counted(backbone, counter, backbone.Settings())
    prompts = backbone.encode_prompts(["a cup"] * 3)
    assert one.concept_maps(latents, torch.zeros(3), prompts, ["cup", "ball"]).shape == (3, 2, 2, 2)  # type: ignore[attr-defined]
    counter.book("localise")
    assert counter.booked == {"localise": Evaluations(3)}
