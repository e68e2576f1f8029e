"""Detection and segmentation models of transformers, which find what a word says in any photograph.

What is here is quick to import. The components are in modules of their own, which load torch and transformers, and are
imported when a run uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from icekit import hookimpl
from icekit_detector.settings import ClipSegSettings, GroundedSamSettings, GroundingDinoSettings

if TYPE_CHECKING:
    from icekit.hookspecs import Register


@hookimpl
def register_segmentors(register: Register) -> None:
    """CLIPSeg, and Grounding DINO with SAM."""
    register(
        "clipseg",
        "icekit_detector.clipseg:ClipSeg",
        settings=ClipSegSettings,
        summary="CLIPSeg's heat map of the word, cut at a threshold (Lüddecke and Ecker, CVPR 2022).",
    )
    register(
        "grounded-sam",
        "icekit_detector.grounded_sam:GroundedSam",
        settings=GroundedSamSettings,
        summary="Grounding DINO finds the box of the word, SAM cuts it out (Ren et al., 2024).",
    )


@hookimpl
def register_retrievers(register: Register) -> None:
    """Grounding DINO."""
    register(
        "grounding-dino",
        "icekit_detector.retriever:GroundingDinoRetriever",
        settings=GroundingDinoSettings,
        summary="The words of a vocabulary that Grounding DINO finds a box for (Liu et al., ECCV 2024).",
    )
