"""Settings of segmentors that read a model's attention, and types for settings. Quick to import: without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, field_validator

from icekit.protocols import ComponentSettings

Normalisation = Literal["minmax", "max", "l2"]


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


class AttentionSettings(LookingSettings):
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
