"""Prompts to put a concept's tokens into, in the manner of CLIP's photo templates."""

from __future__ import annotations

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
