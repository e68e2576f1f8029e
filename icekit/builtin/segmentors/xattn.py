"""The segmentor of ICE's article: which places of the picture the diffusion model looks at when it reads the word.

The picture is noised a little, its noise predicted once with the word and some rivals as prompt, and the attention to
the word read off: normalised over space, sharpened by propagation between places that look at one another, set against
its rivals' (ICE, Cendra and Han, CVPR 2025; prompt and share of noise as in its published implementation), and last
brought to the picture's own edges by ``icekit.attention.refine``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icekit.attention import AttentionSegmentor, flat, normalise_over_space, on_grid, otsu, upsample
from icekit.builtin.segmentors.settings import Competition, CrossAttentionSettings
from icekit.protocols import View


class CrossAttentionSegmentor(AttentionSegmentor):
    """A word's mask from the backbone's attention, without training.

    Raises:
        InputError: the backbone does not tell what is looked at.
    """

    Settings = CrossAttentionSettings

    settings: CrossAttentionSettings

    @torch.no_grad()
    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The word's mask, bool ``[H, W]`` on the CPU, within what is visible; all False when nothing is."""
        soft, pixels = self._read(view, word, generator)
        if not bool((soft > 0).any()):
            return torch.zeros_like(view.visible)
        threshold = self.settings.threshold
        level = otsu(soft, view.visible) if threshold == "otsu" else float(threshold)
        return self.to_mask(soft, level, view, pixels)

    @torch.no_grad()
    def soft_map(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """How much each pixel is the word's, before any threshold: float32 ``[H, W]`` in [0, 1], 0 where erased."""
        return self._read(view, word, generator)[0]

    def _read(self, view: View, word: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The soft map, and what places look at, ``[h, w, h, w]``, along which it was propagated."""
        settings = self.settings
        words, (pixels,) = self.word_maps(view, word, (settings.pixel_grid,), generator)
        grid = (words.shape[1], words.shape[2])
        maps = propagate(words.flatten(1), flat(pixels), settings.propagation)
        maps = normalise_over_space(maps, settings.normalisation, on_grid(view.visible, grid))
        soft = compete(maps, settings.competition, settings.temperature)
        size = (view.visible.shape[0], view.visible.shape[1])
        soft = upsample(soft.reshape(1, *grid), size)
        # Every word has some attention everywhere, whatever is there: the least of it means "not here".
        soft = normalise_over_space(soft.flatten(1), "minmax", view.visible.flatten()).reshape(size)
        return soft, pixels


def propagate(words: Tensor, pixels: Tensor, steps: int) -> Tensor:
    """Give every place the mean of what the places it looks at have:  c <- A c, ``steps`` times.

    Places of one object look at one another, so a map that is high on a part of the object spreads over all of it.

    Args:
        words: c, ``[T, n]``, one map a row.
        pixels: A, ``[n, n]``, row i is what place i looks at and sums to one.
        steps: 0 changes nothing.

    Returns:
        ``[T, n]``.
    """
    for _ in range(steps):
        words = words @ pixels.T
    return words


def compete(maps: Tensor, how: Competition, temperature: float) -> Tensor:
    """The first word's map where it is not a rival's:  c_0 * share_0.

    ``ratio``: share_0 = c_0^(1/tau) / sum_k c_k^(1/tau), which does not depend on a common scale. ``softmax``:
    share_0 = softmax(c / tau)_0. ``argmax``: share_0 = 1 where c_0 is the largest, 0 elsewhere. ``none``: share_0 = 1.

    Args:
        maps: c, ``[T, ...]`` in [0, 1], the word first.
        how: see above.
        temperature: tau > 0.

    Returns:
        ``[...]`` in [0, 1].
    """
    own = maps[0]
    if how == "none" or len(maps) == 1:
        return own
    if how == "argmax":
        return own * (own >= maps[1:].amax(dim=0))
    scores = maps / temperature
    if how == "ratio":  # c^(1/tau) = exp(log(c) / tau); a log of zero is kept finite, for 0 / 0 has no share at all
        scores = maps.clamp_min(1e-12).log() / temperature
    return own * scores.softmax(dim=0)[0]
