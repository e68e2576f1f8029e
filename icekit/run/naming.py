"""Name a learned attribute token in plain language: the nearest words of the attribute's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from icekit.protocols import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from icekit.protocols import Attribute, Backbone, Tokens

TEMPLATES = ("{}", "a {} {noun}", "a photo of a {} {noun}")
"""Prompts in which token and word are compared; ``{noun}`` is the concept's own word, so that both have its company."""

SHOWN_WORDS = 5
"""Most words of an attribute that a message shows."""


def nearest_words(token: Tensor, words: Tensor, names: Sequence[str], count: int = 3) -> list[str]:
    """The words nearest to a token: mean over templates of the cosine in the text encoder's pooled space E, centred.

    score(w) = 1/T sum_t cos(E(template_t with the token) - m_t, E(template_t with w) - m_t),
    m_t = 1/W sum_w E(template_t with w)

    Centred on the vocabulary's mean, because a word that the encoder has seen little lies near everything.

    Args:
        token: float ``[T, P]``, the token in T templates, each row of length one.
        words: float ``[W, T, P]``, each word in the same templates, each row of length one.
        names: the W words.
        count: how many to return.

    Returns:
        Words, best first; equal scores in the order of ``names``.
    """
    import torch

    mean = words.mean(dim=0)
    scores = torch.nn.functional.cosine_similarity(words - mean, token - mean, dim=-1).mean(dim=-1)
    order = scores.sort(descending=True, stable=True).indices
    return [names[int(i)] for i in order[:count]]


def known_words(backbone: Backbone, attribute: Attribute) -> list[str]:
    """The words of an attribute's vocabulary that the backbone's text encoder knows."""
    return [word for word in attribute.vocabulary if backbone.knows(word)]


def check_words(name: str, backbone: Backbone, attributes: Sequence[Attribute]) -> None:
    """Whether the backbone of this name knows a word of each attribute that has some: to be known before any learning.

    Raises:
        InputError: it knows none: a token would be learned that nothing can be called.
    """
    for one in attributes:
        if one.vocabulary and not known_words(backbone, one):
            some = ", ".join(one.vocabulary[:SHOWN_WORDS]) + ", ..." * (len(one.vocabulary) > SHOWN_WORDS)
            raise InputError(
                f"attribute {one.name!r}: backbone {name!r} knows none of its words ({some}), so that its token would "
                f"mean nothing: give it words that this backbone knows, or take another backbone"
            )


def name_attribute(
    backbone: Backbone, attribute: Attribute, token: str, tokens: Tokens, noun: str, count: int = 3
) -> list[str]:
    """Name a token with words of the attribute's vocabulary that the backbone's text encoder knows.

    tokens: its rows, and maybe others'. noun: its concept's word.

    Returns an empty list when the text encoder knows none of the words. Where the noun is so long that a prompt with it
    is not read to its end, token and word are compared alone.
    """
    import torch

    names = known_words(backbone, attribute)
    if not names:
        return []

    def embed(word: str, templates: Sequence[str]) -> Tensor:
        prompts = [template.format(word, noun=noun) for template in templates]
        return backbone.embed_texts(prompts, tokens).float().cpu()

    def nearest(templates: Sequence[str]) -> list[str]:
        words = torch.stack([embed(name, templates) for name in names])
        return nearest_words(embed(token, templates), words, names, count)

    with torch.no_grad():
        try:
            return nearest(TEMPLATES)
        except InputError:
            return nearest(TEMPLATES[:1])
