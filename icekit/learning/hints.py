"""What a retriever saw in a region (``Region.hints``), as rows of the embedding table that learners may start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from icekit.protocols import Attribute, Backbone, Region


def hinted_row(
    region: Region,
    attribute: Attribute,
    backbone: Backbone,
    likeliest: bool = False,
    pieces: Literal["mean", "first"] = "mean",
) -> Tensor | None:
    """The mean of the rows of the words that the retriever saw, each as much as it is likely; None without hints.

    Args:
        region: with ``hints``.
        attribute: whose words.
        backbone: whose rows.
        likeliest: take the row of the likeliest word alone.
        pieces: of a word in several pieces, their mean or the first.

    Returns:
        float32 ``[embedding_dim]``.
    """
    hints = region.hints.get(attribute.name, {})
    if not hints:
        return None
    words = [max(hints, key=lambda word: hints[word])] if likeliest else list(hints)
    rows = torch.stack([backbone.word_embedding(word, pieces).float() for word in words])
    weights = torch.tensor([hints[word] for word in words], device=rows.device)
    return weights @ rows / weights.sum()


def described_row(region: Region, attributes: Sequence[Attribute], backbone: Backbone) -> Tensor | None:
    """The mean over the attributes of their ``hinted_row``: all that was seen of a region; None without any hints."""
    rows = [row for one in attributes if (row := hinted_row(region, one, backbone)) is not None]
    return torch.stack(rows).mean(dim=0) if rows else None
