"""Text encoders of diffusion transformers, read as their pipelines read them. See ``icekit.backbones.text_encoder``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from icekit.backbones.text_encoder import NO_ROWS, TextEncoder

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")


class ClipEncoder(TextEncoder):
    """A CLIP text encoder, with or without a projection, whose pooled vector is at a prompt's end.

    transformers reads it at the highest token id where a model's configuration has the old ``eos_token_id`` of 2, as
    published ones have: that would be an extra token's place wherever there is one.
    """

    def states_and_pooled(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> tuple[Tensor, Tensor]:
        """The second last layer's states ``[B, length, C]``, and the pooled vectors ``[B, P]``, projected where the
        model has a projection.

        Raises:
            InputError: see ``token_ids``.
        """
        outputs = self.outputs(prompts, rows, output_hidden_states=True)
        return outputs.hidden_states[-2], self._pooled(outputs, prompts, rows)

    def pooled(self, prompts: Sequence[str], rows: Mapping[str, Tensor] = NO_ROWS) -> Tensor:
        """The pooled vectors ``[B, P]``. Raises InputError, see ``token_ids``."""
        return self._pooled(self.outputs(prompts, rows), prompts, rows)

    def _pooled(self, outputs: Any, prompts: Sequence[str], rows: Mapping[str, Tensor]) -> Tensor:
        ends = self.ends(self.token_ids(prompts, rows))
        states = outputs.last_hidden_state[torch.arange(len(prompts), device=ends.device), ends]
        projection = getattr(self.model, "text_projection", None)
        return states if projection is None else projection(states)


class T5Encoder(TextEncoder):
    """T5's encoder: prompts of a fixed length, padded, whose padding is attended to, as the pipelines do it.

    Hand the length over: T5 knows of no longest prompt. A prompt begins with its first word and ends with ``</s>``.
    """
