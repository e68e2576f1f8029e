"""Found masks are matched to true ones, one to one, for the largest total overlap."""

import torch

from icekit.bench.matching import iou, match_masks


def row(*cells: int) -> torch.Tensor:
    """A mask of one row of ten pixels."""
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, list(cells)] = True
    return mask


def test_iou() -> None:
    assert iou(row(0, 1, 2), row(1, 2, 3)) == 2 / 4
    assert iou(row(0), row(1)) == 0
    assert iou(row(), row()) == 0


def test_the_total_counts_and_not_the_best_pair() -> None:
    # a: IoU 3/4 with the first, 2/5 with the second. b: 2/4 with the first, 0 with the second.
    true = [row(0, 1, 2, 3), row(1, 2, 4)]
    found = [row(1, 2, 3), row(0, 3, 5)]
    assert [[iou(one, other) for other in found] for one in true] == [[3 / 4, 2 / 5], [2 / 4, 0]]
    # Greedy takes a with the first, 3/4 + 0; together 2/5 + 2/4 is more.
    assert match_masks(true, found) == [(1, 2 / 5), (0, 2 / 4)]


def test_what_is_missed_and_what_is_too_much() -> None:
    assert match_masks([row(0), row(5)], [row(5, 6)]) == [(None, 0.0), (0, 1 / 2)]
    assert match_masks([row(0)], []) == [(None, 0.0)]
    assert match_masks([row(0)], [row(9)]) == [(None, 0.0)]
    assert match_masks([], [row(1)]) == []
