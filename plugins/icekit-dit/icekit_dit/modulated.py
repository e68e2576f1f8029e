"""FLUX.1 and Stable Diffusion 3.x with tokens that have an offset of the modulation beside their rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from icekit.backbones.common import fingerprint, rows_for
from icekit.protocols import NO_TOKENS, Conditioning, InputError, Tokens
from icekit_dit.flux import Flux
from icekit_dit.modulation import MODULATION, Offsets, offset_modulation
from icekit_dit.modulation_settings import ModulatedFluxSettings, ModulatedStableDiffusion3Settings
from icekit_dit.sd3 import StableDiffusion3
from icekit_dit.settings import TransformerSettings
from icekit_dit.transformer import TransformerBackbone

VALUES, POSITIONS = "modulation", "modulated"
"""Parts of a ``Conditioning``: the two of ``Offsets``."""


class Modulated(TransformerBackbone):
    """Write it before a family: its tokens have one more row, ``modulation``, of the width of the transformer.

    A word's is zero, which changes nothing. ``embed_texts`` has a further way to read texts, ``pool = "modulation"``:
    as the vector that the blocks are told of a text, with the mean of its tokens' offsets.
    """

    @abstractmethod
    def _pooled(self, texts: Sequence[str], tokens: Tokens) -> Tensor:
        """The pooled text, as the transformer takes it: ``[B, P]``."""

    @property
    def _embedder(self) -> Any:
        """What makes the text's part of the modulation from the pooled text."""
        return self.transformer.time_text_embed.text_embedder

    def _take_apart(self, pipeline: Any, settings: TransformerSettings, device: torch.device) -> None:
        super()._take_apart(pipeline, settings, device)
        space = self._embedder.linear_2.weight
        self.rows = {**self.rows, MODULATION: len(space)}
        self.identity = f"{self.identity}, {fingerprint({MODULATION: space})}"

    def word_rows(self, word: str, pieces: Any = "mean") -> dict[str, Tensor]:
        """See ``protocols.Backbone``; the offset of a word is zero."""
        width = len(self._embedder.linear_2.weight)
        return {**super().word_rows(word, pieces), MODULATION: torch.zeros(width, device=self.device)}

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """See the family's; with the offsets of its tokens.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``.
        """
        encoded = super().encode_prompts(prompts, tokens)  # type: ignore[safe-super]  # the family's
        rows = self._offsets(tokens)
        if not rows:
            return encoded
        found = [self._tokens_in(prompt, rows, tokens) for prompt in prompts]
        if not any(found):
            return encoded
        offsets = Offsets.of({name: row.to(self.device) for name, row in rows.items()}, found)
        return Conditioning({**encoded.parts, VALUES: offsets.values, POSITIONS: offsets.positions})

    def _offsets(self, tokens: Tokens) -> dict[str, Tensor]:
        """The tokens' offsets, without those that are zero and stay so.

        Raises:
            InputError: a token without one, or of another length.
        """
        rows, width = rows_for(MODULATION, tokens), self.rows[MODULATION] if tokens else 0
        for name, row in rows.items():
            if tuple(row.shape) != (width,):
                raise InputError(
                    f"token {name}: its row for {MODULATION} has shape {list(row.shape)}, this model's have [{width}]"
                )
        return {name: row for name, row in rows.items() if row.requires_grad or bool(row.any())}

    def _tokens_in(self, prompt: str, rows: Mapping[str, Tensor], tokens: Tokens) -> dict[str, list[int]]:
        """The tokens of a prompt that have an offset, with their positions."""
        names = [name for name in rows if name in prompt]
        return dict(zip(names, self.token_positions(prompt, names, tokens), strict=True)) if names else {}

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """See the family's; with ``pool`` "modulation" as what the blocks are told of them, ``[B, D]`` of length one.

        Raises:
            InputError: a text too long or with an unknown ``<token>``; another ``pool``.
        """
        if pool != MODULATION:
            return super().embed_texts(texts, tokens, pool)  # type: ignore[safe-super]  # the family's
        pooled, rows = self._pooled(texts, tokens), self._offsets(tokens)
        self._parts.use("transformer")
        told = self._embedder(pooled.to(self.transformer.dtype)).float()
        means = []
        for text in texts:
            own = [row.to(told) for name, row in rows.items() if name in text]
            means.append(torch.stack(own).mean(dim=0) if own else torch.zeros_like(told[0]))
        return normalize(told + torch.stack(means), dim=-1)

    def _transform(self, noisy: Tensor, sigmas: Tensor, prompts: Conditioning) -> Tensor:
        with self._with_offsets(prompts):
            return super()._transform(noisy, sigmas, prompts)  # type: ignore[safe-super]  # the family's

    def _sampling(self, prompts: Conditioning, empty: Conditioning, *, guided: bool) -> AbstractContextManager[None]:
        """See ``PipelineBackbone``."""
        return self._with_offsets(prompts)

    def _with_offsets(self, prompts: Conditioning) -> AbstractContextManager[None]:
        parts = prompts.parts
        return offset_modulation(
            self.transformer, Offsets(parts[VALUES], parts[POSITIONS]) if VALUES in parts else None
        )


class ModulatedFlux(Modulated, Flux):
    """Any FLUX.1 model, whose tokens have an offset of the modulation beside their rows."""

    Settings = ModulatedFluxSettings
    advice_on_rows = ""  # rows are not learned alone here

    def _pooled(self, texts: Sequence[str], tokens: Tokens) -> Tensor:
        return self._clip.pooled(texts, rows_for("clip_l", tokens))


class ModulatedStableDiffusion3(Modulated, StableDiffusion3):
    """Any Stable Diffusion 3.x model, whose tokens have an offset of the modulation beside their rows."""

    Settings = ModulatedStableDiffusion3Settings

    def _pooled(self, texts: Sequence[str], tokens: Tokens) -> Tensor:
        both = [clip.pooled(texts, rows_for(name, tokens)) for name, clip in self._clips.items()]
        return torch.cat(both, dim=-1)
