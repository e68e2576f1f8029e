"""Tokens' rows: one for each text encoder, as values and as parameters that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from icekit.protocols import Token, Tokens

TokenParameters = dict[str, dict[str, nn.Parameter]]
"""Tokens whose rows are trained: name -> text encoder -> row."""


def weighted_sum(tokens: Sequence[Token], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i weights[i] tokens[i], encoder by encoder; float32. At least one token."""
    return {name: sum_of_rows([token[name].float() for token in tokens], weights) for name in tokens[0]}


def sum_of_rows(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights[i] rows[i], ``[D]``."""
    stacked = torch.stack(list(rows))
    return torch.tensor(weights, dtype=stacked.dtype, device=stacked.device) @ stacked


def mean_token(tokens: Sequence[Token]) -> dict[str, Tensor]:
    """The mean of tokens, encoder by encoder; float32."""
    return weighted_sum(tokens, [1 / len(tokens)] * len(tokens))


def parameters(tokens: Tokens, device: torch.device) -> TokenParameters:
    """Copies of these tokens as parameters, float32, that no gradient is asked of yet."""
    return {
        name: {
            encoder: nn.Parameter(row.detach().to(device, torch.float32).clone(), requires_grad=False)
            for encoder, row in token.items()
        }
        for name, token in tokens.items()
    }


def assign(token: Mapping[str, Tensor], values: Token) -> None:
    """Give a token other rows, in place."""
    for encoder, row in token.items():
        row.data.copy_(values[encoder].data)


def flat(tokens: TokenParameters, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """All rows of these tokens by names of their own, ``<cup-0>/clip_l``: what optimisers and checkpoints hold."""
    chosen = tokens if names is None else {name: tokens[name] for name in names}
    return {f"{name}/{encoder}": row for name, token in chosen.items() for encoder, row in token.items()}


def finished(tokens: Tokens, names: Iterable[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Tokens as ``Learned`` wants them: float32 copies on the CPU."""
    chosen = tokens if names is None else {name: tokens[name] for name in names}
    return {
        name: {encoder: row.detach().float().cpu().clone() for encoder, row in token.items()}
        for name, token in chosen.items()
    }
