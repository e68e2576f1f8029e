"""Prompts to put a concept's tokens into, in the manner of CLIP's photo templates."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from icekit.words import one_place

PHOTO_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a photo of a nice {}",
    "a photo of a clean {}",
    "a close-up photo of a {}",
    "a close-up photo of the {}",
    "a cropped photo of a {}",
    "a cropped photo of the {}",
    "a bright photo of a {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a good photo of a {}",
    "a good photo of the {}",
    "a rendition of a {}",
    "a rendition of the {}",
)
"""``{}`` is where the tokens go."""


def _one_place_for_tokens(templates: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(one_place(template, "the tokens go") for template in templates)


Templates = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_one_place_for_tokens)]
"""The type of a setting that holds such prompts."""
