"""Learners that learn nothing: plain words and random rows in place of learned tokens. The ends of every scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from icekit.builtin.learners.settings import DescribedTokenSettings, RandomTokenSettings, WordTokenSettings
from icekit.learning.hints import hinted_token
from icekit.learning.rows import finished, weighted_sum
from icekit.learning.training import S, Task, TaskLearner
from icekit.protocols import (
    Attribute,
    InputError,
    Learned,
    Region,
    token_names,
)
from icekit.randomness import seeded_generator


class _Untaught(TaskLearner[S]):
    """A learner without a model to train: every concept's rows follow from its words."""

    def teach(self, task: Task) -> Learned:
        """Look the rows up or draw them."""
        tokens: dict[str, dict[str, Tensor]] = {}
        for region in task.regions:
            tokens |= self.rows(region, token_names(region, task.attributes), task.attributes, task.seed)
        return Learned(finished(tokens))

    @abstractmethod
    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, dict[str, Tensor]]:
        """One concept's tokens with their rows; names: the tokens by part."""


class WordTokens(_Untaught[WordTokenSettings]):
    """Plain words in place of learned tokens: what a run would be worth if learning found just these words."""

    Settings = WordTokenSettings

    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, dict[str, Tensor]]:
        """The words' rows.

        Raises:
            InputError: words for a token that is not learned.
        """
        given = self.settings.words[region.index] if region.index < len(self.settings.words) else {}
        if strange := sorted(given.keys() - names.keys()):
            raise InputError(f"learner.words: {strange[0]!r} is no token of a concept: {', '.join(names)}")
        words = {"category": region.word, "instance": region.word}
        words |= {attribute.name: attribute.anchor for attribute in attributes}
        words |= given
        return {names[part]: self.backbone.word_rows(words[part]) for part in names}


class DescribedTokens(_Untaught[DescribedTokenSettings]):
    """The words that the retriever sees in each region (``naming = described``): nothing is learned.

    What another learner is worth beside it is what learning adds.
    """

    Settings = DescribedTokenSettings

    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, dict[str, Tensor]]:
        """The category is the region's word, an attribute its described words, the instance the mean or sum of those.

        Raises:
            InputError: nobody described the region.
        """
        rows: dict[str, dict[str, Tensor]] = {}
        for one in attributes:
            token = hinted_token(region, one, self.backbone, likeliest=self.settings.rows == "likeliest")
            if token is None:
                raise InputError(
                    f"learner 'described' has no word for the {one.name} of {region.word!r} (concept {region.index}): "
                    "it needs naming = described and a retriever that describes, such as clip"
                )
            rows[names[one.name]] = token
        word = self.backbone.word_rows(region.word)
        described = list(rows.values())
        weight = 1 / len(rows) if rows and self.settings.instance == "mean" else 1.0
        instance = weighted_sum(described, [weight] * len(rows)) if rows else word
        return rows | {names["category"]: word, names["instance"]: instance}


class RandomTokens(_Untaught[RandomTokenSettings]):
    """Random rows in place of learned tokens, each as long as the row of the concept's word."""

    Settings = RandomTokenSettings

    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, dict[str, Tensor]]:
        """Each row follows from the seed and its token's name."""
        word = self.backbone.word_rows(region.word)
        rows: dict[str, dict[str, Tensor]] = {}
        for token in names.values():
            generator = seeded_generator(seed, token)
            drawn = {encoder: torch.randn(len(row), generator=generator) for encoder, row in word.items()}
            rows[token] = {encoder: row * (float(word[encoder].norm()) / row.norm()) for encoder, row in drawn.items()}
        return rows
