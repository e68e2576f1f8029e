"""Joint attention, read while a diffusion transformer predicts.

Fused kernels return no weights. So the softmax of the picture's queries over all keys is computed a second time beside
the kernel, which goes on making the outputs: what is predicted stays the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from icekit.backbones.attention_capture import MOST_WEIGHTS, attention_weights


def mean_weights(query: Tensor, key: Tensor, kept: Sequence[slice]) -> list[Tensor]:
    """softmax(Q K^T / sqrt(d)) over all keys, mean over heads, at some of the keys (Vaswani et al., 2017, eq. 1).

    Some heads at a time, as many as ``MOST_WEIGHTS`` allows, and for the gradient once more: never are the weights of
    all heads in memory.

    Args:
        query: ``[B, heads, N, d]``.
        key: ``[B, heads, M, d]``.
        kept: which keys the weights are wanted at.

    Returns:
        For each of ``kept``, of K keys, float32 ``[B, N, K]``: at least 0, and sums over all keys are one.
    """

    def of_some(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        weights = attention_weights(query, key, 1 / math.sqrt(query.shape[-1])).sum(dim=1)
        return tuple(weights[..., keys] for keys in kept)

    heads = query.shape[1]
    at_once = max(1, MOST_WEIGHTS // (query.shape[0] * query.shape[2] * key.shape[2]))
    totals: list[Tensor] = []
    for start in range(0, heads, at_once):
        some = query[:, start : start + at_once], key[:, start : start + at_once]
        if torch.is_grad_enabled():
            weights = checkpoint(of_some, *some, use_reentrant=False, preserve_rng_state=False)
        else:
            weights = of_some(*some)
        totals = [total + one for total, one in zip(totals, weights, strict=True)] if totals else list(weights)
    return [total / heads for total in totals]


class Capture:
    """What joint attention keeps of one pass; of the weights the sums over layers alone.

    words, pixels: whether the weights are kept that places give positions of the prompt, and other places.
    outputs: whether what comes out of the attention is kept, before it is projected.
    """

    def __init__(self, *, words: bool = False, pixels: bool = False, outputs: bool = False) -> None:
        self._words, self._pixels, self._outputs = words, pixels, outputs
        self._sums: list[Tensor] = []
        self._layers = 0
        self.listening = True
        """Whether a pass is kept; one that is made again for the gradient is not."""
        self.outputs: dict[int, tuple[Tensor, Tensor]] = {}
        """Of each layer: at positions ``[B, L, D]``, at places ``[B, N, D]``."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, positions: slice, places: slice) -> Tensor:
        """What the fused kernel makes of a joint sequence, and keep what is wanted of it.

        Args:
            layer: its number.
            query: ``[B, heads, M, d]``, and key and value alike.
            key: see query.
            value: see query.
            positions: the prompt's part of the M.
            places: the picture's part.

        Returns:
            ``[B, M, heads * d]``.
        """
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)
        kept = [keys for keys, wanted in ((positions, self._words), (places, self._pixels)) if wanted]
        if kept:
            weights = mean_weights(query[:, :, places], key, kept)
            if self.listening:
                pairs = zip(self._sums, weights, strict=True)
                self._sums = [total + one for total, one in pairs] if self._sums else weights
                self._layers += 1
        if self._outputs and self.listening:
            self.outputs[layer] = attended[:, positions], attended[:, places]
        return attended

    def seen(self) -> tuple[Tensor | None, Tensor | None]:
        """Mean over heads and layers, float32: to positions ``[B, N, L]``, to places ``[B, N, N]``; None for what is
        not kept.
        """
        assert self._sums, "nothing was predicted inside the block yet"
        means = iter([total / self._layers for total in self._sums])
        return (next(means) if self._words else None), (next(means) if self._pixels else None)


class RotaryProcessor:
    """What diffusers attention processors of one joint sequence share, the prompt first: a ``Capture`` at their side,
    and rotary position embedding (Su et al., 2021).

    length: positions of the prompt.
    """

    def __init__(self, capture: Capture, layer: int, length: int) -> None:
        self._capture = capture
        self._layer = layer
        self._length = length

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor] | None, length: int
    ) -> Tensor:
        """``[B, M, heads, d]`` each, turned by their places -> what they attend to, ``[B, M, heads * d]``."""
        from diffusers.models.embeddings import apply_rotary_emb

        if rotary is not None:
            query = apply_rotary_emb(query, rotary, sequence_dim=1)
            key = apply_rotary_emb(key, rotary, sequence_dim=1)
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        return self._capture.attend(self._layer, query, key, value, slice(0, length), slice(length, None))


@contextmanager
def processors_of(attentions: Sequence[Any], processors: Sequence[Any], capture: Capture) -> Iterator[None]:
    """Attention layers of diffusers with other processors until the block ends; their capture listens so long."""
    before = [attention.processor for attention in attentions]
    try:
        for attention, processor in zip(attentions, processors, strict=True):
            attention.set_processor(processor)
        yield
    finally:
        capture.listening = False
        for attention, processor in zip(attentions, before, strict=True):
            attention.set_processor(processor)
