"""Naming a token: the arithmetic by hand, and a word's own embedding found again."""

import plain_components as plain
import torch

from icekit.protocols import Attribute
from icekit.run.naming import TEMPLATES, name_attribute, nearest_words


def test_mean_centred_cosine_by_hand() -> None:
    # Two templates; around their mean (5, 5) the words are (1, 0), (0, 1), (-1, -1), in the second one mirrored.
    around = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]], [[-1.0, -1.0], [1.0, 1.0]]])
    words = around + 5
    token = torch.tensor([[5.8, 5.6], [4.2, 4.4]])  # (0.8, 0.6): cosines 0.8, 0.6 and -0.99
    assert nearest_words(token, words, ["a", "b", "c"], count=3) == ["a", "b", "c"]
    assert nearest_words(10 - token, words, ["a", "b", "c"], count=2) == ["c", "b"]
    even = torch.full((2, 2), 6.0)
    even[1] = 4.0  # as near to the first as to the second: in the order of the names
    assert nearest_words(even, words, ["a", "b", "c"], count=1) == ["a"]


def test_the_embedding_of_a_word_is_named_by_it() -> None:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    tokens = {"<cup-0-colour>": {"clip_l": plain.embedding_of("teal")}}
    colour = Attribute("colour", "colour", ("red", "maroon", "teal", "blue"))
    names = name_attribute(backbone, colour, "<cup-0-colour>", tokens, "cup")
    assert names[0] == "teal"
    assert sorted(names) == ["blue", "red", "teal"]  # maroon is no word of this model's
    assert name_attribute(backbone, Attribute("x", "x", ("maroon",)), "<cup-0-colour>", tokens, "cup") == []
    assert all("{}" in template for template in TEMPLATES)
