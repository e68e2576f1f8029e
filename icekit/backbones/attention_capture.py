"""The attention of a diffusers UNet, captured while it predicts.

A layer's attention processor is exchanged for one that computes its weights in the open, for the length of a ``with``
block and for the layers that were asked for only. All other layers keep the processor they have (the fused kernel).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from icekit.protocols import Attention as Maps
from icekit.protocols import Grid

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

Kind = Literal["self", "cross"]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a UNet.

    name: its module path (``down_blocks.0.attentions.0.transformer_blocks.0.attn2``).
    kind: ``self`` (pixels to pixels) or ``cross`` (pixels to prompt positions).
    grid: (height, width) of its grid of pixels.
    """

    name: str
    kind: Kind
    grid: Grid


def attention_layers(unet: UNet2DConditionModel, latent: Grid) -> list[AttentionLayer]:
    """The self- and cross-attention layers of a UNet, in its order, for latents of (height, width) ``latent``.

    The grids follow from the structure: level i of the down path works at both sides halved i times (rounded up, as its
    strided convolution does), the middle at the last level's, the up path runs back through them.
    """
    grids = [latent]
    for block in list(unet.down_blocks)[:-1]:
        height, width = grids[-1]
        grids.append(grids[-1] if block.downsamplers is None else (ceil(height / 2), ceil(width / 2)))
    layers = []
    for processor_name in unet.attn_processors:
        name = processor_name.removesuffix(".processor")
        block, _, rest = name.partition(".")
        if not name.endswith((".attn1", ".attn2")) or block not in ("down_blocks", "mid_block", "up_blocks"):
            continue
        level = int(rest.partition(".")[0]) if block != "mid_block" else -1
        layers.append(
            AttentionLayer(
                name=name,
                kind="self" if name.endswith(".attn1") else "cross",
                grid=grids[::-1][level] if block == "up_blocks" else grids[level],
            )
        )
    return layers


def grids_of(layers: Iterable[AttentionLayer], kind: Kind) -> tuple[Grid, ...]:
    """The grids of the layers of one kind, each once, the finest first."""
    return tuple(sorted({layer.grid for layer in layers if layer.kind == kind}, reverse=True))


def attention_weights(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K^T * scale + bias) over the keys, computed in float32 (Vaswani et al., 2017, eq. 1).

    Args:
        query: ``[B, heads, N, d]``.
        key: ``[B, heads, M, d]``.
        scale: 1 / sqrt(d), usually.
        bias: added to the scores, broadcastable to ``[B, heads, N, M]``: an attention mask of 0 and large negatives.

    Returns:
        float32 ``[B, heads, N, M]``; every row (the M weights of one query) sums to one.
    """
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    return (scores if bias is None else scores + bias.float()).softmax(dim=-1)


class CapturingProcessor:
    """A diffusers attention processor: what ``AttnProcessor2_0`` computes, with the weights kept.

    ``weights`` holds the last forward pass's, mean over heads, float32 ``[B, N, M]``, part of the autograd graph.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``hidden_states`` ``[B, N, C]`` to ``encoder_hidden_states`` ``[B, M, D]`` (None: to itself)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        batch, positions, _ = context.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, positions, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        weights = attention_weights(query, key, attn.scale, attention_mask)
        self.weights = weights.mean(dim=1)

        attended = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](attended))
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


@contextmanager
def capture_attention(
    unet: nn.Module, layers: Sequence[AttentionLayer]
) -> Iterator[dict[AttentionLayer, CapturingProcessor]]:
    """Let these layers keep their weights until the block ends.

    Yields:
        What keeps each layer's weights.
    """
    attentions: dict[AttentionLayer, Any] = {layer: unet.get_submodule(layer.name) for layer in layers}
    before = {layer: attention.processor for layer, attention in attentions.items()}
    processors = {layer: CapturingProcessor() for layer in layers}
    try:
        for layer, attention in attentions.items():
            attention.set_processor(processors[layer])
        yield processors
    finally:
        for layer, attention in attentions.items():
            attention.set_processor(before[layer])


def maps_of(processors: dict[AttentionLayer, CapturingProcessor]) -> Maps:
    """What was captured in one prediction, mean over heads and over the layers of a grid; the finest grid first."""

    def mean(kind: Kind, grid: Grid) -> Tensor:
        kept = [one.weights for layer, one in processors.items() if layer.kind == kind and layer.grid == grid]
        weights = [tensor for tensor in kept if tensor is not None]
        assert len(weights) == len(kept), "nothing was predicted inside the block yet"
        return torch.stack(weights).mean(dim=0)

    return Maps(
        words=tuple(mean("cross", grid).transpose(1, 2).unflatten(2, grid) for grid in grids_of(processors, "cross")),
        pixels=tuple(mean("self", grid).unflatten(2, grid).unflatten(1, grid) for grid in grids_of(processors, "self")),
    )
