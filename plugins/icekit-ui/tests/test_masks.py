"""Masks as lengths of runs."""

from typing import Any

import numpy as np
import pytest
from icekit_ui.masks import from_lengths, to_lengths

from icekit import InputError


def test_by_hand() -> None:
    mask = np.array([[False, True, True], [True, False, False]])
    assert to_lengths(mask) == [1, 3, 2]
    assert to_lengths(~mask) == [0, 1, 3, 2]
    assert to_lengths(np.zeros((2, 3), dtype=bool)) == [6]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_there_and_back(share: float) -> None:
    mask = np.random.default_rng(0).random((5, 7)) < share
    assert np.array_equal(from_lengths(to_lengths(mask), 7, 5), mask)


@pytest.mark.parametrize(
    "lengths",
    [None, "6", 6, [5], [7], [-1, 7], [3, 3.0], [True, 5], [1] * 8, [[6]], {"0": 6}, [0] * 6 + [6, 0, 0]],
    ids=repr,
)
def test_what_is_no_mask_is_refused(lengths: Any) -> None:
    with pytest.raises(InputError, match="none of a picture of 3 x 2 pixels"):
        from_lengths(lengths, 3, 2)
