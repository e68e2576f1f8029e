"""What segmentors that read a model's attention have in common.

The picture's noise is predicted, with the word and some rivals as prompt: where the model looks meanwhile is all they
know (``xattn`` reads where the word is looked for, ``diffseg`` clusters places that look at the same). The picture is
noised a little for it, or only said to be. What they find on the attention grid is brought to the picture's own edges
by ``refine``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from icekit.attention.looking import look_at, require_similarity
from icekit.attention.maps import upsample
from icekit.attention.peaks import Joining, heaviest_part
from icekit.attention.refinement import refine, without_islands
from icekit.attention.settings import AttentionSettings, SoftMapSettings
from icekit.protocols import Backbone, Capability, Look, View


class SoftMapSegmentor:
    """The way from a soft map of a picture to a mask, whatever the map was read from.

    A segmentor inherits from it and makes a mask of what it finds by ``mask_of``.
    """

    settings: SoftMapSettings

    def seen(self, view: View) -> Tensor:
        """The picture that is looked at, ``[3, H, W]``."""
        return view.original if self.settings.look_at == "image" else view.pixels

    def mask_of(self, soft: Tensor, level: float, view: View, joining: Joining | None = None) -> Tensor:
        """From a soft map to the mask.

        Args:
            soft: float32 ``[H, W]`` in [0, 1].
            level: the value of it that is as likely the word's as not.
            view: what there is to see.
            joining: with ``one_piece`` it joins peaks. None: none are joined.

        Returns:
            bool ``[H, W]``, within what is visible.
        """
        settings = self.settings
        if settings.one_piece:
            soft = soft * heaviest_part(soft, level, settings.dip, joining)
        if settings.refinement:
            mask = refine(
                soft,
                self.seen(view),
                level=level,
                foreground=settings.foreground,
                background=settings.background,
                colour_weight=settings.colour_weight,
                map_weight=settings.map_weight,
                smoothness=settings.smoothness,
                min_island=settings.min_island,
            )
        else:
            mask = without_islands(soft >= level, settings.min_island)
        return mask & view.visible


class AttentionSegmentor(SoftMapSegmentor):
    """The attention at a picture, and the way from a soft map to a mask.

    A segmentor inherits from it, reads ``word_maps`` and makes a mask of what it finds by ``to_mask``.

    Raises:
        InputError: the backbone does not tell what is looked at.
    """

    Settings = AttentionSettings

    needs: Collection[Capability] = ("attention", "similarity")

    settings: AttentionSettings

    def __init__(self, settings: AttentionSettings, backbone: Backbone) -> None:
        require_similarity(backbone)
        self.settings = settings
        self.backbone = backbone

    def rivals(self, word: str) -> list[str]:
        """The other words of the prompt, in its order."""
        own = {part.lower() for part in word.split()}
        return [part for part in self.settings.prompt.replace("{word}", " ").split() if part.lower() not in own]

    def word_maps(
        self, view: View, word: str, pixels: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The attention at the picture under the prompt with the word in it.

        Args:
            view: what there is to see.
            word: its rivals are the other words of the prompt.
            pixels: cells along the shorter side of the grids on which it is wanted what places look at, at least one.
            generator: makes the noise.

        Returns:
            words: float32 ``[T, h, w]``, on the finest of the grids of ``pixels``: at least 0, one map a word, the word
                itself first, then its ``rivals``; the mean over its positions and, weighted, over ``word_grids``.
            pixels: float32 ``[h, w, h, w]`` for each grid, the finest first; sums over the last pair are one.
        """
        settings, backbone = self.settings, self.backbone
        prompt = settings.prompt.format(word=word)
        positions = backbone.token_positions(prompt, [word, *self.rivals(word)])
        attention = look_at(
            backbone,
            self.seen(view),
            prompt,
            Look(words=settings.word_grids, pixels=tuple(pixels)),
            shares=settings.shares,
            noise=settings.noise,
            draws=settings.draws,
            generator=generator,
        )
        finest = attention.pixels[0].shape[:2]
        weights = [1 if settings.word_weights == "equal" else min(maps.shape[1:]) for maps in attention.words]
        words = torch.zeros(len(positions), *finest)
        for maps, weight in zip(attention.words, weights, strict=True):
            of_words = torch.stack([maps[places].mean(dim=0) for places in positions])
            words += upsample(of_words, (finest[0], finest[1])) * (weight / sum(weights))
        return words, attention.pixels

    def to_mask(self, soft: Tensor, level: float, view: View, pixels: Tensor | None = None) -> Tensor:
        """From a soft map to the mask: ``mask_of``, with peaks joined by the attention.

        Args:
            soft: see ``mask_of``.
            level: see ``mask_of``.
            view: what there is to see.
            pixels: ``[h, w, h, w]``, what places look at: with ``one_piece`` it joins peaks. None: none are joined.

        Returns:
            bool ``[H, W]``, within what is visible.
        """
        settings, joining = self.settings, None
        if settings.one_piece and pixels is not None:
            joining = Joining(pixels, self.seen(view), settings.join, settings.join_alike, settings.alike)
        return self.mask_of(soft, level, view, joining)
