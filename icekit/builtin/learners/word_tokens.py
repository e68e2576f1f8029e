"""Learners that learn nothing: plain words and random rows in place of learned tokens. The ends of every scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from icekit.learning.hints import hinted_row
from icekit.learning.training import S, Task, TaskLearner
from icekit.protocols import (
    Attribute,
    ComponentSettings,
    InputError,
    Learned,
    Region,
    token_names,
)
from icekit.randomness import seeded_generator


class WordTokenSettings(ComponentSettings):
    """Settings of the ``words`` learner."""

    words: tuple[dict[str, str], ...] = Field(
        (),
        description="for each concept in turn, the words of its tokens: "
        '{category = "cup", instance = "red metal", colour = "red"}; the category and the instance that are not '
        "given are the concept's own word, an attribute is its anchor",
    )


class DescribedTokenSettings(ComponentSettings):
    """Settings of the ``described`` learner."""

    rows: Literal["mean", "likeliest"] = Field(
        "mean",
        description="an attribute's row: the mean of the rows of its words, each as much as it is likely, which is "
        "what ICE starts from; or the row of the likeliest word alone",
    )


class RandomTokenSettings(ComponentSettings):
    """Settings of the ``random`` learner: there are none."""


class _Untaught(TaskLearner[S]):
    """A learner without a model to train: every concept's rows follow from its words."""

    def teach(self, task: Task) -> Learned:
        """Look the rows up or draw them."""
        tokens: dict[str, Tensor] = {}
        for region in task.regions:
            tokens |= self.rows(region, token_names(region, task.attributes), task.attributes, task.seed)
        return Learned(tokens)

    @abstractmethod
    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, Tensor]:
        """One concept's rows by token; names: its tokens."""


class WordTokens(_Untaught[WordTokenSettings]):
    """Plain words in place of learned tokens: what a run would be worth if learning found just these words."""

    Settings = WordTokenSettings

    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, Tensor]:
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
        return {names[part]: self.backbone.word_embedding(words[part]).float().cpu() for part in names}


class DescribedTokens(_Untaught[DescribedTokenSettings]):
    """The words that the retriever sees in each region (``describe``) in place of learned tokens: nothing is learned.

    What another learner is worth beside it is what learning adds.
    """

    Settings = DescribedTokenSettings

    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, Tensor]:
        """The category is the region's word, an attribute its described words, the instance the mean of those.

        Raises:
            InputError: nobody described the region.
        """
        rows: dict[str, Tensor] = {}
        for one in attributes:
            row = hinted_row(region, one, self.backbone, likeliest=self.settings.rows == "likeliest")
            if row is None:
                raise InputError(
                    f"learner 'described' has no word for the {one.name} of {region.word!r} (concept {region.index}): "
                    "it needs describe = true and a retriever that describes, such as clip"
                )
            rows[names[one.name]] = row
        word = self.backbone.word_embedding(region.word).float()
        instance = torch.stack(list(rows.values())).mean(dim=0) if rows else word
        rows |= {names["category"]: word, names["instance"]: instance}
        return {token: row.detach().cpu() for token, row in rows.items()}


class RandomTokens(_Untaught[RandomTokenSettings]):
    """Random rows in place of learned tokens, each as long as the row of the concept's word."""

    Settings = RandomTokenSettings

    def rows(
        self, region: Region, names: Mapping[str, str], attributes: Sequence[Attribute], seed: int
    ) -> dict[str, Tensor]:
        """Each row follows from the seed and its token's name."""
        length = float(self.backbone.word_embedding(region.word).norm())
        drawn = {
            token: torch.randn(self.backbone.embedding_dim, generator=seeded_generator(seed, token))
            for token in names.values()
        }
        return {token: row * (length / row.norm()) for token, row in drawn.items()}
