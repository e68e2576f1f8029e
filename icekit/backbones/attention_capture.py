"""The attention of a diffusers UNet, captured while it predicts.

A layer's attention processor is exchanged for one that computes its weights in the open, for the length of a ``with``
block and for the layers that were asked for only. All other layers keep the processor they have (the fused kernel).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from icekit.protocols import InputError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

Kind = Literal["self", "cross"]
PLACES = ("down", "mid", "up")


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a UNet.

    name: its module path (``down_blocks.0.attentions.0.transformer_blocks.0.attn2``).
    kind: ``self`` (pixels to pixels) or ``cross`` (pixels to prompt positions).
    place: ``down``, ``mid`` or ``up``.
    resolution: the side of its square grid of pixels.
    """

    name: str
    kind: Kind
    place: str
    resolution: int


def attention_layers(unet: UNet2DConditionModel, latent_side: int) -> list[AttentionLayer]:
    """The self- and cross-attention layers of a UNet, in its order, for square latents of ``latent_side``.

    The grids follow from the structure: level i of the down path works at the side halved i times (rounded up, as its
    strided convolution does), the middle at the last level's, the up path runs back through them.
    """
    sides = [latent_side]
    for block in list(unet.down_blocks)[:-1]:
        sides.append(sides[-1] if block.downsamplers is None else ceil(sides[-1] / 2))
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
                place=block.partition("_")[0],
                resolution=sides[::-1][level] if block == "up_blocks" else sides[level],
            )
        )
    return layers


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


class CapturedAttention:
    """What the layers captured: ``protocols.AttentionMaps``."""

    def __init__(self, layers: Collection[tuple[AttentionLayer, CapturingProcessor]]) -> None:
        self._layers = tuple(layers)

    def cross(self, resolution: int) -> Tensor:
        """Cross-attention, mean over heads and captured layers of this resolution: float32 ``[B, L, r, r]``."""
        weights = self._mean("cross", resolution)
        return weights.transpose(1, 2).unflatten(2, (resolution, resolution))

    def self_(self, resolution: int) -> Tensor:
        """Self-attention, mean over heads and captured layers: float32 ``[B, r*r, r*r]``, queries first."""
        return self._mean("self", resolution)

    def _mean(self, kind: Kind, resolution: int) -> Tensor:
        weights = [
            processor.weights
            for layer, processor in self._layers
            if layer.kind == kind and layer.resolution == resolution
        ]
        if not weights:
            raise LookupError(f"{kind}-attention at {resolution}x{resolution} was not captured")
        kept = [tensor for tensor in weights if tensor is not None]
        if len(kept) < len(weights):
            raise LookupError("nothing was predicted inside the block yet, so there is no attention to look at")
        return torch.stack(kept).mean(dim=0)


@contextmanager
def capture_attention(
    unet: UNet2DConditionModel,
    layers: Collection[AttentionLayer],
    cross: Collection[int] = (),
    self_: Collection[int] = (),
    places: Collection[str] = PLACES,
) -> Iterator[CapturedAttention]:
    """Let the layers at these resolutions and places keep their weights until the block ends.

    Args:
        unet: the model.
        layers: all of its layers, from ``attention_layers``.
        cross: sides of the grids whose cross-attention is wanted.
        self_: sides of the grids whose self-attention is wanted.
        places: of ``down``, ``mid`` and ``up``.

    Raises:
        InputError: a resolution that the model has no layer for, at these places.
    """
    wanted: list[AttentionLayer] = []
    for kind, resolutions in (("cross", cross), ("self", self_)):
        here = [layer for layer in layers if layer.kind == kind and layer.place in places]
        for resolution in dict.fromkeys(resolutions):
            matching = [layer for layer in here if layer.resolution == resolution]
            if not matching:
                known = ", ".join(str(side) for side in sorted({layer.resolution for layer in here}, reverse=True))
                raise InputError(
                    f"attention resolution {resolution}: the model has no {kind}-attention of that size in its "
                    f"{'/'.join(places)} blocks, only {known or 'none'}"
                )
            wanted += matching
    chosen = [(layer, unet.get_submodule(layer.name), CapturingProcessor()) for layer in wanted]
    before = [(attention, attention.processor) for _, attention, _ in chosen]
    try:
        for _, attention, processor in chosen:
            attention.set_processor(processor)
        yield CapturedAttention([(layer, processor) for layer, _, processor in chosen])
    finally:
        for attention, processor in before:
            attention.set_processor(processor)
