"""What the backbones share whose prompts are read by one language model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icekit.backbones.common import rows_for
from icekit.protocols import NO_TOKENS, Conditioning, InputError, Tokens
from icekit_dit.llm_encoder import LanguageModel
from icekit_dit.transformer import TransformerBackbone


class LanguageBackbone(TransformerBackbone):
    """A diffusion transformer that is shown the states of a language model. A token has one row."""

    encoder: str
    """The name of the row."""
    large_encoders = ("text_encoder",)
    pipeline_takes_space = True

    @property
    def _text(self) -> LanguageModel:
        text = self._texts[self.encoder]
        assert isinstance(text, LanguageModel)
        return text

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """What the transformer is shown of the language model's states, ``[B, L, C]``, and a mask of the positions that
        are the prompt's.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``.
        """
        states, mask = self._text.encode_words(prompts, rows_for(self.encoder, tokens))
        return Conditioning({"sequence": states.float(), "mask": mask})

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """The mean of the language model's last states at a text's words, without what is around every prompt.

        Raises:
            InputError: a text too long or with an unknown ``<token>``; a ``pool``.
        """
        if pool is not None:
            raise InputError(f"pooling {pool!r}: texts of this model are read in one way (none)")
        return self._text.embed(texts, rows_for(self.encoder, tokens))

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """See ``protocols.Backbone``."""
        return self._text.token_positions(prompt, words, rows_for(self.encoder, tokens))
