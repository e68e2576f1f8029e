"""Which of the found masks belongs to which true one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from icekit.protocols import BenchImage, FoundConcept, Match

if TYPE_CHECKING:
    from torch import Tensor


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two bool masks ``[H, W]``, in [0, 1]; 0 when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def match_masks(true: Sequence[Tensor], found: Sequence[Tensor]) -> list[tuple[int | None, float]]:
    """The one-to-one assignment of found masks to true ones with the largest total IoU (Kuhn, 1955, "Hungarian").

    Args:
        true: bool ``[H, W]`` each.
        found: bool ``[H, W]`` each.

    Returns:
        For every true mask the index of its found one and their IoU; ``(None, 0.0)`` where none overlaps it or the
        found ones are too few.
    """
    from scipy.optimize import linear_sum_assignment

    overlap = np.array([[iou(one, other) for other in found] for one in true]).reshape(len(true), len(found))
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    assigned = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    matches: list[tuple[int | None, float]] = []
    for row in range(len(true)):
        column = assigned.get(row)
        if column is None or overlap[row, column] == 0:
            matches.append((None, 0.0))
        else:
            matches.append((column, float(overlap[row, column])))
    return matches


def matches_of(image: BenchImage, found: Sequence[FoundConcept]) -> list[Match]:
    """Every true concept of an image with the one that was found for it; without a truth, every one that was found."""
    if not image.concepts:
        return [Match(concept.region.mask, None, concept, 0.0) for concept in found]
    pairs = match_masks([concept.mask for concept in image.concepts], [concept.region.mask for concept in found])
    return [
        Match(concept.mask, concept, None if index is None else found[index], overlap)
        for concept, (index, overlap) in zip(image.concepts, pairs, strict=True)
    ]
