"""Metrics of stage one: are the objects found, and called what they are? They need true masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from icekit.protocols import Backbone, BenchImage, Column, ComponentSettings, Match, Outcome, Score

if TYPE_CHECKING:
    from torch import Tensor

FOUND_IOU = 0.5
"""From this IoU on an object counts as found."""


def share_of(mask: Tensor, other: Tensor | None) -> float:
    """The share of a mask's pixels that another covers, in [0, 1]; 0 without another.

    mask, other: bool ``[H, W]``, the first not empty.
    """
    return 0.0 if other is None else float((mask & other).sum() / mask.sum())


class MeanIou:
    """Mean IoU of the true masks with the found ones, matched one to one for the largest total; 0 for a missed one."""

    class Settings(ComponentSettings):
        """There are none."""

    columns: Mapping[str, Column] = {"miou": Column("overlap of true and found masks")}
    needs: Collection[str] = ("masks",)

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        pass

    def prepare(self, images: Sequence[BenchImage]) -> None:
        """Nothing to prepare."""

    def value(self, match: Match) -> float:
        """One true object's number: its IoU."""
        return match.iou

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """The mean over the true objects."""
        [column] = self.columns
        values = [self.value(match) for match in outcome.matches]
        return {column: Score(sum(values) / len(values) if values else None)}


class Recall(MeanIou):
    """Share of true objects that were found: IoU 0.5 or more with the mask matched to them."""

    columns: Mapping[str, Column] = {"recall": Column("objects found, IoU 0.5 or more")}

    def value(self, match: Match) -> float:
        """Whether it was found."""
        return float(match.iou >= FOUND_IOU)


class MaskRecall(MeanIou):
    """Share of a true mask's pixels that the mask matched to it covers, mean over true objects; 0 for a missed one."""

    columns: Mapping[str, Column] = {"mask_recall": Column("pixels of a true mask that the found one covers")}

    def value(self, match: Match) -> float:
        """One true object's number."""
        return share_of(match.mask, None if match.found is None else match.found.region.mask)


class MaskPrecision(MeanIou):
    """Share of a found mask's pixels that are of its true object, mean over true objects; 0 for a missed one."""

    columns: Mapping[str, Column] = {"mask_precision": Column("pixels of a found mask that are of its object")}

    def value(self, match: Match) -> float:
        """One true object's number."""
        return 0.0 if match.found is None else share_of(match.found.region.mask, match.mask)


class WordAccuracy(MeanIou):
    """Share of true objects that were found (IoU 0.5 or more) and called by their right word."""

    columns: Mapping[str, Column] = {"word_accuracy": Column("objects found and called by the right word")}
    needs: Collection[str] = ("masks", "words")

    def value(self, match: Match) -> float:
        """Whether it was found under its word."""
        if match.found is None or match.true is None or match.iou < FOUND_IOU:
            return 0.0
        return float(match.found.region.word.casefold() == (match.true.word or "").casefold())
