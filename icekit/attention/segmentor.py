"""What segmentors that read a model's attention have in common.

The picture's noise is predicted, with the word and some rivals as prompt: where the model looks meanwhile is all they
know (``xattn`` reads where the word is looked for, ``diffseg`` clusters places that look at the same). The picture is
noised a little for it, or only said to be. What they find on the attention grid is brought to the picture's own edges
by ``refine``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, field_validator
from torch import Tensor

from icekit.attention.looking import look_at, require_similarity
from icekit.attention.maps import upsample
from icekit.attention.peaks import Joining, heaviest_part
from icekit.attention.refinement import refine, without_islands
from icekit.protocols import Backbone, Capability, ComponentSettings, Look, View


def one_or_more(value: Any) -> Any:
    """``0.15`` -> ``[0.15]``: a setting that takes a list takes a single value, too."""
    return [value] if isinstance(value, int | float | str) else value


def _in_schedule(shares: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError("0 to 1")
    return shares


Shares = Annotated[tuple[float, ...], Field(min_length=1), BeforeValidator(one_or_more), AfterValidator(_in_schedule)]
"""The type of a setting that says how noisy pictures are looked at: shares of the noise schedule, one or several."""

Grids = Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(one_or_more)]
"""The type of a setting that says on which grids: cells along the picture's shorter side, one number or several. The
backbone's nearest grids are meant."""


class LookingSettings(ComponentSettings):
    """Settings of how a picture is looked at, see ``look_at``."""

    shares: Shares = Field((0.15,), description="how noisy, 0 to 1 of the noise schedule; several are averaged")
    noise: bool = Field(
        True, description="add that much noise to the image; published: a clean latent, said to be that noisy"
    )
    draws: int = Field(
        4, ge=1, le=1000, description="draws of the noise that are averaged, for each share; with noise only"
    )


class AttentionSegmentor:
    """The attention at a picture, and the way from a soft map to a mask.

    A segmentor inherits from it, reads ``word_maps`` and makes a mask of what it finds by ``to_mask``.

    Raises:
        InputError: the backbone does not tell what is looked at.
    """

    needs: Collection[Capability] = ("attention", "similarity")

    class Settings(LookingSettings):
        """Settings that these segmentors share."""

        prompt: str = Field("{word} things background", description="the word and its rivals")
        look_at: Literal["image", "rest"] = Field(
            "image", description="the whole image, or only the rest of it with found concepts filled in"
        )
        word_grids: Grids = Field(
            (16, 32),
            description="attention grids the word is read on, averaged: cells along the image's shorter side; the "
            "model's nearest are taken",
        )
        word_weights: Literal["equal", "side"] = Field(
            "equal", description="how much each of these grids counts: the same, or in proportion to its side"
        )
        one_piece: bool = Field(
            False,
            description="keep one peak of the attention, the heaviest: for scenes of separate things",
        )
        dip: float = Field(
            0.1, gt=0, lt=1, description="two maxima are two peaks when attention between them is lower by this share"
        )
        join: float = Field(
            0.75,
            gt=0,
            le=1,
            description="a peak that attends to the heaviest, and it to that, this much as to itself, is its own",
        )
        join_alike: float = Field(0.5, gt=0, le=1, description="the same, for a peak of the heaviest's colours")
        alike: float = Field(
            10.0, ge=0, description="colours are the same up to this mean distance to the nearest, in CIELAB's units"
        )
        refinement: bool = Field(True, description="let the mask's edges follow the image's")
        foreground: float = Field(0.7, ge=0, le=1, description="refinement learns the object's colours above this")
        background: float = Field(0.2, ge=0, le=1, description="refinement learns its surroundings' colours below this")
        colour_weight: float = Field(0.5, ge=0, description="refinement: how much colour counts")
        map_weight: float = Field(2.0, ge=0, description="refinement: how much the attention map counts")
        smoothness: float = Field(10.0, gt=0, description="refinement: how far it averages between edges")
        min_island: float = Field(0.1, ge=0, lt=1, description="islands and holes below this share of the mask go")

        @field_validator("prompt")
        @classmethod
        def _has_word(cls, prompt: str) -> str:
            if prompt.count("{word}") != 1:
                raise ValueError("a text with {word} in it, once")
            return prompt

    settings: Settings

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        require_similarity(backbone)
        self.settings = settings
        self.backbone = backbone

    def seen(self, view: View) -> Tensor:
        """The picture that is looked at, ``[3, H, W]``."""
        return view.original if self.settings.look_at == "image" else view.pixels

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
        """From a soft map to the mask.

        Args:
            soft: float32 ``[H, W]`` in [0, 1].
            level: the value of it that is as likely the word's as not.
            view: what there is to see.
            pixels: ``[h, w, h, w]``, what places look at: with ``one_piece`` it joins peaks. None: none are joined.

        Returns:
            bool ``[H, W]``, within what is visible.
        """
        settings = self.settings
        image = self.seen(view)
        if settings.one_piece:
            joining = None
            if pixels is not None:
                joining = Joining(pixels, image, settings.join, settings.join_alike, settings.alike)
            soft = soft * heaviest_part(soft, level, settings.dip, joining)
        if settings.refinement:
            mask = refine(
                soft,
                image,
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
