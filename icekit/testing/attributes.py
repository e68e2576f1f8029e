"""The conformance checks of ``icekit.protocols.Attribute``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

import itertools

import torch

from icekit.protocols import Region, token_names
from icekit.testing.subjects import AttributeUnderTest

ALIKE = 1e-5
"""Texts whose points are nearer than this are the same to the text encoder."""


def check_registration(subject: AttributeUnderTest) -> None:
    """It can be registered: a name that fits into a token, an anchor, and words, all of them text."""
    from icekit.plugins import PluginError, check_attribute

    try:
        check_attribute(subject.attribute)
    except PluginError as error:
        raise AssertionError(str(error)) from error


def check_vocabulary(subject: AttributeUnderTest) -> None:
    """Two words or more, none twice, each without blanks around it; aliases that are other than the name."""
    attribute = subject.attribute
    words = list(attribute.vocabulary)
    assert len(words) > 1, f"the vocabulary is {words}: with less than two words there is nothing to tell apart"
    for word in [*words, *attribute.aliases]:
        assert word == word.strip(), f"{word!r} has blanks around it"
    twice = sorted({word for word in words if [one.casefold() for one in words].count(word.casefold()) > 1})
    assert not twice, f"words that are in the vocabulary twice: {', '.join(twice)}"
    own = [attribute.name, *attribute.aliases]
    assert len(set(own)) == len(own), (
        f"the name {attribute.name!r} and its aliases {attribute.aliases} are not distinct"
    )


def check_backbone_knows_words(subject: AttributeUnderTest) -> None:
    """The backbone knows two of its words or more: a token of an attribute that it has no word for means nothing."""
    backbone, words = subject.on(), subject.attribute.vocabulary
    known = [word for word in words if backbone.knows(word)]
    assert len(known) > 1, (
        f"of the words of {subject.label!r} the backbone knows {', '.join(known) or 'none'}; it should know two of "
        f"them or more: {', '.join(words)}"
    )


def check_words_can_be_told_apart(subject: AttributeUnderTest) -> None:
    """No two of its words, nor the anchor and a concept's noun, are the same text to the backbone."""
    backbone, attribute = subject.on(), subject.attribute
    words = [word for word in attribute.vocabulary if backbone.knows(word)]
    with torch.no_grad():
        points = backbone.embed_texts(words).float().cpu()
        anchor, noun = backbone.embed_texts([attribute.anchor, "ball"]).float().cpu()
    assert bool(points.isfinite().all()), "the backbone's points of the words are not finite numbers"
    for one, other in itertools.combinations(range(len(words)), 2):
        apart = float((points[one] - points[other]).norm())
        assert apart > ALIKE, f"{words[one]!r} and {words[other]!r} are the same to the text encoder: take one out"
    assert float((anchor - noun).norm()) > ALIKE, f"the anchor {attribute.anchor!r} is a concept's own noun"


def check_token_in_a_prompt(subject: AttributeUnderTest) -> None:
    """Its token, ``<ball-0-NAME>``, is found in a prompt beside those of another attribute."""
    backbone, attribute = subject.on(), subject.attribute
    region = Region(0, "ball", 0.5, torch.ones(backbone.image_size, dtype=torch.bool))
    names = token_names(region, [attribute])
    tokens = {name: backbone.word_rows("ball") for name in names.values()}
    prompt = f"a photo of a {names['category']} {names[attribute.name]}"
    places = backbone.token_positions(prompt, [names["category"], names[attribute.name]], tokens)
    assert len(tokens) == 3, f"the tokens of a concept are {list(names.values())}: the attribute's is another one's too"
    assert all(places) and not set(places[0]) & set(places[1]), f"the tokens of {prompt!r} are at the places {places}"


CHECKS = (
    check_registration,
    check_vocabulary,
    check_backbone_knows_words,
    check_words_can_be_told_apart,
    check_token_in_a_prompt,
)
"""All checks of an attribute, cheap ones first."""
