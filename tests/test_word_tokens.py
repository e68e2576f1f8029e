"""The learners at the ends of the scale: plain words, and luck."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import plain_components as plain
import pytest
import torch
from learning import row_of, rows_of

from icekit import InputError, Region
from icekit.builtin.attributes import COLOUR, MATERIAL
from icekit.builtin.learners.word_tokens import DescribedTokens, RandomTokens, WordTokens

BACKBONE = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
REGIONS = [Region(0, "cup", 1.0, plain.quadrant("cup")), Region(1, "ball", 1.0, plain.quadrant("ball"))]


def learn(learner: Any, seed: int = 0, regions: Sequence[Region] = REGIONS) -> dict[str, torch.Tensor]:
    learned = learner.learn(
        torch.zeros(3, plain.SIDE, plain.SIDE),
        regions,
        [COLOUR, MATERIAL],
        seed=seed,
        checkpoint=None,
        on_step=lambda step: None,
    )
    return rows_of(learned.tokens)


def test_words() -> None:
    words = ({"instance": "red metal", "colour": "red"},)
    tokens = learn(WordTokens(WordTokens.Settings(words=words), BACKBONE))
    expected = {
        "<cup-0>": "cup",
        "<cup-0-instance>": "red metal",
        "<cup-0-colour>": "red",
        "<cup-0-material>": "material",  # not given: the attribute's anchor
        "<ball-1>": "ball",
        "<ball-1-instance>": "ball",
        "<ball-1-colour>": "colour",
        "<ball-1-material>": "material",
    }
    assert tokens.keys() == expected.keys()
    for token, word in expected.items():
        torch.testing.assert_close(tokens[token], row_of(BACKBONE, word))
    with pytest.raises(InputError, match=r"^learner.words: 'shape' is no token of a concept: category, instance, "):
        learn(WordTokens(WordTokens.Settings(words=({"shape": "cup"},)), BACKBONE))


@pytest.mark.parametrize(("instance", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_described(instance: str, weight: float) -> None:
    """Each attribute its words, as much as they are likely; the instance the mean of the attributes, or their sum."""
    hints = {"colour": {"red": 0.75, "green": 0.25}, "material": {"metal": 1.0}}
    learner = DescribedTokens(DescribedTokens.Settings(instance=instance), BACKBONE)
    tokens = learn(learner, regions=[replace(REGIONS[0], hints=hints)])
    colour = 0.75 * row_of(BACKBONE, "red") + 0.25 * row_of(BACKBONE, "green")
    metal = row_of(BACKBONE, "metal")
    torch.testing.assert_close(tokens["<cup-0-colour>"], colour)
    torch.testing.assert_close(tokens["<cup-0-material>"], metal)
    torch.testing.assert_close(tokens["<cup-0>"], row_of(BACKBONE, "cup"))
    torch.testing.assert_close(tokens["<cup-0-instance>"], weight * (colour + metal))


def test_random() -> None:
    learner = RandomTokens(RandomTokens.Settings(), BACKBONE)
    tokens = learn(learner)
    assert len(tokens) == 8
    for token, row in tokens.items():
        word = "cup" if "cup" in token else "ball"
        torch.testing.assert_close(row.norm(), row_of(BACKBONE, word).norm())
    assert torch.stack(list(tokens.values())).unique(dim=0).shape[0] == 8
    assert all(torch.equal(tokens[token], row) for token, row in learn(learner).items())
    assert not torch.equal(tokens["<cup-0>"], learn(learner, seed=1)["<cup-0>"])
