"""The segmentor of ICE's published implementation: segments of like attention, each with a word of the prompt.

Places of one object look at the same places, so the maps of what they look at (a UNet's self-attention), read as
distributions over the image, lie close to one another. DiffSeg (Tian et al., "Diffuse, Attend, and Segment:
Unsupervised Zero-Shot Segmentation using Stable Diffusion", CVPR 2024) merges such maps into a few, without knowing
their number. Here a segment belongs to the word of the prompt that it looks at the most, and a word's mask is all of
its segments (ICE, Cendra and Han, CVPR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.attention import (
    AttentionSegmentor,
    aggregate,
    flat,
    normalise_over_space,
    on_grid,
    upsample,
)
from icekit.builtin.segmentors.settings import DiffSegSettings, Distance
from icekit.protocols import Grid, Segmentation, View

LEAST = 1e-12
"""Probabilities are not taken to be smaller: a softmax in float32 underflows to zero, which has no logarithm."""


class DiffSegSegmentor(AttentionSegmentor):
    """The segments of the image that are the word's, without training.

    Raises:
        InputError: the backbone does not tell what is looked at.
    """

    Settings = DiffSegSettings

    settings: DiffSegSettings

    @torch.no_grad()
    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor | Segmentation:
        """The word's mask, bool ``[H, W]`` on the CPU, within what is visible; all False when no segment is its own.

        With ``erase_with`` the segments of those words are told as well: they are to be erased with the word's.
        """
        proposals, names = self._named(view, word, generator)
        soft = self._share(proposals, names, [word], view)
        mask = self.to_mask(soft, 0.5, view) if bool((soft >= 0.5).any()) else torch.zeros_like(view.visible)
        if not self.settings.erase_with:
            return mask
        gone = self._share(proposals, names, [word, *self.settings.erase_with], view) >= 0.5
        return Segmentation(mask, mask | gone)

    @torch.no_grad()
    def soft_map(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The share of the word's segments: float32 ``[H, W]`` in [0, 1], one half where they begin, 0 where erased."""
        proposals, names = self._named(view, word, generator)
        return self._share(proposals, names, [word], view)

    def _named(self, view: View, word: str, generator: torch.Generator) -> tuple[Tensor, dict[int, str]]:
        """The proposals ``[K, h, w]``, and for each with a visible segment its word of the prompt, in small letters."""
        cross, pixels = self.word_maps(view, word, self.settings.pixel_grids, generator)
        proposals = self._proposals(aggregate(pixels))
        visible = on_grid(view.visible, (cross.shape[1], cross.shape[2]))
        cross = normalise_over_space(cross.flatten(1), "l2", visible)
        names = name_segments(proposals.argmax(dim=0).flatten(), cross, visible)
        words = [word, *self.rivals(word)]
        return proposals, {segment: words[index].lower() for segment, index in names.items()}

    def _share(self, proposals: Tensor, names: Mapping[int, str], words: Sequence[str], view: View) -> Tensor:
        """The share of these words' segments: ``[H, W]`` in [0, 1], one half where they begin, 0 where erased."""
        lower = {word.lower() for word in words}
        own = torch.tensor([names.get(segment) in lower for segment in range(len(proposals))])
        size = (view.visible.shape[0], view.visible.shape[1])
        return share_of(upsample(proposals, size), own) * view.visible

    def _proposals(self, pixels: Tensor) -> Tensor:
        """The maps ``[K, h, w]`` that those of all places, ``[h, w, h, w]``, are merged into."""
        settings, grid = self.settings, (pixels.shape[0], pixels.shape[1])
        maps, anchors = flat(pixels), anchor_cells(grid, settings.anchors)
        merged = merge_maps(maps, anchors, settings.kl_threshold, settings.rounds, settings.rejoin)
        return k_means(maps, merged, settings.kmeans, settings.kmeans_distance).unflatten(1, grid)


def anchor_cells(grid: Grid, count: int) -> Tensor:
    """The cells of a grid nearest to an even grid of ``count`` along the shorter side, row by row: int64 ``[N]``.

    Along the longer side there are as many more as it is longer. N is ``count ** 2`` on a square, or all of the cells
    where there are no more. Of two that are as near it is the first: 16 along 64 are 1, 5, ..., 61 (Tian et al.).

    Args:
        grid: (height, width) of cells.
        count: 1 or more.
    """
    shorter = min(grid)
    counts = [round(min(shorter, count) * side / shorter) for side in grid]
    rows, columns = (
        ((torch.arange(number) + 0.5) * side / number).ceil().long() - 1
        for side, number in zip(grid, counts, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).flatten()


def symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    """D(p, q) = (KL(p || q) + KL(q || p)) / 2, in nats, of every p with every q (Tian et al., eq. 2).

    Args:
        one: distributions p, ``[N, n]``, rows sum to one.
        other: distributions q, ``[M, n]``.

    Returns:
        ``[N, M]``, not negative.
    """
    log_one, log_other = one.clamp_min(LEAST).log(), other.clamp_min(LEAST).log()
    entropies = (one * log_one).sum(dim=1)[:, None] + (other * log_other).sum(dim=1)
    crossed = one @ log_other.T + log_one @ other.T
    return ((entropies - crossed) / 2).clamp_min(0)


def merge_maps(maps: Tensor, anchors: Tensor, threshold: float, rounds: int, rejoin: bool = False) -> Tensor:
    """DiffSeg's iterative merging (Tian et al., section 3.2).

    In the first round every anchor becomes the mean of all maps that are closer to it than ``threshold``. In each
    further round the first one left is joined by all that are closer to it, their mean is kept, and so on.

    Args:
        maps: ``[n, n]``, rows sum to one.
        anchors: int64 ``[N]``, which of the maps are anchors.
        threshold: of ``symmetric_kl``.
        rounds: 1 or more.
        rejoin: who may join in the further rounds: all maps, even those that joined an earlier one of the round (as
            published), or those that are left.

    Returns:
        ``[K, n]`` with K <= N, rows sum to one.
    """
    near = (symmetric_kl(maps[anchors], maps) < threshold).to(maps)
    near[torch.arange(len(anchors)), anchors] = 1  # whatever the rounding: no anchor is left without a map
    merged = near @ maps / near.sum(dim=1, keepdim=True)
    for _ in range(rounds - 1):
        near_one_another = symmetric_kl(merged, merged) < threshold
        left, groups = torch.ones(len(merged), dtype=torch.bool), []
        for first in range(len(merged)):
            if left[first]:
                members = near_one_another[first] if rejoin else left & near_one_another[first]
                members[first] = True  # whatever the rounding
                groups.append(merged[members].mean(dim=0))
                left &= ~members
        if len(groups) == len(merged):
            break
        merged = torch.stack(groups)
    return merged


def k_means(maps: Tensor, means: Tensor, rounds: int, distance: Distance = "kl") -> Tensor:
    """k-means of distributions: every map joins the mean it is nearest to, every mean becomes its maps' mean.

    How far a map p is from a mean q: KL(p || q), or |p - q|^2 (``euclidean``). For both it is the arithmetic mean of
    its maps that has the least sum of distances, so that no round makes that sum larger (Banerjee et al., "Clustering
    with Bregman divergences", JMLR 2005). Means without a map are left out.

    Args:
        maps: ``[n, n]``, rows sum to one.
        means: ``[K, n]``, where it begins.
        rounds: at most; it ends when nothing changes.
        distance: see above.

    Returns:
        ``[K', n]`` with K' <= K.
    """
    before = None
    for _ in range(rounds):
        if distance == "kl":  # what a map itself adds to its distances is left out, here and below
            distances = -maps @ means.clamp_min(LEAST).log().T
        else:
            distances = means.square().sum(dim=1) - 2 * maps @ means.T
        nearest = distances.argmin(dim=1)
        if before is not None and torch.equal(nearest, before):
            break
        chosen, before = nearest.unique(return_inverse=True)
        one_hot = F.one_hot(before, len(chosen)).to(maps)
        means = one_hot.T @ maps / one_hot.sum(dim=0)[:, None]
    return means


def name_segments(segments: Tensor, cross: Tensor, visible: Tensor) -> dict[int, int]:
    """Each segment's word: the one that it looks at most on average, where it is visible.

    Args:
        segments: int64 ``[n]``, the segment that each cell is of.
        cross: ``[T, n]``, one normalised map a word.
        visible: bool ``[n]``.

    Returns:
        Segment -> word in [0, T), for the segments that are visible at all.
    """
    return {
        int(segment): int(cross[:, visible & (segments == segment)].mean(dim=1).argmax())
        for segment in segments[visible].unique()
    }


def share_of(proposals: Tensor, own: Tensor) -> Tensor:
    """Who has a pixel: p / (p + q), p the largest proposal among ``own``, q the largest of all others.

    It is above one half exactly where the argmax of all proposals, DiffSeg's segment, is one of ``own``.

    Args:
        proposals: ``[K, H, W]``, not negative.
        own: bool ``[K]``.

    Returns:
        ``[H, W]`` in [0, 1]; all 0 where none is ``own``.
    """
    none = torch.zeros_like(proposals[:1])
    mine = torch.cat([none, proposals[own]]).amax(dim=0)
    others = torch.cat([none, proposals[~own]]).amax(dim=0)
    return mine / (mine + others).clamp_min(torch.finfo(proposals.dtype).tiny)
