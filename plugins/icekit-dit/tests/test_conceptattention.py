"""ConceptAttention: the picture does not notice, the maps by hand, the segmentor, and who cannot have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from icekit_dit.attention import Capture
from icekit_dit.conceptattention import ConceptAttentionSegmentor
from icekit_dit.concepts import ConceptTransformerBackbone, shares_of_concepts
from icekit_dit.flux import Flux
from icekit_dit.sd3 import StableDiffusion3

from icekit import Settings
from icekit.plugins import installed
from icekit.protocols import ConceptBackbone, InputError
from icekit.testing import SegmentorUnderTest, checks_of
from icekit.testing.scenes import two_objects
from icekit.testing.subjects import kit_backbone

CONCEPTS = ["cup", "table", "background"]


@pytest.fixture(scope="module", params=["sd3", "sd3_without_t5", "flux"])
def backbone(request: pytest.FixtureRequest) -> ConceptTransformerBackbone:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    kind: Any = Flux if request.param == "flux" else StableDiffusion3
    return kind(kind.Settings(model=str(folder), steps=2, image_size=(48, 64)), "cpu")


def asked(backbone: ConceptTransformerBackbone, count: int = 1) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Noisy latents, their shares, and prompts."""
    noisy = torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    return noisy, torch.linspace(0.2, 0.8, count), backbone.encode_prompts(["a photo of a cup"] * count)


def test_shares_by_hand() -> None:
    """Two concepts and two places: what comes out at a place is like one concept, and like neither."""
    concepts, places = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])
    e2 = torch.tensor(2.0).exp()
    expected = torch.stack([torch.stack([e2 / (e2 + 1), 1 / (e2 + 1)]), torch.tensor([0.5, 0.5])], dim=-1)[None]
    torch.testing.assert_close(shares_of_concepts(concepts, places), expected)


def test_the_picture_does_not_notice(backbone: ConceptTransformerBackbone) -> None:
    """The prediction with concepts at its side is the same, bit for bit; nothing is left behind."""
    assert isinstance(backbone, ConceptBackbone) and not isinstance(kit_backbone(), ConceptBackbone)
    noisy, at, prompts = asked(backbone)
    with torch.no_grad():
        plain = backbone.predict(noisy, at, prompts).output
        states = backbone._concept_states(CONCEPTS, {})
        embedded = backbone.transformer.context_embedder(states)[None]
        with backbone._reading(embedded) as maps:
            beside = backbone.predict(noisy, at, prompts).output
        assert len(maps) == 1 and torch.equal(beside, plain)
        assert torch.equal(backbone.predict(noisy, at, prompts).output, plain)
    assert not any(module._forward_hooks for module in backbone.transformer.modules())


def test_the_prompt_itself_as_concepts(backbone: ConceptTransformerBackbone) -> None:
    """The text attends to itself and the picture. So concepts that are the text become what the text becomes."""
    noisy, at, prompts = asked(backbone)
    capture = Capture(outputs=True)
    with torch.no_grad():
        with backbone._capturing_outputs(capture):
            backbone.predict(noisy, at, prompts)
        embedded = backbone.transformer.context_embedder(prompts.parts["sequence"])
        with backbone._reading(embedded) as maps:
            backbone.predict(noisy, at, prompts)
    of_text, of_places = capture.outputs[1]  # the second of two blocks
    torch.testing.assert_close(maps[0], shares_of_concepts(of_text, of_places), atol=1e-5, rtol=1e-4)


def test_maps(backbone: ConceptTransformerBackbone) -> None:
    """One a concept, each place divided among them; each picture by itself; an extra token is a concept as well."""
    noisy, at, prompts = asked(backbone, 2)
    token = {"<cup-0>": backbone.word_rows("cup")}
    maps = backbone.concept_maps(noisy, at, prompts, ["<cup-0>", *CONCEPTS[1:]], token)
    assert maps.shape == (2, 3, 6, 8) and maps.dtype == torch.float32
    assert float(maps.min()) >= 0
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 6, 8))
    alone = backbone.concept_maps(noisy[1:], at[1:], prompts[[1]], CONCEPTS)
    torch.testing.assert_close(maps[1:], alone)
    assert not torch.allclose(maps[0], maps[1])
    with pytest.raises(InputError, match="unknown token <ball-0>"):
        backbone.concept_maps(noisy, at, prompts, ["<ball-0>"])
    with pytest.raises(InputError, match="no concept"):
        backbone.concept_maps(noisy, at, prompts, [])


@pytest.mark.parametrize("check", checks_of("segmentor"), ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Any], None], sd3_without_t5_folder: Path) -> None:
    settings = StableDiffusion3.Settings(model=str(sd3_without_t5_folder), steps=2, image_size=(48, 64))
    backbone = StableDiffusion3(settings, "cpu")
    check(SegmentorUnderTest(ConceptAttentionSegmentor, {"rivals": ("table", "wall")}, backbone=backbone))


def test_it_finds_where_the_word_wins(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted maps: the mask is where the word has more than its rivals, on the picture's own pixels."""
    backbone = Flux(Flux.Settings(model=str(flux_folder), steps=2, image_size=(48, 64)), "cpu")
    scene = two_objects((48, 64))
    view = scene.view()
    asked_for: list[list[str]] = []

    def planted(noisy: Any, shares: Any, prompts: Any, concepts: list[str], tokens: Any = None) -> torch.Tensor:
        asked_for.append(concepts)
        maps = torch.full((1, len(concepts), 6, 8), 0.1)
        maps[:, 0, 2:4, 1:4] = 0.7
        return maps

    monkeypatch.setattr(backbone, "concept_maps", planted)
    settings = ConceptAttentionSegmentor.Settings(refinement=False, rivals=("Cup", "table"), draws=2)
    mask = ConceptAttentionSegmentor(settings, backbone).segment(view, "cup", torch.Generator())
    assert isinstance(mask, torch.Tensor)
    assert mask[18:30, 10:30].all() and not mask[:12].any() and not mask[:, 40:].any()
    assert asked_for == [["cup", "table"]] * 2  # the word is no rival of itself


def test_a_unet_is_refused_before_it_is_loaded() -> None:
    given = Settings.model_validate({"components": {"backbone": "sd21", "segmentor": "conceptattention"}})
    with pytest.raises(InputError) as error:
        installed().resolve(given)
    assert "segmentor 'conceptattention' needs concepts (maps of concepts by what attention gives out)" in str(
        error.value
    )
    assert "which backbone 'sd21' does not have: choose " in str(error.value) and "xattn" in str(error.value)
    installed().resolve(Settings.model_validate({"components": {"backbone": "sd3", "segmentor": "conceptattention"}}))
    with pytest.raises(InputError, match="needs a model that tells where concepts are"):
        ConceptAttentionSegmentor(ConceptAttentionSegmentor.Settings(), kit_backbone())


@pytest.mark.parametrize("wrong", [{"rivals": ()}, {"rivals": ("",)}, {"threshold": 2.0}, {"prompt": "a cup"}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ConceptAttentionSegmentor.Settings(**wrong)
