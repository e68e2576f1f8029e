"""The segmentor's formulas by hand, and the whole of it on attention that is planted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.builtin.xattn import (
    CrossAttentionSegmentor,
    compete,
    heaviest_part,
    normalise_over_space,
    otsu,
    propagate,
    upsample,
)
from icekit.protocols import InputError, View

ALL = torch.ones(4, dtype=torch.bool)


class PlantedBackbone:
    """A backbone whose attention is planted: word ``i`` of the vocabulary looks at ``objects[i]``, ``[S, S]``.

    Each pixel attends to all pixels of its own object. Cross-attention sees but the upper half of an object.
    """

    image_size, latent_shape, num_timesteps = 64, (4, 16, 16), 1000
    device = torch.device("cpu")
    attention_resolutions = (16, 8)

    def __init__(self, objects: dict[str, Tensor]) -> None:
        self.objects, self.timesteps, self.noises, self.seen = objects, [], [], []  # type: ignore[var-annotated]
        self._prompt: list[str] = []

    def token_positions(self, prompt: str, words: Sequence[str]) -> list[list[int]]:
        parts = prompt.split()
        return [[1 + parts.index(piece) for piece in word.split()] for word in words]

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        self._prompt = prompts[0].split()
        return SimpleNamespace()

    def encode_images(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return torch.zeros(len(images), *self.latent_shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.timesteps.append(int(timesteps))
        self.noises.append(noise)
        return latents + noise

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        return noisy

    @contextlib.contextmanager
    def capture_attention(self, cross: Any = (), self_: Any = (), places: Any = ()) -> Iterator[Any]:
        yield SimpleNamespace(cross=self.cross, self_=self.self_attention)

    def coarse(self, mask: Tensor, resolution: int) -> Tensor:
        return F.interpolate(mask.float()[None, None], size=(resolution, resolution), mode="area")[0, 0]

    def cross(self, resolution: int) -> Tensor:
        maps = [torch.full((resolution, resolution), 0.1)]
        for word in self._prompt:
            if word in self.objects:
                seen = self.objects[word].clone()
                rows = seen.any(dim=1).nonzero()[:, 0]
                seen[int(rows.float().mean()) :] = False
                maps.append(0.1 + self.coarse(seen, resolution))
            else:
                rest = ~torch.stack(list(self.objects.values())).any(dim=0)
                maps.append(0.1 + 0.3 * self.coarse(rest, resolution))
        stacked = torch.stack(maps)
        return (stacked / stacked.sum(dim=0))[None]

    def self_attention(self, resolution: int) -> Tensor:
        objects = list(self.objects.values())
        owners = [self.coarse(mask, resolution).flatten() for mask in objects]
        rest = (1 - torch.stack(owners).sum(dim=0)).clamp(0, 1)
        affinity = sum(owner[:, None] * owner for owner in [*owners, rest]) + 1e-6
        return (affinity / affinity.sum(dim=1, keepdim=True))[None]


def square(top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


CUP, BALL = square(10, 6, 20), square(34, 37, 22)


def scene() -> View:
    picture = torch.full((3, 64, 64), 0.5)
    picture[:, CUP] = torch.tensor([0.8, 0.1, 0.1])[:, None]
    picture[:, BALL] = torch.tensor([0.1, 0.2, 0.8])[:, None]
    return View(picture, picture, torch.ones(64, 64, dtype=torch.bool))


def build(**settings: Any) -> tuple[CrossAttentionSegmentor, PlantedBackbone]:
    backbone: Any = PlantedBackbone({"cup": CUP, "ball": BALL})
    return CrossAttentionSegmentor(CrossAttentionSegmentor.Settings.model_validate(settings), backbone), backbone


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_propagation_by_hand() -> None:
    attention = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    cross = torch.tensor([[1.0, 3.0]])
    assert torch.equal(propagate(cross, attention, 0), cross)
    assert torch.allclose(propagate(cross, attention, 1), torch.tensor([[2.0, 3.0]]))
    assert torch.allclose(propagate(cross, attention, 2), torch.tensor([[2.5, 3.0]]))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max", [0.25, 0.5, 1.0, 0.0]),
        ("minmax", [0.0, 1 / 3, 1.0, 0.0]),
        ("l2", [1 / 21**0.5, 2 / 21**0.5, 4 / 21**0.5, 0.0]),
    ],
)
def test_normalisation_by_hand(how: Any, expected: list[float]) -> None:
    visible = torch.tensor([True, True, True, False])
    found = normalise_over_space(torch.tensor([[1.0, 2.0, 4.0, 9.0]]), how, visible)
    assert torch.allclose(found, torch.tensor([expected]))


@pytest.mark.parametrize("how", ["max", "minmax", "l2"])
def test_normalisation_has_no_zero_over_zero(how: Any) -> None:
    assert not normalise_over_space(torch.zeros(2, 4), how, ALL).any()
    assert not normalise_over_space(torch.ones(2, 4), how, ~ALL).any()
    if how == "minmax":
        assert not normalise_over_space(torch.ones(2, 4), how, ALL).any()


def test_competition_by_hand() -> None:
    maps = torch.tensor([[0.6, 0.2, 0.0], [0.2, 0.6, 0.0]])
    assert torch.allclose(compete(maps, "none", 1.0), maps[0])
    assert torch.allclose(compete(maps, "argmax", 1.0), torch.tensor([0.6, 0.0, 0.0]))
    assert torch.allclose(compete(maps, "ratio", 1.0), torch.tensor([0.45, 0.05, 0.0]))
    assert torch.allclose(compete(maps, "ratio", 0.5), torch.tensor([0.54, 0.02, 0.0]))
    share = 1 / (1 + torch.tensor(-0.4).exp())
    assert torch.allclose(
        compete(maps, "softmax", 1.0), torch.stack([0.6 * share, 0.2 * (1 - share), torch.tensor(0.0)])
    )
    assert torch.equal(compete(maps[:1], "ratio", 1.0), maps[0])


def test_upsampling_keeps_means_and_shapes() -> None:
    maps = torch.rand(2, 8, 8, generator=generator())
    assert upsample(maps, (8, 8)) is maps
    assert upsample(maps, (64, 64)).shape == (2, 64, 64)
    assert upsample(maps, (1, 1)).flatten() == pytest.approx(maps.mean(dim=(1, 2)), abs=0.05)


def test_otsu_separates_two_heights() -> None:
    soft = torch.full((8, 8), 0.1)
    soft[:4] = 0.9
    assert 0.1 <= otsu(soft, torch.ones(8, 8, dtype=torch.bool)) < 0.9


@pytest.mark.parametrize(("word", "mask"), [("cup", CUP), ("ball", BALL)])
def test_the_planted_mask_is_found(word: str, mask: Tensor) -> None:
    segmentor, _ = build()
    found = segmentor.segment(scene(), word, generator())
    assert found.dtype == torch.bool and found.shape == (64, 64)
    assert iou(found, mask) > 0.9


def test_propagation_completes_the_object() -> None:
    alone, _ = build(propagation=0, refinement=False)
    spread, _ = build(propagation=1, refinement=False)
    assert iou(alone.segment(scene(), "cup", generator()), CUP) < 0.5
    assert iou(spread.segment(scene(), "cup", generator()), CUP) > 0.6


@pytest.mark.parametrize("competition", ["ratio", "softmax", "argmax", "none"])
@pytest.mark.parametrize("normalisation", ["minmax", "max", "l2"])
def test_every_way_to_compare_finds_it(competition: str, normalisation: str) -> None:
    segmentor, _ = build(competition=competition, normalisation=normalisation, threshold="otsu")
    assert iou(segmentor.segment(scene(), "cup", generator()), CUP) > 0.85


def test_nothing_is_found_where_it_was_erased() -> None:
    segmentor, _ = build()
    view = scene()
    visible = ~CUP
    found = segmentor.segment(View(view.original, view.pixels, visible), "ball", generator())
    assert iou(found, BALL) > 0.9
    assert not (segmentor.segment(View(view.original, view.pixels, visible), "cup", generator()) & CUP).any()
    hidden = View(view.original, view.pixels, torch.zeros_like(visible))
    assert not segmentor.segment(hidden, "cup", generator()).any()


def test_what_it_looks_at_is_a_setting() -> None:
    view = scene()
    erased = View(view.original, torch.zeros_like(view.pixels), view.visible)
    for look_at, expected in (("image", erased.original), ("rest", erased.pixels)):
        segmentor, backbone = build(look_at=look_at)
        segmentor.segment(erased, "cup", generator())
        assert torch.equal(backbone.seen[0][0], expected)


def test_timesteps_and_draws() -> None:
    segmentor, backbone = build(timestep=[0.15, 1.0], draws=3)
    segmentor.segment(scene(), "cup", generator(1))
    assert backbone.timesteps == [150] * 3 + [999] * 3
    assert len({noise.sum().item() for noise in backbone.noises}) == 6
    again, other = build(timestep=[0.15, 1.0], draws=3)
    again.segment(scene(), "cup", generator(1))
    assert all(torch.equal(a, b) for a, b in zip(backbone.noises, other.noises, strict=True))


def test_a_word_that_is_its_own_rival() -> None:
    segmentor, backbone = build()
    backbone.objects["background"] = backbone.objects["ball"]
    assert segmentor.segment(scene(), "background", generator()).any()


def test_default_resolutions() -> None:
    backbone: Any = SimpleNamespace(attention_resolutions=(64, 32, 16, 8))
    segmentor = CrossAttentionSegmentor(CrossAttentionSegmentor.Settings(), backbone)
    assert segmentor._cross == (32, 16) and segmentor._self == 32
    backbone.attention_resolutions = (8, 4)
    segmentor = CrossAttentionSegmentor(CrossAttentionSegmentor.Settings(), backbone)
    assert segmentor._cross == (8,) and segmentor._self == 8


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(InputError, match=r"cross_resolutions: 12 is none of the backbone's grids: 16, 8"):
        build(cross_resolutions=12)
    with pytest.raises(InputError, match="self_resolution: 32"):
        build(self_resolution=32)
    for wrong in ({"prompt": "things"}, {"timestep": 150}, {"threshold": 1.5}, {"draws": 0}):
        with pytest.raises(ValueError):
            build(**wrong)


def test_heaviest_part_leaves_the_other_parts_out() -> None:
    soft = torch.tensor([[0.9, 0.0, 0.6, 0.6], [0.0, 0.1, 0.6, 0.0], [0.5, 0.5, 0.0, 0.0]])
    kept = heaviest_part(soft, 0.5)  # sums 0.9, 1.8 and 1.0
    assert (soft * kept).tolist() == torch.tensor(
        [[0.0, 0.0, 0.6, 0.6], [0.0, 0.1, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]
    ).tolist()
    assert heaviest_part(torch.zeros(3, 4), 0.5).all()
