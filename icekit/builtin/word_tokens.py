"""Learners that learn nothing: plain words and random rows in place of learned tokens. The ends of every scale."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from icekit.protocols import (
    Attribute,
    Backbone,
    Checkpoint,
    ComponentSettings,
    InputError,
    Learned,
    Region,
    Step,
    token_names,
)


class WordTokens:
    """Plain words in place of learned tokens: what a run would be worth if learning found just these words."""

    class Settings(ComponentSettings):
        """Settings of the ``words`` learner."""

        words: tuple[dict[str, str], ...] = Field(
            (),
            description="for each concept in turn, the words of its tokens: "
            '{category = "cup", instance = "red metal", colour = "red"}; the category and the instance that are not '
            "given are the concept's own word, an attribute is its anchor",
        )

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        self._words = settings.words
        self._backbone = backbone

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Look the words up; see ``protocols.Learner``.

        Raises:
            InputError: words for a token that is not learned.
        """
        tokens: dict[str, Tensor] = {}
        for region in regions:
            names = token_names(region, attributes)
            given = self._words[region.index] if region.index < len(self._words) else {}
            if strange := sorted(given.keys() - names.keys()):
                raise InputError(f"learner.words: {strange[0]!r} is no token of a concept: {', '.join(names)}")
            words = {"category": region.word, "instance": region.word}
            words |= {attribute.name: attribute.anchor for attribute in attributes}
            words |= given
            tokens |= {names[part]: self._backbone.word_embedding(words[part]).float().cpu() for part in names}
        return Learned(tokens)


class RandomTokens:
    """Random rows in place of learned tokens, each as long as the row of the concept's word."""

    class Settings(ComponentSettings):
        """Settings of the ``random`` learner: there are none."""

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        self._backbone = backbone

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Draw the rows, each from the seed and its token's name; see ``protocols.Learner``."""
        tokens: dict[str, Tensor] = {}
        for region in regions:
            length = float(self._backbone.word_embedding(region.word).norm())
            for token in token_names(region, attributes).values():
                digest = hashlib.sha256(f"{seed} {token}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                row = torch.randn(self._backbone.embedding_dim, generator=generator)
                tokens[token] = row * (length / row.norm())
        return Learned(tokens)
