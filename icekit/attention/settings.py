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

    shares: Shares = Field(
        (0.15,),
        description="how much noise the picture has when its attention is read, as a share of the noise schedule (0: "
        "none, 1: all noise); with several values the maps are averaged",
    )
    noise: bool = Field(
        True,
        description="add that noise to the picture; false: read a clean picture, and tell the model that it is that "
        "noisy (published)",
    )
    draws: int = Field(
        4,
        ge=1,
        le=1000,
        description="how many times noise is drawn for each share; the maps are averaged. Only with noise = true",
    )


class SoftMapSettings(LookingSettings):
    """Settings that segmentors share which make a mask of a soft map, whatever it was read from."""

    look_at: Literal["image", "rest"] = Field(
        "image",
        description="what the attention is read from: image, the whole picture, or rest, the picture with the "
        "concepts found so far erased",
    )
    one_piece: bool = Field(
        False,
        description="keep only the part of the word's map around its strongest peak; for pictures of separate objects",
    )
    dip: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="with one_piece: two maxima of the map are two peaks if the map falls by this much between them, "
        "as a share of its highest value",
    )
    refinement: bool = Field(
        True, description="move the mask's edges to the picture's edges, by a random walker with a colour model"
    )
    foreground: float = Field(
        0.7,
        ge=0,
        le=1,
        description="refinement: the object's colours are learned where the map is at least this, from 0 to 1",
    )
    background: float = Field(
        0.2,
        ge=0,
        le=1,
        description="refinement: the surroundings' colours are learned where the map is at most this, from 0 to 1",
    )
    colour_weight: float = Field(0.5, ge=0, description="refinement: weight of the colour model")
    map_weight: float = Field(2.0, ge=0, description="refinement: weight of the attention map")
    smoothness: float = Field(
        10.0,
        gt=0,
        description="refinement: how far the mask is smoothed where the picture has no edges; larger is smoother",
    )
    min_island: float = Field(
        0.1, ge=0, lt=1, description="islands and holes smaller than this share of the mask are removed"
    )


class AttentionSettings(SoftMapSettings):
    """Settings that segmentors share which read a model's attention weights."""

    prompt: str = Field(
        "{word} things background",
        description="the prompt under which attention is read: {word} is the word that is looked for, the others "
        "compete with it for the pixels",
    )
    word_grids: Grids = Field(
        (16, 32),
        description="attention grids that the word's map is read from, averaged: cells along the picture's shorter "
        "side; the model's nearest are taken",
    )
    word_weights: Literal["equal", "side"] = Field(
        "equal", description="weight of each of these grids in the average: equal, or side, in proportion to its side"
    )
    join: float = Field(
        0.75,
        gt=0,
        le=1,
        description="with one_piece: a second peak belongs to the kept object if the self-attention between the two "
        "peaks is at least this share of that within each",
    )
    join_alike: float = Field(
        0.5,
        gt=0,
        le=1,
        description="with one_piece: the share that is enough in place of join if the two peaks have like colours, "
        "see alike",
    )
    alike: float = Field(
        10.0,
        ge=0,
        description="with one_piece: largest mean colour distance, in CIELAB units, at which two peaks have like "
        "colours",
    )

    @field_validator("prompt")
    @classmethod
    def _has_word(cls, prompt: str) -> str:
        if prompt.count("{word}") != 1:
            raise ValueError("a text with {word} in it, once")
        return prompt
