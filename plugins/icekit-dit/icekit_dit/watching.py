"""Attention weights, computed beside diffusers' own processors, whose outputs stay the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from icekit.backbones.attention_capture import mean_weights


class Watch:
    """What the layers of one prediction saw, added up: what a single layer saw is not kept."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._layers = 0
        self.listening = True
        """Whether a pass is kept; one that is made again for the gradient is not."""

    def tell(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> None:
        """Keep the mean over heads of a layer's softmax(Q K^T * scale + bias); gradients flow through.

        With gradients the weights of single heads are not kept but computed again.

        Args:
            query: ``[B, heads, N, d]``.
            key: ``[B, heads, M, d]``.
            scale: 1 / sqrt(d), usually.
            bias: broadcastable to ``[B, heads, N, M]``.
        """
        if torch.is_grad_enabled():
            weights = checkpoint(mean_weights, query, key, scale, bias, use_reentrant=False, preserve_rng_state=False)
        else:
            weights = mean_weights(query, key, scale, bias)
        if self.listening:
            self._sum = weights if self._sum is None else self._sum + weights
            self._layers += 1

    def mean(self) -> Tensor:
        """The mean over heads and layers, float32 ``[B, N, M]``."""
        assert self._sum is not None, "nothing was predicted inside the block yet"
        return self._sum / self._layers


def heads_of(projected: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * d]`` -> ``[B, heads, N, d]``."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def watching(attentions: Sequence[Any], processor_of: Callable[[Watch, Any], Any]) -> Iterator[Watch]:
    """Let attention layers of diffusers tell their weights until the block ends.

    processor_of: makes a processor of who is told and of the processor that a layer has.
    """
    watch, before = Watch(), [attention.processor for attention in attentions]
    try:
        for attention, own in zip(attentions, before, strict=True):
            attention.set_processor(processor_of(watch, own))
        yield watch
    finally:
        watch.listening = False
        for attention, own in zip(attentions, before, strict=True):
            attention.set_processor(own)
