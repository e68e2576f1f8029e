"""DiffSeg's formulas by hand, and the whole of it on attention whose segments are known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted_attention import BALL, CUP, WIDE, PlantedBackbone, generator, iou, scene, without_attention
from scipy.stats import entropy
from sklearn.cluster import KMeans
from torch import Tensor

from icekit.attention import aggregate, flat, upsample
from icekit.builtin.segmentors.diffseg import (
    DiffSegSegmentor,
    anchor_cells,
    k_means,
    merge_maps,
    name_segments,
    share_of,
    symmetric_kl,
)
from icekit.protocols import InputError, Segmentation, View


def build(backbone: Any = None, **settings: Any) -> tuple[DiffSegSegmentor, PlantedBackbone]:
    backbone = backbone or PlantedBackbone({"cup": CUP, "ball": BALL})
    values = {"prompt": "{word} cup ball background"} | settings  # a segment that none of the words means goes astray
    return DiffSegSegmentor(DiffSegSegmentor.Settings.model_validate(values), backbone), backbone


def distributions(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def some(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.rand(count, length, generator=generator(seed)).softmax(dim=1)


def pixels(maps: Tensor, height: int, width: int) -> Tensor:
    """Rows of ``[n, n]`` as what the places of a grid look at."""
    return maps.view(height, width, height, width)


def test_symmetric_kl_by_hand() -> None:
    # KL(p || q) = 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75), KL(q || p) = 0.25 ln(0.25 / 0.5) + 0.75 ln(0.75 / 0.5):
    # their sum is 0.25 ln 3, half of it 0.13733.
    found = symmetric_kl(distributions([0.5, 0.5]), distributions([0.25, 0.75], [0.5, 0.5]))
    assert found.tolist() == [[pytest.approx(math.log(3) / 8), pytest.approx(0, abs=1e-6)]]


def test_symmetric_kl_is_scipys() -> None:
    one, other = some(3, 20), some(4, 20, seed=1)
    found = symmetric_kl(one, other)
    for i, p in enumerate(one.numpy()):
        for j, q in enumerate(other.numpy()):
            assert float(found[i, j]) == pytest.approx((entropy(p, q) + entropy(q, p)) / 2, abs=1e-5)


def test_symmetric_kl_of_what_does_not_overlap_is_large_and_finite() -> None:
    far = symmetric_kl(distributions([1.0, 0.0]), distributions([0.0, 1.0]))
    assert far.isfinite().all() and far.item() > 10


def test_one_grid_is_left_as_it_is() -> None:
    for height, width in ((4, 4), (2, 8)):
        maps = pixels(some(16, 16), height, width)
        assert torch.allclose(aggregate([maps]), maps)


def test_grids_are_weighted_by_their_sides() -> None:
    fine = torch.eye(4)  # every cell of the 2 x 2 grid looks at itself, the one cell of the coarse grid everywhere
    found = aggregate([pixels(fine, 2, 2), torch.ones(1, 1, 1, 1)])
    assert torch.allclose(flat(found), 2 / 3 * torch.eye(4) + 1 / 3 * torch.full((4, 4), 1 / 4))


def test_grids_that_are_no_squares_are_brought_together() -> None:
    """Two halves of a picture of 2 x 4 cells that look at themselves; the coarse grid of 1 x 2 says the same."""
    left = (torch.arange(8) % 4 < 2).float()
    own = (left[:, None] == left).float() / 4
    found = aggregate([pixels(own, 2, 4), torch.eye(2).view(1, 2, 1, 2)])
    expected = flat(aggregate([torch.eye(2).view(1, 2, 1, 2), pixels(torch.full((8, 8), 1 / 8), 2, 4)])) - 2 / 3 / 8
    assert torch.allclose(flat(found), 2 / 3 * own + expected)
    assert torch.allclose(flat(found).sum(dim=1), torch.ones(8))
    assert (flat(found)[0] > flat(found)[3]).tolist() == (left == 1).tolist()


def test_a_coarse_query_stands_for_the_cells_it_covers() -> None:
    coarse = torch.eye(4)
    found = flat(aggregate([pixels(torch.full((16, 16), 1 / 16), 4, 4), pixels(coarse, 2, 2)])) - 4 / 6 / 16
    keys = upsample(coarse.unflatten(1, (2, 2)), (4, 4)).flatten(1)
    for cell, query in ((0, 0), (1, 0), (5, 0), (3, 1), (12, 2), (10, 3)):
        assert torch.allclose(found[cell], 2 / 6 * keys[query] / keys[query].sum())
    both = aggregate([pixels(some(16, 16), 4, 4), pixels(some(4, 4), 2, 2)])
    assert torch.allclose(flat(both).sum(dim=1), torch.ones(16))


def test_anchors_are_spread_evenly_and_never_more_than_there_are_cells() -> None:
    assert anchor_cells((4, 4), 2).tolist() == [0, 2, 8, 10]
    assert anchor_cells((3, 3), 1).tolist() == [4]
    assert anchor_cells((3, 3), 16).tolist() == list(range(9))
    assert anchor_cells((2, 6), 1).tolist() == [0, 2, 4]  # three times as long: three times as many
    assert anchor_cells((6, 2), 1).tolist() == [0, 4, 8]
    assert anchor_cells((2, 3), 16).tolist() == list(range(6))
    published = anchor_cells((64, 64), 16)  # rows and columns 1, 5, ..., 61
    assert len(published) == 256
    assert (published % 64).unique().tolist() == (published // 64).unique().tolist() == list(range(1, 64, 4))


def test_merging_by_hand() -> None:
    maps = distributions([0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8])
    near = float(symmetric_kl(maps[:1], maps[1:2]))
    assert near == pytest.approx(0.1 * math.log(9 / 4) / 2)
    # Below the distance of the nearest two nothing is merged, above it each pair is, above all of them everything.
    anchors = torch.arange(4)
    assert torch.allclose(merge_maps(maps, anchors, near * 0.9, 3), maps)
    assert torch.allclose(merge_maps(maps, anchors, near * 1.1, 3), distributions([0.85, 0.15], [0.15, 0.85]))
    assert torch.allclose(merge_maps(maps, anchors, 5.0, 3), distributions([0.5, 0.5]))


@pytest.mark.parametrize(("rejoin", "last"), [(False, 0.52), (True, 0.61)])
def test_a_map_that_was_taken_joins_later_means_if_it_may(rejoin: bool, last: float) -> None:
    """Nine maps (0.9, 0.1), one (0.7, 0.3), nine (0.5, 0.5); an anchor of each kind. D(p, q) of such pairs is
    (p - q) (logit p - logit q) / 2: 0.135 of the first two kinds, 0.085 of the last two, 0.439 of first and last.

    Round one leaves 0.88 = (9 * 0.9 + 0.7) / 10, 0.7 and 0.52. In round two 0.88 takes 0.7 (D = 0.103): 0.79. Then 0.52
    is left, 0.7 is near to it (0.069), 0.88 is not (0.344).
    """
    kinds = distributions([0.9, 0.1], [0.7, 0.3], [0.5, 0.5])
    maps, anchors = kinds.repeat_interleave(torch.tensor([9, 1, 9]), dim=0), torch.tensor([0, 9, 10])
    assert torch.allclose(merge_maps(maps, anchors, 0.14, 1)[:, 0], torch.tensor([0.88, 0.7, 0.52]))
    found = merge_maps(maps, anchors, 0.14, 2, rejoin)
    assert torch.allclose(found, distributions([0.79, 0.21], [last, 1 - last]))


def test_the_first_round_averages_around_each_anchor_alone() -> None:
    maps = distributions([0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8])
    found = merge_maps(maps, torch.tensor([0, 1, 2]), 0.1, 1)
    assert torch.allclose(found, distributions([0.85, 0.15], [0.85, 0.15], [0.15, 0.85]))


def test_no_threshold_leaves_an_anchor_without_a_map() -> None:
    maps = some(9, 9)
    assert torch.allclose(merge_maps(maps, torch.arange(9), 1e-30, 3), maps)


def test_k_means_moves_a_map_to_the_mean_it_is_nearest_to() -> None:
    maps = distributions([0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9])
    begun = distributions([0.9, 0.1], [0.45, 0.55])
    assert torch.equal(k_means(maps, begun, 0), begun)
    assert torch.allclose(k_means(maps, begun, 10), distributions([0.8, 0.2], [0.15, 0.85]))


def test_k_means_never_grows_its_objective_and_drops_empty_means() -> None:
    maps = some(40, 8)
    means = torch.cat([maps[:5], torch.tensor([[1 - 7e-9, *[1e-9] * 7]])])

    def objective(centres: Tensor) -> float:
        return sum(min(float(entropy(p, q)) for q in centres.numpy()) for p in maps.numpy())

    values = [objective(k_means(maps, means, rounds)) for rounds in range(6)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(values))
    assert values[-1] < values[0]
    assert len(k_means(maps, means, 6)) == 5


def test_euclidean_k_means_is_scikit_learns() -> None:
    maps = some(60, 12)
    means = maps[[3, 17, 40, 55]]
    found = k_means(maps, means, 300, "euclidean")
    other = KMeans(4, init=means.double().numpy(), n_init=1, tol=0, algorithm="lloyd").fit(maps.double().numpy())
    assert torch.allclose(found.double(), torch.from_numpy(other.cluster_centers_), atol=1e-6)


def test_the_two_distances_of_k_means_differ() -> None:
    """A map p = (0.2, 0.8) between q = (0.01, 0.99) and r = (0.45, 0.55): 0.19 and 0.25 from them along each axis, but
    KL(p || q) = 0.2 ln 20 + 0.8 ln(0.8 / 0.99) = 0.43 and KL(p || r) = 0.2 ln(0.2 / 0.45) + 0.8 ln(0.8 / 0.55) = 0.14.
    """
    means = distributions([0.01, 0.99], [0.45, 0.55])
    maps = torch.cat([means, distributions([0.2, 0.8])])
    assert torch.allclose(k_means(maps, means, 1, "euclidean"), distributions([0.105, 0.895], [0.45, 0.55]))
    assert torch.allclose(k_means(maps, means, 1, "kl"), distributions([0.01, 0.99], [0.325, 0.675]))


def test_a_segment_is_the_words_that_looks_at_it_most_on_average() -> None:
    segments = torch.tensor([0, 0, 0, 1, 1, 2])
    cross = torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.5, 1.0], [0.4, 0.4, 0.4, 0.1, 0.1, 0.0]])
    everywhere = torch.ones(6, dtype=torch.bool)
    assert name_segments(segments, cross, everywhere) == {0: 1, 1: 0, 2: 0}  # 0: 0.3 < 0.4, whatever the largest
    assert name_segments(segments, cross, torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)) == {0: 0, 1: 0}


def test_the_share_is_above_one_half_where_the_argmax_is_own() -> None:
    proposals = torch.rand(5, 9, 9, generator=generator())
    own = torch.tensor([True, False, True, False, False])
    share = share_of(proposals, own)
    assert torch.equal(share > 0.5, own[proposals.argmax(dim=0)])
    assert float(share_of(torch.tensor([[[0.3]], [[0.1]]]), torch.tensor([True, False]))) == pytest.approx(0.75)
    assert not share_of(proposals, torch.zeros(5, dtype=torch.bool)).any()
    assert (share_of(proposals, torch.ones(5, dtype=torch.bool)) == 1).all()


def test_the_planted_segments_are_found() -> None:
    segmentor, backbone = build()
    maps = aggregate([backbone.pixels(grid) for grid in ((16, 16), (8, 8))])
    segments = segmentor._proposals(maps).argmax(dim=0)
    assert len(segments.unique()) == 3
    for mask in (CUP, BALL):
        inside = F.interpolate(mask.float()[None, None], size=(16, 16), mode="area")[0, 0] == 1
        assert len(segments[inside].unique()) == 1


@pytest.mark.parametrize("refinement", [False, True])
@pytest.mark.parametrize(("word", "mask"), [("cup", CUP), ("ball", BALL)])
def test_the_planted_mask_is_found(word: str, mask: Tensor, refinement: bool) -> None:
    segmentor, backbone = build(refinement=refinement)
    found = segmentor.segment(scene(), word, generator())
    assert found.dtype == torch.bool and found.shape == (64, 64)
    assert iou(found, mask) > (0.75 if refinement else 0.6)
    assert backbone.shares == [0.15] * 4


@pytest.mark.parametrize("word", ["cup", "ball"])
def test_a_picture_that_is_no_square(word: str) -> None:
    for objects in (WIDE, {name: mask.T.contiguous() for name, mask in WIDE.items()}):
        view = scene(objects["cup"], objects["ball"])
        for refinement in (False, True):
            segmentor, _ = build(PlantedBackbone(objects), refinement=refinement)
            found = segmentor.segment(view, word, generator())
            assert found.shape == view.visible.shape == objects[word].shape
            assert iou(found, objects[word]) > 0.7


def test_a_word_that_wins_no_segment_is_not_there() -> None:
    segmentor, backbone = build()
    backbone.unseen = {"spoon"}
    assert not segmentor.segment(scene(), "spoon", generator()).any()


def test_what_goes_with_a_word_is_erased_with_it() -> None:
    """The background's segments, and the cup's though nothing of it became its mask; not the ball's."""
    everything = torch.ones(64, 64, dtype=torch.bool)
    plain = build(refinement=False, min_island=0)[0].segment(scene(), "cup", generator())
    found = build(refinement=False, min_island=0, erase_with="background")[0].segment(scene(), "cup", generator())
    assert isinstance(plain, Tensor) and isinstance(found, Segmentation)
    assert torch.equal(found.mask, plain)
    assert (found.mask & ~found.erased).sum() == 0
    assert iou(found.erased, everything & ~BALL) > 0.9
    segmentor, backbone = build(erase_with=["Background"])
    backbone.unseen = {"spoon"}
    lost = segmentor.segment(scene(), "spoon", generator())
    assert isinstance(lost, Segmentation) and not lost.mask.any()
    assert iou(lost.erased, everything & ~BALL & ~CUP) > 0.8
    hidden = View(scene().original, scene().pixels, ~everything)
    assert not segmentor.segment(hidden, "cup", generator()).erased.any()  # type: ignore[union-attr]


def test_nothing_is_found_where_it_was_erased() -> None:
    segmentor, _ = build()
    view = scene()
    assert not (segmentor.segment(View(view.original, view.pixels, ~CUP), "cup", generator()) & CUP).any()
    hidden = View(view.original, view.pixels, torch.zeros(64, 64, dtype=torch.bool))
    assert not segmentor.segment(hidden, "cup", generator()).any()


def test_several_segments_or_one_piece() -> None:
    small = torch.zeros(64, 64, dtype=torch.bool)
    small[40:52, 4:16] = True
    both = CUP | small
    for one_piece, expected in ((False, both), (True, CUP)):
        segmentor, backbone = build(one_piece=one_piece, min_island=0, refinement=False)
        backbone.objects["cup"] = both
        assert iou(segmentor.segment(scene(), "cup", generator()), expected) > 0.6


def test_the_same_seed_gives_the_same_mask() -> None:
    masks = [build()[0].segment(scene(), "cup", generator(3)) for _ in range(2)]
    assert torch.equal(*masks)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(InputError, match=r"tells which places look at one another, and this backbone's does not"):
        build(without_attention(pixel_grids=()))
    with pytest.raises(
        ValueError, match=r"erase_with = 'wall', prompt must have this word, and it is '\{word\} things'"
    ):
        build(prompt="{word} things", erase_with="wall")
    for wrong in (
        {"prompt": "things"},
        {"kmeans_distance": "cosine"},
        {"kl_threshold": 0},
        {"anchors": 0},
        {"rounds": 0},
        {"kmeans": -1},
        {"pixel_grids": []},
        {"pixel_grids": [64, 0]},
    ):
        with pytest.raises(ValueError):
            build(**wrong)
