"""Settings of the segmentors. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from icekit.attention.settings import AttentionSettings, Grids, Normalisation, one_or_more
from icekit.paths import PLACES
from icekit.protocols import ComponentSettings
from icekit.words import WordList

Competition = Literal["ratio", "softmax", "argmax", "none"]
Distance = Literal["kl", "euclidean"]


class CrossAttentionSettings(AttentionSettings):
    """Settings of the ``xattn`` segmentor."""

    pixel_grid: int = Field(
        32,
        ge=1,
        description="self-attention grid by which the word's map is propagated: cells along the picture's shorter "
        "side; the model's nearest is taken",
    )
    normalisation: Normalisation = Field(
        "minmax",
        description="how each word's map is scaled over the picture before the words are compared: minmax (to 0 and "
        "1), max (by its maximum) or l2 (to length one)",
    )
    propagation: int = Field(
        1,
        ge=0,
        le=1000,
        description="how often the map is multiplied by the self-attention, which spreads it over places that attend "
        "to one another",
    )
    competition: Competition = Field(
        "ratio",
        description="what the word's map is multiplied by, to let the prompt's words compete for a pixel: ratio, its "
        "share of the sum of all words' maps; softmax, its softmax among them; argmax, one where it is "
        "the largest and zero elsewhere; none",
    )
    temperature: float = Field(
        0.5,
        gt=0,
        description="temperature of ratio and softmax: small, and the largest map takes the pixel; large, and all "
        "share it",
    )
    threshold: float | Literal["otsu"] = Field(
        0.42,
        description="a pixel is in the mask where the map is at least this share of its maximum; otsu: the threshold "
        "is chosen from the map's histogram",
    )

    @field_validator("threshold")
    @classmethod
    def _is_share(cls, threshold: float | str) -> float | str:
        if isinstance(threshold, float) and not 0 < threshold < 1:
            raise ValueError("between 0 and 1, or otsu")
        return threshold


class DiffSegSettings(AttentionSettings):
    """Settings of the ``diffseg`` segmentor."""

    pixel_grids: Grids = Field(
        (64, 32, 16, 8),
        description="self-attention grids that are clustered, brought to the finest and averaged: cells along the "
        "picture's shorter side; the model's nearest are taken",
    )
    anchors: int = Field(
        16,
        ge=1,
        le=1024,
        description="merging starts from an even grid of this many by this many places, and their self-attention maps",
    )
    kl_threshold: float = Field(
        1.1,
        gt=0,
        description="two self-attention maps are merged if their symmetric KL divergence, in nats, is below this",
    )
    rounds: int = Field(3, ge=1, le=1000, description="rounds of merging")
    rejoin: bool = Field(
        False,
        description="after the first round a map that was merged already may be merged into later ones, too "
        "(published)",
    )
    foreground: float = Field(0.6, ge=0, le=1, description="refinement learns the object's colours above this")
    background: float = Field(0.4, ge=0, le=1, description="refinement learns its surroundings' colours below this")
    kmeans: int = Field(10, ge=0, le=10_000, description="largest number of k-means rounds that refine the merged maps")
    kmeans_distance: Distance = Field(
        "kl", description="distance that k-means uses: kl, the divergence that merging uses, or euclidean (published)"
    )
    erase_with: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        (),
        description="words of the prompt whose segments are erased together with each concept (published: background)",
    )

    @model_validator(mode="after")
    def _erased_is_said(self) -> DiffSegSettings:
        said = self.prompt.replace("{word}", " ").lower().split()
        for word in self.erase_with:
            if word.lower() not in said:
                raise ValueError(f"with erase_with = {word!r}, prompt must have this word, and it is {self.prompt!r}")
        return self


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class MaskFilesSettings(ComponentSettings):
    """Settings of the ``masks`` segmentor."""

    files: Annotated[tuple[Path, ...], BeforeValidator(_one_or_more), PLACES] = Field(
        (), description="mask images, or one folder of them; white is the object"
    )
    words: WordList = Field(
        (), description="what the masks show, in the same order: cup,ball; none given: the retriever names them"
    )
