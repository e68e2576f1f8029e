"""What icekit-tabletop gives icekit."""

from __future__ import annotations

import json

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from icekit_tabletop import plugin as tabletop_plugin
from icekit_tabletop import render_scene, weights
from icekit_tabletop.backbone import OWN_MODEL, Tabletop
from icekit_tabletop.world import SHAPES
from PIL import Image
from torch import nn

from icekit import plugins
from icekit.bench.matching import match_masks
from icekit.paths import package_path
from icekit.pixels import to_tensor
from icekit.protocols import InputError, Look
from icekit.run.locating import locate
from icekit.run.models import build_component
from icekit.run.showing import attention_maps
from icekit.settings import flatten, load_settings


@pytest.fixture
def cli() -> click.Group:
    group = click.Group("icekit")
    tabletop_plugin.register_commands(group)
    return group


def test_render_writes_a_scene(cli, tmp_path):
    out = tmp_path / "new" / "scene"
    result = CliRunner().invoke(cli, ["tabletop", "render", "--seed", "7", "--n-objects", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(out / "image.png")
    scene = render_scene(7, n_objects=3)
    assert np.array_equal(np.asarray(Image.open(out / "image.png")), np.asarray(scene.image))
    description = json.loads((out / "scene.json").read_text(encoding="utf-8"))
    assert description["caption"] == scene.caption
    assert [item["shape"] for item in description["objects"]] == [spec.shape for spec in scene.objects]
    for item, mask in zip(description["objects"], scene.masks, strict=True):
        assert item["mask"] == f"masks/{item['index']}-{item['shape']}.png"
        written = Image.open(out / item["mask"])
        assert written.mode == "L"
        assert np.array_equal(np.asarray(written), mask * np.uint8(255))


def test_render_refuses_a_wrong_number_of_objects(cli, tmp_path):
    result = CliRunner().invoke(cli, ["tabletop", "render", "--n-objects", "9", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "'--n-objects': 9 is not in the range 1<=x<=4" in result.output
    assert not (tmp_path / "out").exists()


def test_the_backbone_is_registered():
    assert plugins.installed().component("backbone", "tabletop") is Tabletop
    assert Tabletop.Settings().model == OWN_MODEL


def test_models_that_were_never_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_MODELS", tmp_path)
    with pytest.raises(InputError, match=r"backbone.model = 'icekit-tabletop': .*stable-diffusion is missing"):
        Tabletop(Tabletop.Settings(), "cpu")


def test_presets_suit_the_package():
    """Every line is a setting of an installed component, and what they say of the world is true of it."""
    found = plugins.installed()
    for name in ("tabletop", "tabletop-bench", "published-tabletop"):
        found.check_preset(name)
    retrievers = found.preset("tabletop").values["retriever"]
    for retriever in ("clip", "splice"):
        assert retrievers[retriever]["vocabulary"] == list(SHAPES)
        assert retrievers[retriever]["top"] == len(SHAPES)
    folders = {value for key, value in flatten(found.preset("tabletop").values).items() if key.endswith("model")}
    assert {package_path(folder, "a") for folder in folders} == {str(weights._MODELS / "open-clip")}


def test_every_component_of_the_model_has_what_suits_it():
    """What holds for all learners is written once for each; none may be forgotten."""
    found = plugins.installed()
    values = found.preset("tabletop").values
    for name, learner in found.offered("learner").items():
        for key, value in {"max_batch": 16, "timestep_range": [0.35, 0.85], "by_area": True}.items():
            if learner.origin.distribution in ("icekit", "icekit-neighbours") and key in learner.settings.model_fields:
                assert values["learner"][name][key] == value, (name, key)


def test_the_presets_are_below_what_is_given():
    found = plugins.installed()
    given = load_settings(None, ["components.backbone=tabletop", "segmentor.draws=2", "samples=1"])
    full = found.resolve(given)
    assert (full.segmentor["draws"], full.segmentor["threshold"]) == (2, 0.55)
    assert (full.backbone["guidance_scale"], full.guidance_scale, full.naming) == (4.0, None, "described")
    assert found.resolve(load_settings()).segmentor["threshold"] != 0.55  # it is this backbone's
    bench = found.resolve(load_settings(), dataset="tabletop")
    assert (bench.components.backbone, bench.sample_steps, bench.segmentor["threshold"]) == ("tabletop", 12, 0.55)


class TestOwnModel:
    """The model that comes with the package."""

    @pytest.fixture(scope="class")
    def backbone(self) -> Tabletop:
        return Tabletop(Tabletop.Settings(), "cpu")

    def test_facts(self, backbone):
        assert backbone.image_size == (64, 64)
        assert backbone.latent_shape == (4, 16, 16)
        assert backbone.word_grids == backbone.pixel_grids == ((16, 16), (8, 8))
        assert backbone.knows("cup")
        assert backbone.knows("Red")
        assert not backbone.knows("griffin")

    def test_every_known_word_is_one_token(self, backbone):
        for word in ("cup", "metal", "colour", "checkered"):
            assert [len(found) for found in backbone.token_positions(f"a {word} thing", [word])] == [1]

    def test_it_draws(self, backbone):
        image = backbone.generate(["a red rubber ball on a table"], seeds=[0], steps=4)[0]
        assert image.size == (64, 64)

    def test_attention(self, backbone):
        with torch.no_grad():
            encoded = backbone.encode_prompts(["a cup", "a red metal cup"])
            look = Look(words=(8,), pixels=(16,))
            attention = backbone.predict(torch.zeros(2, 4, 16, 16), torch.tensor([0.15, 0.15]), encoded, look).attention
        [words], [pixels] = attention.words, attention.pixels
        assert (words.shape, pixels.shape) == ((2, 6, 8, 8), (2, 16, 16, 16, 16))  # start, four words at most, end
        torch.testing.assert_close(words.sum(1), torch.ones(2, 8, 8))
        assert words[0, 3:].max() < 1e-6  # the end, and what follows it
        assert words[1, 5].max() < 1e-6

    def test_all_that_is_encoded_is_attended_to_if_so_wished(self):
        backbone = Tabletop(Tabletop.Settings(words_only=False), "cpu")
        assert backbone.encode_prompts(["a cup"]).parts.keys() == {"sequence"}

    def test_the_maps_of_a_run_lie_on_the_object(self, backbone):
        shares = []
        for seed in range(6):
            scene = render_scene(4_000_000_000 + seed, n_objects=2, size=64, split="held-out")
            spec, mask = scene.objects[0], torch.from_numpy(scene.masks[0]).float()
            words = {"category": spec.shape, "instance": spec.colour, "material": spec.material}
            names = {part: f"<{part}>" for part in words}
            tokens = {names[part]: backbone.word_rows(word) for part, word in words.items()}
            maps = attention_maps(backbone, to_tensor(scene.image), names, tokens, torch.Generator().manual_seed(seed))
            assert {part: tuple(weights.shape) for part, weights in maps.items()} == dict.fromkeys(words, (16, 16))
            covered = nn.functional.adaptive_avg_pool2d(mask[None], 16)[0]
            inside = [float((weights * covered).sum() / weights.sum()) for weights in maps.values()]
            shares.append(np.mean(inside) / float(mask.mean()))
        assert np.mean(shares) > 4  # times as much as if it were spread evenly


def test_the_published_method_with_the_models_own_numbers():
    """The preset lies above the model's own, changes four numbers of ``published``, and finds objects."""
    found = plugins.installed()
    backbone = Tabletop(Tabletop.Settings(), "cpu")

    def settings(preset):
        return found.resolve(load_settings(None, [f"preset={preset}"], {"components": {"backbone": "tabletop"}}))

    published, own = settings("published"), settings("published-tabletop")
    theirs, ours = flatten(published.model_dump()), flatten(own.model_dump())
    changed = {key for key in theirs if theirs[key] != ours[key]} - {"preset"}
    numbers = {"retriever.l1_penalty", "segmentor.kl_threshold", "segmentor.prompt", "segmentor.word_grids"}
    assert changed == numbers
    assert published.segmentor["kl_threshold"] == 1.1  # a preset wins over the model's own
    assert own.retriever["rerank_model"].startswith("package:")  # what it does not say is the model's
    scenes = [render_scene(seed, n_objects=1) for seed in range(6)]
    seen = {}
    for chosen in (published, own):
        parts = [build_component(found, chosen, role, backbone) for role in ("retriever", "segmentor")]
        seen[chosen.preset] = 0
        for scene in scenes:
            located = locate(to_tensor(scene.image), *parts, chosen)
            masks = [region.mask for region in located.regions]
            [(_, iou)] = match_masks([torch.from_numpy(scene.masks[0])], masks)
            seen[chosen.preset] += iou > 0.5
    assert seen["published"] == 0  # all of a picture's attention is within 1.1 nats: one segment
    assert seen["published-tabletop"] >= 4
