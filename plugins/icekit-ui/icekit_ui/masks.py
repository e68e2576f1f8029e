"""Masks as the page and the browser hand them to one another: lengths of runs, so that no picture has to be decoded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from icekit import InputError

Mask = NDArray[np.bool_]


def to_lengths(mask: Mask) -> list[int]:
    """A mask, bool ``[H, W]``, row by row: so many pixels outside, so many inside, and so on; the first may be 0."""
    flat = mask.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = [0, *changes.tolist(), flat.size]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    return [0, *lengths] if flat.size and flat[0] else lengths


def from_lengths(lengths: object, width: int, height: int) -> Mask:
    """The mask of such lengths, bool ``[height, width]``.

    Raises:
        InputError: they are not whole numbers of at least 0 that add up to the picture.
    """
    size = width * height
    if (
        not isinstance(lengths, Sequence)
        or isinstance(lengths, str)
        or len(lengths) > size + 1
        or not all(type(one) is int and 0 <= one <= size for one in lengths)
        or sum(lengths) != size
    ):
        raise InputError(f"an outline came that is none of a picture of {width} x {height} pixels")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, np.asarray(lengths, dtype=np.int64)).reshape(height, width)
