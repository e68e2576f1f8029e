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
        description="attention grid the map is propagated on: cells along the image's shorter side; the model's "
        "nearest is taken",
    )
    normalisation: Normalisation = Field(
        "minmax", description="of each prompt word's map over space, before the words are compared"
    )
    propagation: int = Field(
        1, ge=0, le=1000, description="how often the maps are propagated between places that look at one another"
    )
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


class DiffSegSettings(AttentionSettings):
    """Settings of the ``diffseg`` segmentor."""

    pixel_grids: Grids = Field(
        (64, 32, 16, 8),
        description="attention grids that are clustered, brought to the finest and averaged: cells along the "
        "image's shorter side; the model's nearest are taken",
    )
    anchors: int = Field(16, ge=1, le=1024, description="shorter side of the grid of maps that merging starts from")
    kl_threshold: float = Field(1.1, gt=0, description="maps closer than this, in nats of symmetric KL, are merged")
    rounds: int = Field(3, ge=1, le=1000, description="rounds of merging")
    rejoin: bool = Field(
        False,
        description="after the first round a map that was merged may be merged into later ones, too (published)",
    )
    foreground: float = Field(0.6, ge=0, le=1, description="refinement learns the object's colours above this")
    background: float = Field(0.4, ge=0, le=1, description="refinement learns its surroundings' colours below this")
    kmeans: int = Field(
        10, ge=0, le=10_000, description="rounds at most of k-means that the merged maps are refined by"
    )
    kmeans_distance: Distance = Field(
        "kl", description="what k-means goes by: the divergence that merging uses, or euclidean (published)"
    )
    erase_with: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        (), description="words of the prompt whose segments are erased with each word's (published: background)"
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
        (), description="what they show, in the same order: cup,ball; none: the retriever names them"
    )
