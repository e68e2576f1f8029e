"""The conformance checks of ``icekit.protocols.Backbone``; ``icekit.testing`` says how they are used."""

from __future__ import annotations

import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import SkipTest

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icekit.protocols import (
    Attention,
    Backbone,
    Capability,
    FineTuning,
    InputError,
    Learned,
    Look,
    PosteriorBackbone,
    Tokens,
    Trained,
    nearest_grids,
)
from icekit.testing.subject import BackboneUnderTest

Check = Callable[[BackboneUnderTest], None]

CHECKS: list[Check] = []
"""All checks of a backbone, cheap ones first."""

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
ROUNDING = 1e-4
"""By what part of the largest number two results may differ that are computed in different orders."""
GREY_LEVELS = 2
"""By how much a pixel of two pictures may differ, of 255, that are to be the same picture."""
TOKEN = "<check-0>"
OTHER = "<check-1>"

_fresh = itertools.count()


def _check(function: Check) -> Check:
    CHECKS.append(function)
    return function


# --- What it says of itself -------------------------------------------------------------------------------------------


@_check
def it_offers_everything(subject: BackboneUnderTest) -> None:
    """Every method of ``protocols.Backbone`` is there and takes the same arguments; every fact is there."""
    backbone = subject.backbone
    for name, member in vars(Backbone).items():
        if name.startswith("_") or not inspect.isfunction(member):
            continue
        assert callable(getattr(backbone, name, None)), f"there is no method {name}"
        wanted = list(inspect.signature(member).parameters.values())[1:]
        given = list(inspect.signature(getattr(backbone, name)).parameters.values())
        assert [(one.name, one.kind) for one in given[: len(wanted)]] == [(one.name, one.kind) for one in wanted], (
            f"{name} takes {', '.join(one.name for one in given)}; it must take {', '.join(one.name for one in wanted)}"
        )
        for one, other in zip(given, wanted, strict=False):
            assert other.default is one.empty or one.default is not one.empty, f"{name}: {one.name} has no default"
        for one in given[len(wanted) :]:
            assert one.default is not one.empty, f"{name} needs {one.name}, which nobody will give it"
    for name in Backbone.__annotations__:
        assert hasattr(backbone, name), f"there is no {name}"


@_check
def its_facts_are_consistent(subject: BackboneUnderTest) -> None:
    """Sizes, rows, grids and names are of the right types; grids come finest first."""
    backbone = subject.backbone
    assert _is_size(backbone.image_size), f"image_size is {backbone.image_size!r}, not (height, width)"
    shape = backbone.latent_shape
    assert len(shape) == 3 and all(isinstance(side, int) and side > 0 for side in shape), (
        f"latent_shape is {shape!r}, not (C, h, w)"
    )
    assert backbone.rows, "rows is empty: a token has a row for at least one text encoder"
    for name, length in backbone.rows.items():
        assert isinstance(length, int) and length > 0, f"rows[{name!r}] is {length!r}, not the length of a row"
    assert isinstance(backbone.identity, str) and backbone.identity, f"identity is {backbone.identity!r}, not a text"
    for kind, grids in (("word_grids", backbone.word_grids), ("pixel_grids", backbone.pixel_grids)):
        assert isinstance(grids, tuple) and all(_is_size(grid) for grid in grids), (
            f"{kind} is {grids!r}, not a tuple of (height, width)"
        )
        assert len(set(grids)) == len(grids), f"{kind} has a grid twice: {grids}"
        assert list(grids) == sorted(grids, key=min, reverse=True), f"{kind} is not finest first: {grids}"
    lacks = _lacks(backbone)
    assert lacks <= set(get_args(Capability)), f"lacks names {sorted(lacks - set(get_args(Capability)))}: no capability"
    preset = getattr(backbone, "preset", None)
    assert preset is None or isinstance(preset, str), f"preset is {preset!r}, not the name of a preset"


@_check
def what_it_lacks_is_true(subject: BackboneUnderTest) -> None:
    """What is in ``lacks`` is refused with an InputError, and what is not in it is there."""
    backbone = subject.backbone
    lacks = _lacks(backbone)
    for capability, grids, look in (
        ("attention", backbone.word_grids, Look(words=(16,))),
        ("similarity", backbone.pixel_grids, Look(pixels=(16,))),
    ):
        if capability not in lacks:
            assert grids, f"it has no grid for {look}, and does not say that it lacks {capability!r}"
            continue
        assert not grids, f"it lacks {capability!r}, and has grids for it: {grids}"
        _refused(f"{look} of a family without {capability}", _predict, subject, look=look)
    if "fine_tuning" in lacks:
        for trained in get_args(Trained):
            _refused(f"training {trained} of a family without fine_tuning", _trained_for_nothing, backbone, trained)
    has_posterior = isinstance(backbone, PosteriorBackbone)
    assert has_posterior == ("posterior" not in lacks), (
        f"it has {'a' if has_posterior else 'no'} method posterior, and lacks is {sorted(lacks)}"
    )


# --- Pictures and noise -----------------------------------------------------------------------------------------------


@_check
@torch.no_grad()
def latents_of_pictures(subject: BackboneUnderTest) -> None:
    """A picture has latents of the shape it says, the same every time; they make a picture with values in [0, 1]."""
    backbone = subject.backbone
    pictures = _pictures(backbone, 2)
    latents = backbone.encode_images(pictures)
    _has_shape("encode_images", latents, (2, *backbone.latent_shape))
    assert torch.equal(backbone.encode_images(pictures), latents), "the same pictures have other latents a second time"
    _same("the latents of a picture beside another", latents[1:], backbone.encode_images(pictures[1:]))
    decoded = backbone.decode_latents(latents)
    _has_shape("decode_latents", decoded, tuple(pictures.shape))
    assert float(decoded.min()) >= 0 and float(decoded.max()) <= 1, (
        f"decode_latents has values from {float(decoded.min()):.3g} to {float(decoded.max()):.3g}, not in [0, 1]"
    )
    if isinstance(backbone, PosteriorBackbone):
        mean, deviation = backbone.posterior(pictures)
        _same("the posterior's mean, against encode_images", mean, latents)
        assert deviation.shape == mean.shape and bool((deviation > 0).all()), "the posterior's deviation is not above 0"


@_check
@torch.no_grad()
def latents_are_the_pipelines(subject: BackboneUnderTest) -> None:
    """Latents that the pipeline ends with are decoded to its picture; a picture that is encoded and decoded is what the
    autoencoder makes of it, so that latents are scaled as the noise predictor takes them.
    """
    _needs_reference(subject)
    backbone = subject.backbone
    latents = torch.as_tensor(subject.reference_picture(subject.prompt, 5, output_type="latent"))[None]
    expected = subject.reference_picture(subject.prompt, 5)
    decoded = Image.fromarray((backbone.decode_latents(latents)[0] * 255).round().byte().permute(1, 2, 0).numpy())
    _same_picture("the picture of the pipeline's latents", decoded, expected)
    pictures, autoencoder = _pictures(backbone, 1), subject.reference.vae
    through = autoencoder.decode(autoencoder.encode(pictures * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    again = backbone.decode_latents(backbone.encode_images(pictures))
    _same("a picture encoded and decoded, against the pipeline's autoencoder", again, through.clamp(0, 1))


@_check
def noise_grows_with_the_share(subject: BackboneUnderTest) -> None:
    """At share 0 there is almost only the picture, at share 1 almost only noise, and always more noise in between."""
    backbone = subject.backbone
    kept = []
    for share in SHARES:
        signal, noise = _mixture(backbone, share)
        kept.append(signal**2 / (signal**2 + noise**2))
    shown = ", ".join(f"{share:g}: {part:.3f}" for share, part in zip(SHARES, kept, strict=True))
    assert kept[0] > 0.95, f"at share 0 too little is of the picture (part of the variance by share: {shown})"
    assert kept[-1] < 0.05, f"at share 1 too much is of the picture (part of the variance by share: {shown})"
    assert all(later < earlier for earlier, later in itertools.pairwise(kept)), (
        f"a greater share is not noisier (part of the variance that is the picture's, by share: {shown})"
    )
    latents, eps = _latents(backbone, 2)
    both = backbone.add_noise(latents, eps, torch.tensor([0.2, 0.7]))
    _has_shape("add_noise", both, tuple(latents.shape))
    for place, share in enumerate((0.2, 0.7)):
        one = slice(place, place + 1)
        alone = backbone.add_noise(latents[one], eps[one], torch.tensor([share]))
        _same(f"latents noised at share {share} beside others", both[one], alone)


@_check
def the_training_target_tells_picture_from_noise(subject: BackboneUnderTest) -> None:
    """The target is linear in latents and noise, and with the noisy latents it says what the latents were: whoever
    predicts it perfectly has denoised perfectly.
    """
    backbone = subject.backbone
    latents, noise = _latents(backbone, 1)
    for share in SHARES[1:-1]:
        at = torch.tensor([share])
        target = backbone.training_target(latents, noise, at)
        _has_shape("training_target", target, tuple(latents.shape))
        of_latents, of_noise = _parts(backbone.training_target, latents, share)
        _same(f"training_target at share {share}", target, of_latents * latents + of_noise * noise)
        signal, amount = _mixture(backbone, share)
        determinant = signal * of_noise - amount * of_latents
        assert abs(determinant) > 1e-3, (
            f"at share {share} the target is {of_latents:.3g} x + {of_noise:.3g} e and the noisy latents are "
            f"{signal:.3g} x + {amount:.3g} e: the latents x cannot be told from them"
        )
        noisy = backbone.add_noise(latents, noise, at)
        told = (of_noise * noisy - amount * target) / determinant
        _same(f"latents told from the target at share {share}", told, latents)


# --- Prompts and tokens -----------------------------------------------------------------------------------------------


@_check
def rows_of_words(subject: BackboneUnderTest) -> None:
    """A word has a row for every encoder, of its length, without a gradient; a token with these rows is that word."""
    backbone, (word, _) = subject.backbone, subject.words
    for pieces in ("mean", "first"):
        rows = backbone.word_rows(word, pieces)
        assert rows.keys() == backbone.rows.keys(), f"word_rows has rows for {list(rows)}, not {list(backbone.rows)}"
        for name, row in rows.items():
            _has_shape(f"word_rows({word!r})[{name!r}]", row, (backbone.rows[name],))
            assert not row.requires_grad, f"word_rows({word!r})[{name!r}] requires a gradient"
    _refused("an empty word", backbone.word_rows, "")
    tokens = {TOKEN: backbone.word_rows(word, "first")}
    prompt = subject.prompt.replace(word, TOKEN)
    [in_pieces] = backbone.token_positions(subject.prompt, [word])
    [whole] = backbone.token_positions(prompt, [TOKEN], tokens)
    if len(in_pieces) == len(whole):
        with torch.no_grad():
            _same(
                f"the prediction under {prompt!r} with the rows of {word!r}",
                _predict(subject, prompt, tokens).output,
                _predict(subject).output,
            )


@_check
@torch.no_grad()
def tokens_are_arguments(subject: BackboneUnderTest) -> None:
    """What a token means is what the call was handed: calls with other rows in between change nothing."""
    backbone = subject.backbone
    prompt = f"a {TOKEN} and a {OTHER}"
    mine = {TOKEN: _token(backbone, 1), OTHER: _token(backbone, 2)}
    yours = {OTHER: _token(backbone, 3), TOKEN: _token(backbone, 4), "<check-2>": _token(backbone, 5)}
    plain = _predict(subject).output
    encoded = backbone.encode_prompts([prompt], mine)
    first = _predict(subject, prompt, mine).output
    second = _predict(subject, prompt, yours).output
    _differ(f"the predictions under {prompt!r} with other rows", first, second)
    assert torch.equal(_predict(subject, prompt, mine).output, first), (
        f"{prompt!r} is predicted otherwise after another call with other rows for the same tokens"
    )
    backbone.encode_prompts([prompt], yours)
    assert torch.equal(_predict(subject, encoded=encoded).output, first), (
        "a prompt that was encoded before is predicted otherwise after another was encoded with other rows"
    )
    assert torch.equal(_predict(subject).output, plain), "a plain prompt is predicted otherwise after calls with tokens"
    fewer = {OTHER: mine[OTHER], TOKEN: mine[TOKEN], "<check-3>": mine[OTHER]}
    _same(
        "a prompt with its tokens in another order, and one that is not in it",
        _predict(subject, prompt, fewer).output,
        first,
    )


@_check
def unknown_tokens_are_refused(subject: BackboneUnderTest) -> None:
    """A ``<token>`` that the call was not handed is an InputError that names it, also if another call was handed it."""
    backbone = subject.backbone
    tokens = {TOKEN: _token(backbone, 1)}
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
            message = _refused(what, call, *arguments, **named)
            assert unknown in message, f"{what} is refused, and the message does not name {unknown}: {message}"
    assert not made, "generate made an image before it refused the second prompt"


@_check
def wrong_rows_and_prompts_are_refused(subject: BackboneUnderTest) -> None:
    """A row of another length, a token without a row for one of the encoders, a prompt that is too long, a word that is
    not in the prompt: an InputError each.
    """
    backbone = subject.backbone
    prompt = f"a {TOKEN}"
    for name, length in backbone.rows.items():
        longer = {**_token(backbone, 1), name: torch.zeros(length + 1)}
        missing = {other: row for other, row in _token(backbone, 1).items() if other != name}
        for what, token in ((f"a row of {length + 1} numbers for {name}", longer), (f"no row for {name}", missing)):
            message = _refused(f"a token with {what}", backbone.encode_prompts, [prompt], {TOKEN: token})
            assert TOKEN in message, f"the message does not name the token: {message}"
    word = subject.words[0]
    _refused("a prompt of 2000 words", backbone.encode_prompts, [" ".join([word] * 2000)])
    absent = "griffin"
    _refused(f"the positions of {absent!r}", backbone.token_positions, subject.prompt, [absent])


@_check
def texts_are_points(subject: BackboneUnderTest) -> None:
    """Texts are points of length one, each by itself, with a gradient to the rows; an unknown ``pool`` is refused."""
    backbone = subject.backbone
    tokens = {TOKEN: _token(backbone, 1, requires_grad=True)}
    texts = [f"a photo of {TOKEN}", subject.prompt, subject.words[0]]
    points = backbone.embed_texts(texts, tokens)
    assert points.ndim == 2 and len(points) == 3, f"embed_texts of three texts has shape {list(points.shape)}"
    _same("the length of the points of texts", points.norm(dim=-1), torch.ones(3))
    _same("a text beside others", points[1:2], backbone.embed_texts(texts[1:2], tokens))
    points[0].square().mul(torch.arange(points.shape[1])).sum().backward()
    reached = [name for name, row in tokens[TOKEN].items() if row.grad is not None and row.grad.abs().sum() > 0]
    assert reached, "no gradient reaches a token's rows through embed_texts"
    _refused("an unknown pool", backbone.embed_texts, texts[1:], pool="no-such-pool")


# --- Predicting -------------------------------------------------------------------------------------------------------


@_check
@torch.no_grad()
def a_batch_is_its_parts(subject: BackboneUnderTest) -> None:
    """Latents, shares, prompts and maps of a batch belong together, and each is as if it were alone; prompts can be
    taken from a ``Conditioning`` in another order.
    """
    backbone = subject.backbone
    prompts, shares = [subject.prompt, f"a {TOKEN}"], torch.tensor([0.3, 0.8])
    tokens = {TOKEN: _token(backbone, 1)}
    noisy = _latents(backbone, 2)[0]
    look = _all_grids(backbone)
    encoded = backbone.encode_prompts(prompts, tokens)
    both = backbone.predict(noisy, shares, encoded, look)
    _has_shape("predict", both.output, tuple(noisy.shape))
    swapped = backbone.predict(noisy.flip(0), shares.flip(0), encoded[[1, 0]], look)
    _same("a batch in another order", swapped.output.flip(0), both.output)
    for place, prompt in enumerate(prompts):
        one = slice(place, place + 1)
        alone = backbone.predict(noisy[one], shares[one], encoded[one], look)
        _same(f"the prediction under {prompt!r} beside another", both.output[one], alone.output)
        for kind, maps, others in _kinds(both.attention, alone.attention):
            for many, single in zip(maps, others, strict=True):
                _same(f"the {kind} maps under {prompt!r} beside another prompt", many[one], single)
    different = backbone.predict(noisy[:1], shares[1:], encoded[[0]]).output
    _differ("the predictions at another share", different, both.output[:1])


@_check
@torch.no_grad()
def a_look_changes_nothing(subject: BackboneUnderTest) -> None:
    """Asking for attention changes the prediction by no more than rounding; nothing is told that was not asked for."""
    plain = _predict(subject)
    assert plain.attention == Attention(), "a prediction without a look tells of attention"
    looked = _predict(subject, look=_all_grids(subject.backbone))
    _same("the prediction with a look", looked.output, plain.output)
    assert torch.equal(_predict(subject).output, plain.output), "the prediction after a look is another"


@_check
@torch.no_grad()
def maps_of_words(subject: BackboneUnderTest) -> None:
    """For each wanted grid, or the nearest there is, a map of at least 0 for every position of the prompt."""
    backbone = subject.backbone
    _needs(backbone, "attention")
    for wanted in ((16,), (1, 10_000), (8, 8, 32)):
        grids = nearest_grids(backbone.word_grids, wanted)
        seen = _predict(subject, look=Look(words=wanted)).attention
        assert not seen.pixels, f"Look(words={wanted}) tells what pixels look at"
        assert [tuple(maps.shape[2:]) for maps in seen.words] == list(grids), (
            f"Look(words={wanted}) has maps of {[tuple(maps.shape[2:]) for maps in seen.words]}, not {list(grids)}"
        )
        for maps in seen.words:
            _are_weights("the word maps", maps)
    tokens = {TOKEN: _token(backbone, 1)}
    prompt = f"{subject.prompt}, {TOKEN}"
    maps = _predict(subject, prompt, tokens, look=Look(words=(16,))).attention.words[0]
    words = [*subject.words, TOKEN]
    positions = backbone.token_positions(prompt, words, tokens)
    for word, places in zip(words, positions, strict=True):
        assert places, f"token_positions has none for {word!r} in {prompt!r}"
        assert all(0 <= place < maps.shape[1] for place in places), (
            f"{word!r} is at the positions {places}, and there are maps of {maps.shape[1]} positions"
        )
    everywhere = [place for places in positions for place in places]
    assert len(set(everywhere)) == len(everywhere), f"the words {words} share positions: {positions}"


@_check
@torch.no_grad()
def maps_of_pixels(subject: BackboneUnderTest) -> None:
    """For each wanted grid, or the nearest there is, how much every place looks at every other: it sums to one."""
    backbone = subject.backbone
    _needs(backbone, "similarity")
    for wanted in ((16,), (1, 16)):
        grids = nearest_grids(backbone.pixel_grids, wanted)
        seen = _predict(subject, look=Look(pixels=wanted)).attention
        assert not seen.words, f"Look(pixels={wanted}) tells of words"
        assert [tuple(maps.shape[1:]) for maps in seen.pixels] == [(*grid, *grid) for grid in grids], (
            f"Look(pixels={wanted}) has maps of {[tuple(maps.shape[1:]) for maps in seen.pixels]} for the grids {grids}"
        )
        for maps in seen.pixels:
            _are_weights("the pixel maps", maps)
            _same("what the weights of a place sum to", maps.sum(dim=(-1, -2)), torch.ones(maps.shape[:3]))


@_check
def gradients_reach_every_row(subject: BackboneUnderTest) -> None:
    """A loss on the prediction has a gradient to the row of every text encoder, and to no token of another prompt."""
    _gradients(subject, Look(), lambda output, attention, places: output.square().mean())


@_check
def gradients_reach_every_row_through_the_maps(subject: BackboneUnderTest) -> None:
    """A loss on a token's own maps has a gradient to its row in every text encoder."""
    _needs(subject.backbone, "attention")

    def loss(output: Tensor, attention: Attention, places: list[int]) -> Tensor:
        maps = attention.words[0][0, places]
        return (maps * torch.linspace(0, 1, maps[0].numel()).view(maps.shape[1:])).sum()

    _gradients(subject, Look(words=(10_000,)), loss)


@_check
def the_prediction_is_the_pipelines(subject: BackboneUnderTest) -> None:
    """At every step of the pipeline's own call, the same prediction of the same latents, time and prompt."""
    _needs_reference(subject)
    _predicts_as_the_pipeline(subject, subject.prompt, {})


@_check
def a_perfect_prediction_is_the_picture(subject: BackboneUnderTest) -> None:
    """The pipeline ends at the very latents when its noise predictor always returns ``training_target`` for them: what
    is trained is what is sampled with.
    """
    _needs_reference(subject)
    backbone = subject.backbone
    latents = _latents(backbone, 1)[0]

    def perfect(*arguments: Any, **named: Any) -> tuple[Tensor]:
        noisy, timestep = _input(arguments, named)
        share = subject.share_of(timestep)
        signal, amount = _mixture(backbone, share)
        noise = (noisy - signal * latents) / amount
        return (backbone.training_target(latents, noise, torch.tensor([share])),)

    forward = subject.denoiser.forward
    subject.denoiser.forward = perfect
    try:
        ended = subject.reference_picture(subject.prompt, 0, guidance_scale=1.0, output_type="latent")
    finally:
        subject.denoiser.forward = forward
    off = float((torch.as_tensor(ended) - latents[0]).std() / latents.std())
    assert off < 0.1, f"the pipeline ends {off:.2f} standard deviations away from the latents"


# --- Fine-tuning ------------------------------------------------------------------------------------------------------


@_check
def a_lora_adapter(subject: BackboneUnderTest) -> None:
    """Changes nothing before it is trained, is trained, is gone bit for bit afterwards, and what was kept of it changes
    the pictures of the call that it is handed to: as the pipeline's that loads it.
    """
    kept = _fine_tuned(subject, "lora")
    assert kept.lora and not kept.weights, "kept() of a LoRA adapter has no lora, or has weights"
    wrong = [key for key in kept.lora if not key.startswith(f"{kept.folder}.")]
    assert not wrong, f"keys of the adapter do not begin with {kept.folder!r}, the pipeline's part: {wrong[:3]}"
    picture = _tuned_picture(subject, kept)
    if subject.reference is not None:
        subject.reference.load_lora_weights(dict(kept.lora))
        try:
            expected = subject.reference_picture(subject.prompt, 5)
        finally:
            subject.reference.unload_lora_weights()
        _same_picture("the picture with the adapter, against the pipeline's with it", picture, expected)


@_check
def whole_weights(subject: BackboneUnderTest) -> None:
    """As a LoRA adapter, with all weights; they are those of the pipeline's own noise predictor."""
    kept = _fine_tuned(subject, "all")
    assert kept.weights and not kept.lora, "kept() of whole weights has no weights, or has an adapter"
    broad = [key for key, value in kept.weights.items() if value.is_floating_point() and value.dtype != torch.float16]
    assert not broad, f"kept() has weights that are not float16: {broad[:3]}"
    assert kept.weights_config, "kept() has no configuration of the noise predictor, as in diffusers' config.json"
    picture = _tuned_picture(subject, kept)
    if subject.reference is not None:
        part = getattr(subject.reference, kept.folder, None)
        assert part is subject.denoiser, f"the pipeline's noise predictor is not in {kept.folder!r}"
        before = {key: value.clone() for key, value in part.state_dict().items()}
        part.load_state_dict(dict(kept.weights))
        try:
            expected = subject.reference_picture(subject.prompt, 5)
        finally:
            part.load_state_dict(before)
        _same_picture("the picture with the weights, against the pipeline's with them", picture, expected)


@_check
def the_tuning_of_another_model_is_refused(subject: BackboneUnderTest) -> None:
    """An adapter or weights of other shapes are an InputError, and leave nothing behind."""
    backbone = subject.backbone
    _needs(backbone, "fine_tuning")
    with torch.no_grad():
        before = _predict(subject).output
    for trained in get_args(Trained):
        with backbone.fine_tuned(trained, 1, _generator(0)) as tuned:
            kept = tuned.kept()
        wrong = FineTuning(
            lora={key: torch.zeros(3, 3) for key in kept.lora},
            weights={key: torch.zeros(3, 3) for key in kept.weights},
            folder=kept.folder,
        )
        what, prompts = f"a tuning ({trained}) of other shapes", [subject.prompt]
        _refused(what, backbone.generate, prompts, seeds=[0], steps=1, tuning=wrong)
        with torch.no_grad():
            assert torch.equal(_predict(subject).output, before), f"the wrong tuning ({trained}) left something behind"


# --- Generating -------------------------------------------------------------------------------------------------------


@_check
def pictures_are_made(subject: BackboneUnderTest) -> None:
    """One RGB picture of ``image_size`` for each prompt, the same from the same seed whatever is random elsewhere;
    pictures that are there already can be left out, and each is shown when it is made.
    """
    backbone = subject.backbone
    prompts, seeds = [subject.prompt, f"a {subject.words[0]}", subject.prompt], [1, 2, 3]
    shown: list[tuple[int, bytes]] = []
    pictures = backbone.generate(
        prompts, seeds=seeds, steps=2, on_image=lambda place, image: shown.append((place, image.tobytes()))
    )
    assert len(pictures) == 3, f"three prompts make {len(pictures)} pictures"
    height, width = backbone.image_size
    for picture in pictures:
        assert picture.size == (width, height), (
            f"a picture is {picture.width} wide and {picture.height} high; image_size is {backbone.image_size}"
        )
        assert picture.mode == "RGB", f"a picture is {picture.mode}, not RGB"
    bits = [picture.tobytes() for picture in pictures]
    assert shown == list(enumerate(bits)), f"on_image was shown the places {[place for place, _ in shown]}"
    assert bits[0] != bits[2], "another seed makes the same picture of the same prompt"
    torch.manual_seed(12345)
    np.random.seed(12345)
    again: list[tuple[int, bytes]] = []
    rest = backbone.generate(
        prompts, seeds=seeds, steps=2, skip=[1], on_image=lambda place, image: again.append((place, image.tobytes()))
    )
    assert len(rest) == 2, f"with one of three left out, {len(rest)} pictures came back"
    assert again == [(0, bits[0]), (2, bits[2])], "with one left out, the other pictures are not the same bits"
    assert backbone.generate(prompts, seeds=seeds, steps=2, skip=range(3)) == [], "all are left out, and one is made"
    _same_picture("a picture made alone", backbone.generate(prompts[1:2], seeds=seeds[1:2], steps=2)[0], pictures[1])
    assert len(backbone.generate(prompts[:1], seeds=seeds[:1])) == 1, "no picture with the backbone's own settings"
    assert backbone.generate([], seeds=[]) == [], "no prompts make a picture"


@_check
def the_picture_is_the_pipelines(subject: BackboneUnderTest) -> None:
    """The picture of a plain prompt is the pipeline's from the same seed, steps and guidance, which can be off."""
    _needs_reference(subject)
    for guidance in (subject.guidance_scale, 1.0):
        [picture] = subject.backbone.generate([subject.prompt], seeds=[5], steps=subject.steps, guidance_scale=guidance)
        expected = subject.reference_picture(subject.prompt, 5, guidance_scale=guidance)
        _same_picture(f"the picture with guidance {guidance:g}, against the pipeline's", picture, expected)


@_check
def saved_tokens_are_loaded_by_the_pipeline(subject: BackboneUnderTest) -> None:
    """A token's file, as a run directory has it, is loaded into the pipeline, and every row of it is used there: the
    predictions and the picture are the same.
    """
    _needs_reference(subject)
    from safetensors.torch import load_file

    from icekit.run.directory import RunDirectory

    backbone, pipeline = subject.backbone, subject.reference
    name = f"<check-file-{next(_fresh)}>"
    token, other = _token(backbone, 7), _token(backbone, 8)
    prompt = f"a photo of {name} on a {subject.words[1]}"
    with tempfile.TemporaryDirectory() as folder:
        RunDirectory(Path(folder)).save_learned(Learned({name: token}))
        file = Path(folder) / "embeddings" / f"{name.strip('<>')}.safetensors"
        if len(backbone.rows) == 1 and hasattr(pipeline, "load_textual_inversion"):
            pipeline.load_textual_inversion(str(file))
        else:
            for encoder, row in load_file(file).items():
                assert encoder in subject.encoders, f"BackboneUnderTest.encoders does not say where {encoder} is"
                tokenizer, model = (getattr(pipeline, part) for part in subject.encoders[encoder])
                _add_row(tokenizer, model, name, row)
    _predicts_as_the_pipeline(subject, prompt, {name: token})
    with torch.no_grad():
        predicted = _predict(subject, prompt, {name: token}).output
        for encoder in backbone.rows:
            changed = {**token, encoder: other[encoder]}
            what = f"the predictions under {prompt!r} with another row for {encoder}"
            _differ(what, _predict(subject, prompt, {name: changed}).output, predicted)
    [picture] = backbone.generate(
        [prompt], seeds=[5], tokens={name: token}, steps=subject.steps, guidance_scale=subject.guidance_scale
    )
    expected = subject.reference_picture(prompt, 5)
    _same_picture(f"the picture of {prompt!r}, against the pipeline's with the file", picture, expected)


@_check
def calls_leave_nothing_behind(subject: BackboneUnderTest) -> None:
    """After all kinds of calls, and under another global seed, the same prediction, bit for bit, without a gradient to
    anything but rows.
    """
    backbone = subject.backbone
    with torch.no_grad():
        before = _predict(subject).output
    tokens = {TOKEN: _token(backbone, 1, requires_grad=True)}
    _predict(subject, f"a {TOKEN}", tokens, look=_all_grids(backbone)).output.sum().backward()
    backbone.embed_texts([f"a {TOKEN}"], tokens)
    backbone.generate([f"a {TOKEN}"], seeds=[0], tokens=tokens, steps=1)
    torch.manual_seed(54321)
    after = _predict(subject).output
    assert torch.equal(after, before), "the prediction is another than it was before"
    assert not after.requires_grad, "the prediction under a plain prompt requires a gradient: weights are not frozen"


# --- What checks are made of ------------------------------------------------------------------------------------------


def _lacks(backbone: Backbone) -> set[str]:
    return set(getattr(backbone, "lacks", ()))


def _needs(backbone: Backbone, capability: Capability) -> None:
    if capability in _lacks(backbone):
        raise SkipTest(f"the family lacks {capability!r}")


def _needs_reference(subject: BackboneUnderTest) -> None:
    if subject.reference is None:
        raise SkipTest("no reference pipeline was handed in")


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _latents(backbone: Backbone, count: int) -> tuple[Tensor, Tensor]:
    """Latents and noise of the backbone's shape."""
    latents, noise = torch.randn(2, count, *backbone.latent_shape, generator=_generator(count))
    return latents, noise


def _pictures(backbone: Backbone, count: int) -> Tensor:
    return torch.rand(count, 3, *backbone.image_size, generator=_generator(count))


def _token(backbone: Backbone, seed: int, *, requires_grad: bool = False) -> dict[str, Tensor]:
    """A token of random rows, as large as a word's."""
    generator = _generator(seed)
    rows = {}
    for name, row in backbone.word_rows("a").items():
        rows[name] = (row.std() * torch.randn(len(row), generator=generator)).requires_grad_(requires_grad)
    return rows


def _all_grids(backbone: Backbone) -> Look:
    return Look(words=tuple(map(min, backbone.word_grids)), pixels=tuple(map(min, backbone.pixel_grids)))


def _predict(
    subject: BackboneUnderTest,
    prompt: str | None = None,
    tokens: Tokens | None = None,
    look: Look | None = None,
    encoded: Any = None,
) -> Any:
    """The prediction of the same noisy latents at the middle of the schedule, of one prompt."""
    backbone = subject.backbone
    if encoded is None:
        encoded = backbone.encode_prompts([subject.prompt if prompt is None else prompt], tokens or {})
    return backbone.predict(_latents(backbone, 1)[0], torch.tensor([0.5]), encoded, look)


def _parts(function: Callable[[Tensor, Tensor, Tensor], Tensor], like: Tensor, share: float) -> tuple[float, float]:
    """How much of the latents and how much of the noise is in what a linear function of both returns."""
    none, one, at = torch.zeros_like(like), torch.ones_like(like), torch.tensor([share])
    return float(function(one, none, at).mean()), float(function(none, one, at).mean())


def _mixture(backbone: Backbone, share: float) -> tuple[float, float]:
    return _parts(backbone.add_noise, _latents(backbone, 1)[0], share)


def _has_shape(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    assert tuple(value.shape) == shape, f"{what} has shape {list(value.shape)}, not {list(shape)}"
    assert value.dtype == torch.float32, f"{what} is {value.dtype}, not float32"
    assert bool(value.isfinite().all()), f"{what} has numbers that are not finite"


def _are_weights(what: str, maps: Tensor) -> None:
    _has_shape(what, maps, tuple(maps.shape))
    assert float(maps.min()) >= 0, f"{what} have values below 0, down to {float(maps.min()):.3g}"
    assert float(maps.max()) > 0, f"{what} are 0 everywhere"


def _same(what: str, value: Tensor, expected: Tensor) -> None:
    """The same up to rounding."""
    assert value.shape == expected.shape, f"{what} has shape {list(value.shape)}, not {list(expected.shape)}"
    value, expected = value.detach(), expected.detach()
    off, size = float((value - expected).abs().max()), float(expected.abs().max())
    assert off <= ROUNDING * size, f"{what} is off by {off:.3g}, where the largest number is {size:.3g}"


def _differ(what: str, value: Tensor, other: Tensor) -> None:
    """Not the same, and not by rounding alone."""
    off, size = float((value - other).abs().max()), float(other.abs().max())
    assert off > ROUNDING * size, f"{what} are the same"


def _same_picture(what: str, picture: Image.Image, expected: Image.Image) -> None:
    assert picture.size == expected.size, f"{what}, is of size {picture.size}, not {expected.size}"
    off = np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int))
    found = f"off by up to {off.max()} of 255 grey levels, {off.mean():.2f} on average"
    assert off.max() <= GREY_LEVELS, f"{what}, is {found}"


def _refused(what: str, call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """The message of the InputError that a call must raise."""
    try:
        call(*arguments, **named)
    except InputError as error:
        message = str(error)
        assert "\n" not in message, f"the message is longer than a line: {message!r}"
        return message
    except Exception as error:
        raise AssertionError(f"{what} is refused with a {type(error).__name__}, not an InputError: {error}") from error
    raise AssertionError(f"{what} is not refused")


def _kinds(one: Attention, other: Attention) -> Iterator[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    yield "word", one.words, other.words
    yield "pixel", one.pixels, other.pixels


def _gradients(subject: BackboneUnderTest, look: Look, loss: Callable[[Tensor, Attention, list[int]], Tensor]) -> None:
    """That a loss under a prompt with a token reaches the token's rows, and not those of the prompt beside it."""
    backbone = subject.backbone
    tokens = {name: _token(backbone, seed, requires_grad=True) for seed, name in enumerate((TOKEN, OTHER))}
    prompt = f"a photo of {TOKEN}"
    encoded = backbone.encode_prompts([prompt, f"a {OTHER}"], tokens)
    noisy = _latents(backbone, 2)[0]
    prediction = backbone.predict(noisy, torch.tensor([0.5, 0.5]), encoded, look)
    [places] = backbone.token_positions(prompt, [TOKEN], tokens)
    loss(prediction.output[:1], prediction.attention, places).backward()
    for encoder, row in tokens[TOKEN].items():
        assert row.grad is not None and row.grad.abs().sum() > 0, f"no gradient reaches the row for {encoder}"
        assert bool(row.grad.isfinite().all()), f"the gradient of the row for {encoder} is not finite"
    for encoder, row in tokens[OTHER].items():
        assert row.grad is None or not row.grad.any(), f"a gradient reaches another prompt's row for {encoder}"


def _input(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, float]:
    """The noisy latents and the time that a pipeline hands to its noise predictor."""
    noisy = arguments[0] if arguments else named.get("hidden_states", named.get("sample"))
    timestep = arguments[1] if len(arguments) > 1 else named["timestep"]
    assert isinstance(noisy, Tensor) and len(noisy) == 1, "the pipeline hands over more than one picture's latents"
    return noisy, float(torch.as_tensor(timestep).flatten()[0])


def _predicts_as_the_pipeline(subject: BackboneUnderTest, prompt: str, tokens: Tokens) -> None:
    """That each prediction is the one of the pipeline while it makes a picture without guidance."""
    with torch.no_grad():
        encoded = subject.backbone.encode_prompts([prompt], tokens)
        for noisy, timestep, output in _calls(subject, prompt):
            share = torch.tensor([subject.share_of(timestep)])
            predicted = subject.backbone.predict(noisy, share, encoded).output
            at = f"at time {timestep:g} (share {float(share):g}) under {prompt!r}"
            _same(f"the prediction {at}, against the pipeline's", predicted, output)


def _calls(subject: BackboneUnderTest, prompt: str) -> list[tuple[Tensor, float, Tensor]]:
    """The calls of its noise predictor while the pipeline makes a picture without guidance: latents, time, output."""
    calls: list[tuple[Tensor, float, Tensor]] = []

    def record(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        noisy, timestep = _input(arguments, named)
        calls.append((noisy.clone(), timestep, output[0].clone()))

    handle = subject.denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        subject.reference_picture(prompt, 0, guidance_scale=1.0, output_type="latent")
    finally:
        handle.remove()
    assert calls, "the pipeline made a picture without its noise predictor"
    return calls


def _trained_for_nothing(backbone: Backbone, trained: Trained) -> None:
    with backbone.fine_tuned(trained, 1, _generator(0)):
        pass


def _fine_tuned(subject: BackboneUnderTest, trained: Trained) -> FineTuning:
    """Train a little, see ``a_lora_adapter``, and return what was kept."""
    backbone = subject.backbone
    _needs(backbone, "fine_tuning")
    with torch.no_grad():
        before = _predict(subject).output
    with backbone.fine_tuned(trained, 2, _generator(3)) as tuned:
        assert tuned.parameters, "there are no parameters to train"
        for key, parameter in tuned.parameters.items():
            assert parameter.dtype == torch.float32, f"{key} is {parameter.dtype}, not float32"
            parameter.requires_grad_()
        started = {key: parameter.detach().clone() for key, parameter in tuned.parameters.items()}
        prediction = _predict(subject).output
        _same("the prediction before anything is trained", prediction.detach(), before)
        prediction.square().mean().backward()
        assert any(one.grad is not None and one.grad.any() for one in tuned.parameters.values()), (
            "no gradient reaches the parameters"
        )
        generator = _generator(4)
        with torch.no_grad():
            for parameter in tuned.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            _differ("the predictions with changed parameters", _predict(subject).output, before)
        kept = tuned.kept()
    assert kept, "kept() is empty"
    with torch.no_grad():
        assert torch.equal(_predict(subject).output, before), "afterwards the prediction is not what it was before"
    torch.manual_seed(999)
    with backbone.fine_tuned(trained, 2, _generator(3)) as tuned:
        moved = [key for key, value in started.items() if not torch.equal(value, tuned.parameters[key])]
        assert not moved, f"the same generator starts from other parameters a second time: {moved[:3]}"
    return kept


def _tuned_picture(subject: BackboneUnderTest, kept: FineTuning) -> Image.Image:
    """The picture with a tuning, which is another than without it, before and after."""

    def make(tuning: FineTuning | None) -> Image.Image:
        return subject.backbone.generate(
            [subject.prompt],
            seeds=[5],
            steps=subject.steps,
            guidance_scale=subject.guidance_scale,
            tuning=tuning,
        )[0]

    plain, picture = make(None), make(kept)
    assert picture.tobytes() != plain.tobytes(), "the picture with what was kept is the picture without it"
    assert make(None).tobytes() == plain.tobytes(), "after a picture with what was kept, the plain picture is another"
    return picture


def _add_row(tokenizer: Any, model: Any, name: str, row: Tensor) -> None:
    """What diffusers' ``load_textual_inversion`` does, for a pipeline that does not have it."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(AddedToken(name, normalized=False))
    place = tokenizer.convert_tokens_to_ids(name)
    model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
    model.get_input_embeddings().weight.data[place] = row
