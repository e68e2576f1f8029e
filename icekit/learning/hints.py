"""What a retriever saw in a region (``Region.hints``), as a token that learners may start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from icekit.learning.rows import mean_token, weighted_sum
from icekit.protocols import Attribute, Backbone, Region


def hinted_token(
    region: Region,
    attribute: Attribute,
    backbone: Backbone,
    likeliest: bool = False,
    pieces: Literal["mean", "first"] = "mean",
) -> dict[str, Tensor] | None:
    """The mean of the words that the retriever saw, each as much as it is likely; None without hints.

    Args:
        region: with ``hints``.
        attribute: whose words.
        backbone: whose rows.
        likeliest: take the likeliest word alone.
        pieces: of a word in several pieces, their mean or the first.

    Returns:
        Rows by text encoder, float32.
    """
    hints = region.hints.get(attribute.name, {})
    if not hints:
        return None
    words = [max(hints, key=lambda word: hints[word])] if likeliest else list(hints)
    total = sum(hints[word] for word in words)
    return weighted_sum([backbone.word_rows(word, pieces) for word in words], [hints[word] / total for word in words])


def described_token(region: Region, attributes: Sequence[Attribute], backbone: Backbone) -> dict[str, Tensor] | None:
    """The mean over the attributes of their ``hinted_token``: all that was seen of a region; None without any hints."""
    found = [token for one in attributes if (token := hinted_token(region, one, backbone)) is not None]
    return mean_token(found) if found else None
