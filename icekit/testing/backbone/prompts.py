"""Prompts, and the tokens in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from icekit.testing.asserting import assert_differ, assert_same, assert_shape, refused
from icekit.testing.backbone.common import OTHER, TOKEN, predicted_by, token_of
from icekit.testing.subjects import BackboneUnderTest


def rows_of_words(subject: BackboneUnderTest) -> None:
    """A word has a row for every encoder, of its length, without a gradient; a token with these rows is that word."""
    backbone, (word, _) = subject.backbone, subject.words
    for pieces in ("mean", "first"):
        rows = backbone.word_rows(word, pieces)
        assert rows.keys() == backbone.rows.keys(), f"word_rows has rows for {list(rows)}, not {list(backbone.rows)}"
        for name, row in rows.items():
            assert_shape(f"word_rows({word!r})[{name!r}]", row, (backbone.rows[name],))
            assert not row.requires_grad, f"word_rows({word!r})[{name!r}] requires a gradient"
    refused("an empty word", backbone.word_rows, "")
    tokens = {TOKEN: backbone.word_rows(word, "first")}
    prompt = subject.prompt.replace(word, TOKEN)
    [in_pieces] = backbone.token_positions(subject.prompt, [word])
    [whole] = backbone.token_positions(prompt, [TOKEN], tokens)
    if len(in_pieces) == len(whole):
        with torch.no_grad():
            assert_same(
                f"the prediction under {prompt!r} with the rows of {word!r}",
                predicted_by(subject, prompt, tokens).output,
                predicted_by(subject).output,
            )


@torch.no_grad()
def tokens_are_arguments(subject: BackboneUnderTest) -> None:
    """What a token means is what the call was handed: calls with other rows in between change nothing."""
    backbone = subject.backbone
    prompt = f"a {TOKEN} and a {OTHER}"
    mine = {TOKEN: token_of(backbone, 1), OTHER: token_of(backbone, 2)}
    yours = {OTHER: token_of(backbone, 3), TOKEN: token_of(backbone, 4), "<check-2>": token_of(backbone, 5)}
    plain = predicted_by(subject).output
    encoded = backbone.encode_prompts([prompt], mine)
    first = predicted_by(subject, prompt, mine).output
    second = predicted_by(subject, prompt, yours).output
    assert_differ(f"the predictions under {prompt!r} with other rows", first, second)
    assert torch.equal(predicted_by(subject, prompt, mine).output, first), (
        f"{prompt!r} is predicted otherwise after another call with other rows for the same tokens"
    )
    backbone.encode_prompts([prompt], yours)
    assert torch.equal(predicted_by(subject, encoded=encoded).output, first), (
        "a prompt that was encoded before is predicted otherwise after another was encoded with other rows"
    )
    assert torch.equal(predicted_by(subject).output, plain), (
        "a plain prompt is predicted otherwise after calls with tokens"
    )
    fewer = {OTHER: mine[OTHER], TOKEN: mine[TOKEN], "<check-3>": mine[OTHER]}
    assert_same(
        "a prompt with its tokens in another order, and one that is not in it",
        predicted_by(subject, prompt, fewer).output,
        first,
    )


def unknown_tokens_are_refused(subject: BackboneUnderTest) -> None:
    """A ``<token>`` that the call was not handed is an InputError that names it, also if another call was handed it."""
    backbone = subject.backbone
    tokens = {TOKEN: token_of(backbone, 1)}
    backbone.encode_prompts([f"a {TOKEN}"], tokens)
    made: list[tuple[int, Image.Image]] = []
    for unknown, known in ((OTHER, tokens), (TOKEN, {})):
        prompt = f"a {unknown}"
        calls: list[tuple[Callable[..., object], list[Any], dict[str, Any]]] = [
            (backbone.encode_prompts, [[prompt], known], {}),
            (backbone.embed_texts, [[prompt], known], {}),
            (backbone.token_positions, [prompt, [unknown], known], {}),
            (
                backbone.generate,
                [[subject.prompt, prompt]],
                {"seeds": [0, 0], "tokens": known, "steps": 1, "on_image": lambda *one: made.append(one)},
            ),
        ]
        for call, arguments, named in calls:
            what = f"{call.__name__} of {prompt!r} with the tokens {list(known)}"
            message = refused(what, call, *arguments, **named)
            assert unknown in message, f"{what} is refused, and the message does not name {unknown}: {message}"
    assert not made, "generate made an image before it refused the second prompt"


def wrong_rows_and_prompts_are_refused(subject: BackboneUnderTest) -> None:
    """A row of another length, a token without a row for one of the encoders, a prompt that is too long, a word that is
    not in the prompt: an InputError each.
    """
    backbone = subject.backbone
    prompt = f"a {TOKEN}"
    for name, length in backbone.rows.items():
        longer = {**token_of(backbone, 1), name: torch.zeros(length + 1)}
        missing = {other: row for other, row in token_of(backbone, 1).items() if other != name}
        for what, token in ((f"a row of {length + 1} numbers for {name}", longer), (f"no row for {name}", missing)):
            message = refused(f"a token with {what}", backbone.encode_prompts, [prompt], {TOKEN: token})
            assert TOKEN in message, f"the message does not name the token: {message}"
    word = subject.words[0]
    refused("a prompt of 2000 words", backbone.encode_prompts, [" ".join([word] * 2000)])
    absent = "griffin"
    refused(f"the positions of {absent!r}", backbone.token_positions, subject.prompt, [absent])


def texts_are_points(subject: BackboneUnderTest) -> None:
    """Texts are points of length one, each by itself, with a gradient to the rows; an unknown ``pool`` is refused."""
    backbone = subject.backbone
    tokens = {TOKEN: token_of(backbone, 1, requires_grad=True)}
    texts = [f"a photo of {TOKEN}", subject.prompt, subject.words[0]]
    points = backbone.embed_texts(texts, tokens)
    assert points.ndim == 2 and len(points) == 3, f"embed_texts of three texts has shape {list(points.shape)}"
    assert_same("the length of the points of texts", points.norm(dim=-1), torch.ones(3))
    assert_same("a text beside others", points[1:2], backbone.embed_texts(texts[1:2], tokens))
    points[0].square().mul(torch.arange(points.shape[1])).sum().backward()
    reached = [name for name, row in tokens[TOKEN].items() if row.grad is not None and row.grad.abs().sum() > 0]
    assert reached, "no gradient reaches a token's rows through embed_texts"
    refused("an unknown pool", backbone.embed_texts, texts[1:], pool="no-such-pool")
