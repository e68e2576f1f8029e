"""The attention of a diffusers UNet, captured while it predicts.

A layer's attention processor is exchanged for one that computes its weights in the open beside its output, for the
length of a ``with`` block and for the layers that were asked for only. All outputs are the fused kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from icekit.protocols import Attention, Grid

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention as DiffusersAttention

Kind = Literal["self", "cross"]
MOST_WEIGHTS = 2**26
"""Most attention weights that are computed at once: 256 MB in float32."""
KEPT_WEIGHTS = 2**20
"""Most attention weights of a layer that are kept for their gradient, 4 MB; of more they are computed twice."""


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


def mean_weights(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """The mean over heads of ``attention_weights``: float32 ``[B, N, M]``; every row sums to one.

    Some heads at a time, as many as ``MOST_WEIGHTS`` allows, for all of them are the largest thing there is in a UNet.

    Args:
        query: ``[B, heads, N, d]``.
        key: ``[B, heads, M, d]``.
        scale: see ``attention_weights``.
        bias: see ``attention_weights``; broadcastable to ``[B, heads, N, M]``.
    """
    heads = query.shape[1]
    at_once = max(1, MOST_WEIGHTS // (query.shape[0] * query.shape[2] * key.shape[2]))
    if at_once >= heads:
        return attention_weights(query, key, scale, bias).mean(dim=1)
    total = query.new_zeros(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float32)
    for start in range(0, heads, at_once):
        some = slice(start, start + at_once)
        chosen = bias if bias is None or bias.shape[1] == 1 else bias[:, some]
        total = total + attention_weights(query[:, some], key[:, some], scale, chosen).sum(dim=1)
    return total / heads


class Maps:
    """The sums of what a prediction's layers saw, one for each kind and grid; what a single layer saw is not kept."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Kind, Grid], Tensor] = {}
        self._seen: dict[tuple[Kind, Grid], list[AttentionLayer]] = {}

    def add(self, layer: AttentionLayer, weights: Tensor) -> None:
        """Add a layer's weights, ``[B, N, M]``; a layer that was there before begins another prediction."""
        key = layer.kind, layer.grid
        if layer in self._seen.get(key, ()):
            del self._sums[key], self._seen[key]
        self._sums[key] = weights if key not in self._sums else self._sums[key] + weights
        self._seen.setdefault(key, []).append(layer)

    def means(self) -> Attention:
        """What the last prediction saw, mean over heads and over the layers of a grid; the finest grid first."""

        def of(kind: Kind) -> list[tuple[Grid, Tensor]]:
            found = [(grid, total / len(self._seen[one, grid])) for (one, grid), total in self._sums.items()
                     if one == kind]  # fmt: skip
            return sorted(found, key=lambda pair: pair[0], reverse=True)

        return Attention(
            words=tuple(weights.transpose(1, 2).unflatten(2, grid) for grid, weights in of("cross")),
            pixels=tuple(weights.unflatten(2, grid).unflatten(1, grid) for grid, weights in of("self")),
        )


class CapturingProcessor:
    """A diffusers attention processor: what ``AttnProcessor2_0`` computes, by the same kernel, with its weights told.

    The weights are computed beside the output, in the open. Of a large layer they are computed once more for their
    gradient: a step of learning holds none but the mean over heads, and of the layer itself no more than without.
    """

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        """tell: called in each forward pass with the mean over heads, float32 ``[B, N, M]``; gradients flow through."""
        self._tell = tell

    def __call__(
        self,
        attn: DiffusersAttention,
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
        if torch.is_grad_enabled() and query.shape[:3].numel() * key.shape[2] > KEPT_WEIGHTS:
            weights = checkpoint(
                mean_weights, query, key, attn.scale, attention_mask, use_reentrant=False, preserve_rng_state=False
            )
        else:
            weights = mean_weights(query, key, attn.scale, attention_mask)
        self._tell(weights)

        attended = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


@contextmanager
def capture_attention(unet: nn.Module, layers: Sequence[AttentionLayer]) -> Iterator[Maps]:
    """Let these layers tell their weights until the block ends.

    A pass that is made again after the block, for the gradient, computes the same and tells nothing.

    Yields:
        What was seen, to be asked for when the prediction is made.
    """
    attentions: dict[AttentionLayer, Any] = {layer: unet.get_submodule(layer.name) for layer in layers}
    before = {layer: attention.processor for layer, attention in attentions.items()}
    maps, listening = Maps(), True

    def telling(layer: AttentionLayer) -> Callable[[Tensor], None]:
        def tell(weights: Tensor) -> None:
            if listening:
                maps.add(layer, weights)

        return tell

    try:
        for layer, attention in attentions.items():
            attention.set_processor(CapturingProcessor(telling(layer)))
        yield maps
    finally:
        listening = False
        for layer, attention in attentions.items():
            attention.set_processor(before[layer])


def checkpointed(module: nn.Module, *arguments: Any) -> Any:
    """Call a block of a noise predictor, keep nothing of its inside, and compute it again for the gradient.

    For diffusers' ``enable_gradient_checkpointing``. The second pass has the attention processors that the first had,
    whatever they are by then: the captured maps are in the graph, too.
    """
    attentions: list[Any] = [one for one in module.modules() if hasattr(one, "set_processor")]
    first = [attention.processor for attention in attentions]

    @contextmanager
    def as_at_first() -> Iterator[None]:
        now = [attention.processor for attention in attentions]
        try:
            for attention, processor in zip(attentions, first, strict=True):
                attention.set_processor(processor)
            yield
        finally:
            for attention, processor in zip(attentions, now, strict=True):
                attention.set_processor(processor)

    return checkpoint(
        module,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn: models are in eval mode
        context_fn=lambda: (nullcontext(), as_at_first()),
    )
