"""The noise predictor: its output, its attention, and the gradients through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from icekit.protocols import Attention, Look, nearest_grids
from icekit.testing.asserting import assert_differ, assert_same, assert_shape
from icekit.testing.backbone.common import (
    OTHER,
    TOKEN,
    all_grids,
    assert_predicts_as_the_pipeline,
    latents_of,
    mixture_at,
    needs,
    needs_reference,
    predicted_by,
    token_of,
)
from icekit.testing.subjects import BackboneUnderTest


@torch.no_grad()
def a_batch_is_its_parts(subject: BackboneUnderTest) -> None:
    """Latents, shares, prompts and maps of a batch belong together, and each is as if it were alone; prompts can be
    taken from a ``Conditioning`` in another order.
    """
    backbone = subject.backbone
    prompts, shares = [subject.prompt, f"a {TOKEN}"], torch.tensor([0.3, 0.8])
    tokens = {TOKEN: token_of(backbone, 1)}
    noisy = latents_of(backbone, 2)[0]
    look = all_grids(backbone)
    encoded = backbone.encode_prompts(prompts, tokens)
    both = backbone.predict(noisy, shares, encoded, look)
    assert_shape("predict", both.output, tuple(noisy.shape))
    swapped = backbone.predict(noisy.flip(0), shares.flip(0), encoded[[1, 0]], look)
    assert_same("a batch in another order", swapped.output.flip(0), both.output)
    for place, prompt in enumerate(prompts):
        one = slice(place, place + 1)
        alone = backbone.predict(noisy[one], shares[one], encoded[one], look)
        assert_same(f"the prediction under {prompt!r} beside another", both.output[one], alone.output)
        for kind, maps, others in _kinds(both.attention, alone.attention):
            for many, single in zip(maps, others, strict=True):
                assert_same(f"the {kind} maps under {prompt!r} beside another prompt", many[one], single)
    different = backbone.predict(noisy[:1], shares[1:], encoded[[0]]).output
    assert_differ("the predictions at another share", different, both.output[:1])


@torch.no_grad()
def a_look_changes_nothing(subject: BackboneUnderTest) -> None:
    """Asking for attention changes the prediction by no more than rounding; nothing is told that was not asked for."""
    plain = predicted_by(subject)
    assert plain.attention == Attention(), "a prediction without a look tells of attention"
    looked = predicted_by(subject, look=all_grids(subject.backbone))
    assert_same("the prediction with a look", looked.output, plain.output)
    assert torch.equal(predicted_by(subject).output, plain.output), "the prediction after a look is another"


@torch.no_grad()
def maps_of_words(subject: BackboneUnderTest) -> None:
    """For each wanted grid, or the nearest there is, a map of at least 0 for every position of the prompt."""
    backbone = subject.backbone
    needs(backbone, "attention")
    for wanted in ((16,), (1, 10_000), (8, 8, 32)):
        grids = nearest_grids(backbone.word_grids, wanted)
        seen = predicted_by(subject, look=Look(words=wanted)).attention
        assert not seen.pixels, f"Look(words={wanted}) tells what pixels look at"
        assert [tuple(maps.shape[2:]) for maps in seen.words] == list(grids), (
            f"Look(words={wanted}) has maps of {[tuple(maps.shape[2:]) for maps in seen.words]}, not {list(grids)}"
        )
        for maps in seen.words:
            _are_weights("the word maps", maps)
    tokens = {TOKEN: token_of(backbone, 1)}
    prompt = f"{subject.prompt}, {TOKEN}"
    maps = predicted_by(subject, prompt, tokens, look=Look(words=(16,))).attention.words[0]
    words = [*subject.words, TOKEN]
    positions = backbone.token_positions(prompt, words, tokens)
    for word, places in zip(words, positions, strict=True):
        assert places, f"token_positions has none for {word!r} in {prompt!r}"
        assert all(0 <= place < maps.shape[1] for place in places), (
            f"{word!r} is at the positions {places}, and there are maps of {maps.shape[1]} positions"
        )
    everywhere = [place for places in positions for place in places]
    assert len(set(everywhere)) == len(everywhere), f"the words {words} share positions: {positions}"


@torch.no_grad()
def maps_of_pixels(subject: BackboneUnderTest) -> None:
    """For each wanted grid, or the nearest there is, how much every place looks at every other: it sums to one."""
    backbone = subject.backbone
    needs(backbone, "similarity")
    for wanted in ((16,), (1, 16)):
        grids = nearest_grids(backbone.pixel_grids, wanted)
        seen = predicted_by(subject, look=Look(pixels=wanted)).attention
        assert not seen.words, f"Look(pixels={wanted}) tells of words"
        assert [tuple(maps.shape[1:]) for maps in seen.pixels] == [(*grid, *grid) for grid in grids], (
            f"Look(pixels={wanted}) has maps of {[tuple(maps.shape[1:]) for maps in seen.pixels]} for the grids {grids}"
        )
        for maps in seen.pixels:
            _are_weights("the pixel maps", maps)
            assert_same("what the weights of a place sum to", maps.sum(dim=(-1, -2)), torch.ones(maps.shape[:3]))


def gradients_reach_every_row(subject: BackboneUnderTest) -> None:
    """A loss on the prediction has a gradient to the row of every text encoder, and to no token of another prompt."""
    _gradients(subject, Look(), lambda output, attention, places: output.square().mean())


def gradients_reach_every_row_through_the_maps(subject: BackboneUnderTest) -> None:
    """A loss on a token's own maps has a gradient to its row in every text encoder."""
    needs(subject.backbone, "attention")

    def loss(output: Tensor, attention: Attention, places: list[int]) -> Tensor:
        maps = attention.words[0][0, places]
        return (maps * torch.linspace(0, 1, maps[0].numel()).view(maps.shape[1:])).sum()

    _gradients(subject, Look(words=(10_000,)), loss)


def the_prediction_is_the_pipelines(subject: BackboneUnderTest) -> None:
    """At every step of the pipeline's own call, the same prediction of the same latents, time and prompt."""
    needs_reference(subject)
    assert_predicts_as_the_pipeline(subject, subject.prompt, {})


def a_perfect_prediction_is_the_picture(subject: BackboneUnderTest) -> None:
    """The pipeline ends at the very latents when its noise predictor always returns ``training_target`` for them: what
    is trained is what is sampled with.
    """
    needs_reference(subject)
    backbone = subject.backbone
    latents = latents_of(backbone, 1)[0]

    def perfect(*arguments: Any, **named: Any) -> Any:
        noisy, timestep = subject.call_of(arguments, named)
        share = subject.share_of(timestep)
        signal, amount = mixture_at(backbone, share)
        noise = (noisy - signal * latents) / amount
        return subject.returned(backbone.training_target(latents, noise, torch.tensor([share])))

    forward = subject.denoiser.forward
    subject.denoiser.forward = perfect
    try:
        ended: Any = subject.reference_picture(subject.prompt, 0, guidance_scale=subject.unguided, output_type="latent")
    finally:
        subject.denoiser.forward = forward
    off = float((subject.latents_of(ended[None]) - latents).std() / latents.std())
    assert off < 0.1, f"the pipeline ends {off:.2f} standard deviations away from the latents"


def _are_weights(what: str, maps: Tensor) -> None:
    assert_shape(what, maps, tuple(maps.shape))
    assert float(maps.min()) >= 0, f"{what} have values below 0, down to {float(maps.min()):.3g}"
    assert float(maps.max()) > 0, f"{what} are 0 everywhere"


def _kinds(one: Attention, other: Attention) -> Iterator[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    yield "word", one.words, other.words
    yield "pixel", one.pixels, other.pixels


def _gradients(subject: BackboneUnderTest, look: Look, loss: Callable[[Tensor, Attention, list[int]], Tensor]) -> None:
    """That a loss under a prompt with a token reaches the token's rows, and not those of the prompt beside it."""
    backbone = subject.backbone
    tokens = {name: token_of(backbone, seed, requires_grad=True) for seed, name in enumerate((TOKEN, OTHER))}
    prompt = f"a photo of {TOKEN}"
    encoded = backbone.encode_prompts([prompt, f"a {OTHER}"], tokens)
    noisy = latents_of(backbone, 2)[0]
    prediction = backbone.predict(noisy, torch.tensor([0.5, 0.5]), encoded, look)
    [places] = backbone.token_positions(prompt, [TOKEN], tokens)
    loss(prediction.output[:1], prediction.attention, places).backward()
    for encoder, row in tokens[TOKEN].items():
        assert row.grad is not None and row.grad.abs().sum() > 0, f"no gradient reaches the row for {encoder}"
        assert bool(row.grad.isfinite().all()), f"the gradient of the row for {encoder} is not finite"
    for encoder, row in tokens[OTHER].items():
        assert row.grad is None or not row.grad.any(), f"a gradient reaches another prompt's row for {encoder}"
