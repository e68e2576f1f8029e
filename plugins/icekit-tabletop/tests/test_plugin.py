"""What icekit-tabletop gives icekit."""

from __future__ import annotations

import json

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from icekit_tabletop import plugin, render_scene, weights
from icekit_tabletop.backbone import OWN_MODEL, Tabletop
from PIL import Image
from torch import nn

from icekit.bench.matching import match_masks
from icekit.pixels import to_tensor
from icekit.protocols import InputError
from icekit.run.directory import Located
from icekit.run.orchestrator import attention_maps, build_component, localise
from icekit.settings import flatten, load_settings


@pytest.fixture
def cli() -> click.Group:
    group = click.Group("icekit")
    plugin.register_commands(group)
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
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "a scene holds 1 to 4 objects, not 9"
    assert not (tmp_path / "out").exists()


def test_the_backbone_is_registered():
    offered = {}
    plugin.register_backbones(offered.__setitem__)
    assert offered == {"tabletop": Tabletop}
    assert Tabletop.Settings().model == OWN_MODEL


def test_models_that_were_never_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_MODELS", tmp_path)
    with pytest.raises(InputError, match=r"backbone.model = 'icekit-tabletop': .*stable-diffusion is missing"):
        Tabletop(Tabletop.Settings(), "cpu")


needs_model = pytest.mark.skipif(
    not (weights._MODELS / "stable-diffusion").is_dir(), reason="the package's model has not been trained"
)


@needs_model
class TestOwnModel:
    """The model that comes with the package."""

    @pytest.fixture(scope="class")
    def backbone(self) -> Tabletop:
        return Tabletop(Tabletop.Settings(), "cpu")

    def test_facts(self, backbone):
        assert backbone.image_size == 64
        assert backbone.latent_shape == (4, 16, 16)
        assert backbone.attention_resolutions == (16, 8)
        assert backbone.knows("cup")
        assert backbone.knows("Red")
        assert not backbone.knows("griffin")
        assert backbone.suggestions["retriever.model"].startswith("local-dir:")
        assert "cup" in backbone.suggestions["retriever.vocabulary"]

    def test_every_known_word_is_one_token(self, backbone):
        for word in ("cup", "metal", "colour", "checkered"):
            assert [len(found) for found in backbone.token_positions(f"a {word} thing", [word])] == [1]

    def test_it_draws(self, backbone):
        image = backbone.generate(["a red rubber ball on a table"], seeds=[0], steps=4)[0]
        assert image.size == (64, 64)

    def test_attention(self, backbone):
        with backbone.capture_attention(cross=[16, 8], self_=[16]) as maps, torch.no_grad():
            backbone.predict(torch.zeros(1, 4, 16, 16), torch.tensor([150]), backbone.encode_prompts(["a cup"]))
        torch.testing.assert_close(maps.cross(8).sum(1), torch.ones(1, 8, 8))

    def test_the_maps_of_a_run_lie_on_the_object(self, backbone):
        shares = []
        for seed in range(6):
            scene = render_scene(4_000_000_000 + seed, n_objects=2, size=64, split="held-out")
            spec, mask = scene.objects[0], torch.from_numpy(scene.masks[0]).float()
            words = {"category": spec.shape, "instance": spec.colour, "material": spec.material}
            tokens = {part: f"<{part}>" for part in words}
            backbone.set_tokens({tokens[part]: backbone.word_embedding(word) for part, word in words.items()})
            image = torch.from_numpy(np.array(scene.image)).permute(2, 0, 1) / 255
            maps = attention_maps(backbone, image, tokens, torch.Generator().manual_seed(seed))
            assert {part: tuple(weights.shape) for part, weights in maps.items()} == dict.fromkeys(words, (16, 16))
            covered = nn.functional.adaptive_avg_pool2d(mask[None], 16)[0]
            inside = [float((weights * covered).sum() / weights.sum()) for weights in maps.values()]
            shares.append(np.mean(inside) / float(mask.mean()))
        assert np.mean(shares) > 4  # times as much as if it were spread evenly


def test_the_published_method_with_the_models_own_numbers():
    """The preset lies above the model's suggestions, changes four numbers of ``published``, and finds objects."""
    from icekit import plugins

    found = plugins.installed()
    backbone = Tabletop(Tabletop.Settings(), "cpu")

    def settings(preset):
        given = load_settings(None, [f"preset={preset}"], {"components": {"backbone": "tabletop"}})
        return found.resolve(given, backbone.suggestions)

    published, own = settings("published"), settings("published-tabletop")
    theirs, ours = flatten(published.model_dump()), flatten(own.model_dump())
    changed = {key for key in theirs if theirs[key] != ours[key]} - {"preset"}
    numbers = {"retriever.l1_penalty", "segmentor.kl_threshold", "segmentor.prompt", "segmentor.cross_resolutions"}
    assert changed == numbers
    assert published.segmentor["kl_threshold"] == 1.1  # a preset wins over what a model suggests
    assert own.retriever["rerank_model"].startswith("local-dir:")  # what it does not say is the model's
    scenes = [render_scene(seed, n_objects=1) for seed in range(6)]
    seen = {}
    for chosen in (published, own):
        parts = [build_component(found, chosen, role, backbone) for role in ("retriever", "segmentor")]
        seen[chosen.preset] = 0
        for scene in scenes:
            *_, located = localise(to_tensor(scene.image), *parts, chosen, Located())
            masks = [region.mask for region in located.regions]
            [(_, iou)] = match_masks([torch.from_numpy(scene.masks[0])], masks)
            seen[chosen.preset] += iou > 0.5
    assert seen["published"] == 0  # all of a picture's attention is within 1.1 nats: one segment
    assert seen["published-tabletop"] >= 4
