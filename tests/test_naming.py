"""Naming a token: the arithmetic by hand, and a word's own embedding found again."""

import plain_components as plain
import torch

from icekit.naming import TEMPLATES, name_attribute, nearest_words
from icekit.protocols import Attribute


def test_mean_cosine_by_hand() -> None:
    token = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # two templates
    words = torch.tensor(
        [
            [[0.0, 1.0], [1.0, 0.0]],  # (0 + 0) / 2
            [[0.6, 0.8], [0.6, 0.8]],  # (0.6 + 0.8) / 2
            [[1.0, 0.0], [0.6, 0.8]],  # (1 + 0.8) / 2
            [[-1.0, 0.0], [0.0, 1.0]],  # (-1 + 1) / 2, as good as the first, which comes before it
        ]
    )
    assert nearest_words(token, words, ["a", "b", "c", "d"], count=4) == ["c", "b", "a", "d"]
    assert nearest_words(token, words, ["a", "b", "c", "d"], count=1) == ["c"]


def test_the_embedding_of_a_word_is_named_by_it() -> None:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    backbone.set_tokens({"<cup-0-colour>": plain.embedding_of("teal")})
    colour = Attribute("colour", "colour", ("red", "maroon", "teal", "blue"))
    names = name_attribute(backbone, colour, "<cup-0-colour>", "cup")
    assert names[0] == "teal"
    assert sorted(names) == ["blue", "red", "teal"]  # maroon is no word of this model's
    assert name_attribute(backbone, Attribute("x", "x", ("maroon",)), "<cup-0-colour>", "cup") == []
    assert all("{}" in template for template in TEMPLATES)
