"""The settings of all components, without the modules that load models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from icekit.paths import PLACE
from icekit.protocols import ComponentSettings
from icekit.words import one_place

ModelName = Annotated[str, PLACE]
"""A folder in transformers' format, one inside an installed package (``package:NAME/FOLDER``), or a hub id."""


def _one_place(template: str) -> str:
    return one_place(template, "the word goes")


def _one_phrase(template: str) -> str:
    if set(template) & set(".?"):
        raise ValueError("text without . and ?, which end a phrase for Grounding DINO")
    return template


Template = Annotated[str, AfterValidator(_one_place)]
"""What a word is put into before a model reads it."""
Phrase = Annotated[Template, AfterValidator(_one_phrase)]
"""The same, one phrase of Grounding DINO's."""

DETECTOR = "IDEA-Research/grounding-dino-tiny"
MODEL = "a folder in transformers' format or OWNER/NAME of the Hugging Face hub, with safetensors weights"


class ClipSegSettings(ComponentSettings):
    """Settings of the ``clipseg`` segmentor."""

    model: ModelName = Field(
        "CIDAS/clipseg-rd64-refined", min_length=1, description=f"CLIPSeg (CLIPSegForImageSegmentation): {MODEL}"
    )
    template: Template = Field("a photo of a {}", description="what the model is asked for, {} being the word")
    threshold: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="a pixel is in the mask when its heat, from 0 to 1, is above this; higher: a tighter mask, and no "
        "mask for more words",
    )
    of_peak: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="and above this share of the hottest visible pixel's heat; 0.5, say, tightens the mask of a word "
        "that the model is sure of",
    )


class GroundedSamSettings(ComponentSettings):
    """Settings of the ``grounded-sam`` segmentor."""

    detector: ModelName = Field(
        DETECTOR, min_length=1, description=f"Grounding DINO (GroundingDinoForObjectDetection): {MODEL}"
    )
    sam: ModelName = Field("facebook/sam-vit-base", min_length=1, description=f"SAM (SamModel): {MODEL}")
    template: Phrase = Field("a {}", description="what the detector is asked for, {} being the word")
    threshold: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="a box counts when its score, from 0 to 1, is above this; where none does, the mask is empty",
    )
    visible_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="a box counts when at least this share of its pixels is not erased, and one pixel or more",
    )
    boxes: Literal["best", "all"] = Field(
        "best",
        description="best: the box with the highest score is cut out, one object; all: every box that counts, so that "
        "the mask has all objects of this word",
    )


class GroundingDinoSettings(ComponentSettings):
    """Settings of the ``grounding-dino`` retriever."""

    model: ModelName = Field(
        DETECTOR, min_length=1, description=f"Grounding DINO (GroundingDinoForObjectDetection): {MODEL}"
    )
    vocabulary: Annotated[str | tuple[str, ...] | None, PLACE] = Field(
        "package:icekit/vocabulary/nouns.txt",
        description="words to look for: a list, or a text file with one a line; by default 1,695 nouns; none: icekit's "
        "9,150 names of things. Without a GPU give a short one: every view is searched for all of them",
    )
    template: Phrase = Field("a {}", description="what the detector is asked for, {} being the word")
    words_at_once: int = Field(
        80,
        ge=1,
        le=1000,
        description="words asked for in one pass of the model, as many of them as it can read; more: faster, fewer: "
        "words disturb one another less",
    )
    threshold: float = Field(
        0.35,
        ge=0,
        lt=1,
        description="a word is found when the score of its best box, from 0 to 1, is above this; when none is, the "
        "search ends",
    )
    visible_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="a box counts when at least this share of its pixels is not erased, and one pixel or more",
    )
    top: int = Field(5, ge=1, le=100_000, description="words returned at most")
