"""icekit's conformance checks on the components, with tiny models."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny_detectors
from icekit_detector.clipseg import ClipSeg
from icekit_detector.grounded_sam import GroundedSam
from icekit_detector.retriever import GroundingDinoRetriever

from icekit.testing import RetrieverUnderTest, SegmentorUnderTest, parametrize_with_checks
from icekit.testing.scenes import NOUNS, Scene


@functools.cache
def temporary() -> tempfile.TemporaryDirectory[str]:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="icekit-detector-")


@functools.cache
def folder(name: str) -> str:
    return str(getattr(tiny_detectors, f"write_{name}")(Path(temporary().name) / name))


def clipseg(**values: Any) -> Callable[[Scene], Mapping[str, Any]]:
    return lambda scene: {"model": folder("clipseg"), **values}


def grounded_sam(**values: Any) -> Callable[[Scene], Mapping[str, Any]]:
    return lambda scene: {"detector": folder("grounding_dino"), "sam": folder("sam"), **values}


def grounding_dino(**values: Any) -> Callable[[Scene], Mapping[str, Any]]:
    return lambda scene: {"model": folder("grounding_dino"), "vocabulary": NOUNS, **values}


@parametrize_with_checks(
    [
        SegmentorUnderTest(ClipSeg, clipseg(threshold=0.6), "clipseg"),
        SegmentorUnderTest(ClipSeg, clipseg(threshold=0.1, of_peak=0.8), "clipseg-of-peak"),
        SegmentorUnderTest(GroundedSam, grounded_sam(), "grounded-sam"),
        SegmentorUnderTest(GroundedSam, grounded_sam(boxes="all", visible_share=0), "grounded-sam-all"),
        RetrieverUnderTest(GroundingDinoRetriever, grounding_dino(), "grounding-dino"),
        RetrieverUnderTest(
            GroundingDinoRetriever,
            grounding_dino(words_at_once=3, threshold=0, visible_share=0, top=100),
            "grounding-dino-all-words",
        ),
    ]
)
def test_conformance(check: Callable[[Any], None], subject: Any) -> None:
    check(subject)
