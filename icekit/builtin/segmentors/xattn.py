"""The segmentor of ICE's article: which pixels the diffusion model looks at when it reads the word.

The image is noised a little, its noise predicted once with the word and some rivals as prompt, and the cross-attention
of the word read off: normalised over space, sharpened by propagation through self-attention, set against its rivals'
(ICE, Cendra and Han, CVPR 2025; prompt and timestep as in its published implementation), and last brought to the
image's own edges by ``mask_refinement``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from icekit.attention.segmentor import (
    AttentionSegmentor,
    Normalisation,
    normalise_over_space,
    on_grid,
    upsample,
)
from icekit.protocols import Backbone, View

Competition = Literal["ratio", "softmax", "argmax", "none"]


class CrossAttentionSegmentor(AttentionSegmentor):
    """A word's mask from the backbone's attention, without training.

    Raises:
        InputError: a prompt without ``{word}``, or attention resolutions that the backbone does not have.
    """

    class Settings(AttentionSegmentor.Settings):
        """Settings of the ``xattn`` segmentor."""

        self_resolution: int | None = Field(
            None, ge=1, description="attention grid the map is propagated on; none: the largest up to 32"
        )
        normalisation: Normalisation = Field(
            "minmax", description="of each prompt word's map over space, before the words are compared"
        )
        propagation: int = Field(1, ge=0, description="how often the maps are propagated through self-attention")
        competition: Competition = Field("ratio", description="how the word's map is set against its rivals'")
        temperature: float = Field(
            0.5, gt=0, description="of the competition: small and the largest map takes all, large and all share"
        )
        threshold: float | Literal["otsu"] = Field(
            0.42, description="share of the map's maximum that is the word's, or otsu: chosen by the map's histogram"
        )

        @field_validator("threshold")
        @classmethod
        def _is_share(cls, threshold: float | str) -> float | str:
            if isinstance(threshold, float) and not 0 < threshold < 1:
                raise ValueError("between 0 and 1, or otsu")
            return threshold

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        super().__init__(settings, backbone)
        self.settings = settings
        offered = backbone.attention_resolutions
        self._self = settings.self_resolution or max((r for r in offered if r <= 32), default=min(offered))
        self._check_offered("self_resolution", (self._self,))

    @torch.no_grad()
    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The word's mask, bool ``[H, W]`` on the CPU, within what is visible; all False when nothing is."""
        soft, self_attention = self._read(view, word, generator)
        if not bool((soft > 0).any()):
            return torch.zeros_like(view.visible)
        threshold = self.settings.threshold
        level = otsu(soft, view.visible) if threshold == "otsu" else float(threshold)
        return self._mask(soft, level, view, self_attention)

    @torch.no_grad()
    def soft_map(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """How much each pixel is the word's, before any threshold: float32 ``[H, W]`` in [0, 1], 0 where erased."""
        return self._read(view, word, generator)[0]

    def _read(self, view: View, word: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The soft map, and the self-attention ``[n, n]`` that it was propagated through."""
        settings, grid = self.settings, self._self
        cross, self_attention = self._attention(view, word, grid, (grid,), generator)
        maps = propagate(cross.flatten(1), self_attention[grid], settings.propagation)
        maps = normalise_over_space(maps, settings.normalisation, on_grid(view.visible, grid))
        soft = compete(maps, settings.competition, settings.temperature)
        size = (int(view.visible.shape[0]), int(view.visible.shape[1]))
        soft = upsample(soft.reshape(1, grid, grid), size)
        # The softmax over the prompt leaves every word some attention everywhere: the least of it means "not here".
        soft = normalise_over_space(soft.flatten(1), "minmax", view.visible.flatten()).reshape(size)
        return soft, self_attention[grid]


def propagate(cross: Tensor, self_attention: Tensor, steps: int) -> Tensor:
    """Give every pixel the mean of what the pixels it attends to have:  c <- A c, ``steps`` times.

    Pixels of one object attend to one another, so a map that is high on a part of the object spreads over all of it.

    Args:
        cross: c, ``[T, n]``, one map a row.
        self_attention: A, ``[n, n]``, row i are the weights of query i and sum to one.
        steps: 0 changes nothing.

    Returns:
        ``[T, n]``.
    """
    for _ in range(steps):
        cross = cross @ self_attention.T
    return cross


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


def otsu(soft: Tensor, visible: Tensor) -> float:
    """Otsu's threshold of the visible part of a soft map ``[H, W]``: the least variance within both of its sides."""
    from skimage.filters import threshold_otsu

    return float(threshold_otsu(soft[visible].numpy()))
