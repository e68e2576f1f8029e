"""Pictures from prompts, and what calls leave behind."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch

from icekit.protocols import Learned
from icekit.testing.asserting import assert_differ, assert_same_picture
from icekit.testing.backbone.common import (
    TOKEN,
    all_grids,
    assert_predicts_as_the_pipeline,
    needs_reference,
    predicted_by,
    token_of,
)
from icekit.testing.subjects import BackboneUnderTest

_fresh = itertools.count()


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
    assert_same_picture(
        "a picture made alone", backbone.generate(prompts[1:2], seeds=seeds[1:2], steps=2)[0], pictures[1]
    )
    assert len(backbone.generate(prompts[:1], seeds=seeds[:1])) == 1, "no picture with the backbone's own settings"
    assert backbone.generate([], seeds=[]) == [], "no prompts make a picture"


def the_picture_is_the_pipelines(subject: BackboneUnderTest) -> None:
    """The picture of a plain prompt is the pipeline's from the same seed, steps and guidance, which can be off."""
    needs_reference(subject)
    for guidance in (subject.guidance_scale, subject.unguided):
        [picture] = subject.backbone.generate([subject.prompt], seeds=[5], steps=subject.steps, guidance_scale=guidance)
        expected = subject.reference_picture(subject.prompt, 5, guidance_scale=guidance)
        assert_same_picture(f"the picture with guidance {guidance:g}, against the pipeline's", picture, expected)


def saved_tokens_are_loaded_by_the_pipeline(subject: BackboneUnderTest) -> None:
    """A token's file, as a run directory has it, is loaded into the pipeline, and every row of it is used there: the
    predictions and the picture are the same.
    """
    needs_reference(subject)
    from icekit.run.directory import RunDirectory

    backbone = subject.backbone
    name = f"<check-file-{next(_fresh)}>"
    token, other = token_of(backbone, 7), token_of(backbone, 8)
    prompt = f"a photo of {name} on a {subject.words[1]}"
    with tempfile.TemporaryDirectory() as folder:
        RunDirectory(Path(folder)).save_learned(Learned({name: token}))
        file = Path(folder) / "embeddings" / f"{name.strip('<>')}.safetensors"
        subject.load_token(name, file)
    assert_predicts_as_the_pipeline(subject, prompt, {name: token})
    with torch.no_grad():
        predicted = predicted_by(subject, prompt, {name: token}).output
        for encoder in backbone.rows:
            changed = {**token, encoder: other[encoder]}
            what = f"the predictions under {prompt!r} with another row for {encoder}"
            assert_differ(what, predicted_by(subject, prompt, {name: changed}).output, predicted)
    [picture] = backbone.generate(
        [prompt], seeds=[5], tokens={name: token}, steps=subject.steps, guidance_scale=subject.guidance_scale
    )
    expected = subject.reference_picture(prompt, 5)
    assert_same_picture(f"the picture of {prompt!r}, against the pipeline's with the file", picture, expected)


def calls_leave_nothing_behind(subject: BackboneUnderTest) -> None:
    """After all kinds of calls, and under another global seed, the same prediction, bit for bit, without a gradient to
    anything but rows.
    """
    backbone = subject.backbone
    with torch.no_grad():
        before = predicted_by(subject).output
    tokens = {TOKEN: token_of(backbone, 1, requires_grad=True)}
    predicted_by(subject, f"a {TOKEN}", tokens, look=all_grids(backbone)).output.sum().backward()
    backbone.embed_texts([f"a {TOKEN}"], tokens)
    backbone.generate([f"a {TOKEN}"], seeds=[0], tokens=tokens, steps=1)
    torch.manual_seed(54321)
    after = predicted_by(subject).output
    assert torch.equal(after, before), "the prediction is another than it was before"
    assert not after.requires_grad, "the prediction under a plain prompt requires a gradient: weights are not frozen"
