"""What the checks of a backbone are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from icekit.protocols import Backbone, Capability, Look, Tokens
from icekit.testing.asserting import assert_same, generator_of
from icekit.testing.subjects import BackboneUnderTest

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
TOKEN = "<check-0>"
OTHER = "<check-1>"


def lacks_of(backbone: Backbone) -> set[str]:
    return set(getattr(backbone, "lacks", ()))


def needs(backbone: Backbone, capability: Capability) -> None:
    if capability in lacks_of(backbone):
        raise SkipTest(f"the family lacks {capability!r}")


def needs_reference(subject: BackboneUnderTest) -> None:
    if subject.reference is None:
        raise SkipTest("no reference pipeline was handed in")


def latents_of(backbone: Backbone, count: int) -> tuple[Tensor, Tensor]:
    """Latents and noise of the backbone's shape."""
    latents, noise = torch.randn(2, count, *backbone.latent_shape, generator=generator_of(count))
    return latents, noise


def pictures_of(backbone: Backbone, count: int) -> Tensor:
    return torch.rand(count, 3, *backbone.image_size, generator=generator_of(count))


def token_of(backbone: Backbone, seed: int, *, requires_grad: bool = False) -> dict[str, Tensor]:
    """A token of random rows, as large as a word's; where a word's is zero, of length one."""
    generator = generator_of(seed)
    rows = {}
    for name, row in backbone.word_rows("a").items():
        size = row.std() if row.any() else len(row) ** -0.5
        rows[name] = (size * torch.randn(len(row), generator=generator)).requires_grad_(requires_grad)
    return rows


def all_grids(backbone: Backbone) -> Look:
    return Look(words=tuple(map(min, backbone.word_grids)), pixels=tuple(map(min, backbone.pixel_grids)))


def predicted_by(
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
    return backbone.predict(latents_of(backbone, 1)[0], torch.tensor([0.5]), encoded, look)


def parts_of_both(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], like: Tensor, share: float
) -> tuple[float, float]:
    """How much of the latents and how much of the noise is in what a linear function of both returns."""
    none, one, at = torch.zeros_like(like), torch.ones_like(like), torch.tensor([share])
    return float(function(one, none, at).mean()), float(function(none, one, at).mean())


def mixture_at(backbone: Backbone, share: float) -> tuple[float, float]:
    return parts_of_both(backbone.add_noise, latents_of(backbone, 1)[0], share)


def assert_predicts_as_the_pipeline(subject: BackboneUnderTest, prompt: str, tokens: Tokens) -> None:
    """That each prediction is the one of the pipeline while it makes a picture without guidance."""
    with torch.no_grad():
        encoded = subject.backbone.encode_prompts([prompt], tokens)
        for noisy, timestep, output in _calls(subject, prompt):
            share = torch.tensor([subject.share_of(timestep)])
            predicted = subject.backbone.predict(noisy, share, encoded).output
            at = f"at time {timestep:g} (share {float(share):g}) under {prompt!r}"
            assert_same(f"the prediction {at}, against the pipeline's", predicted, output)


def _calls(subject: BackboneUnderTest, prompt: str) -> list[tuple[Tensor, float, Tensor]]:
    """The calls of its noise predictor while the pipeline makes a picture without guidance: latents, time, output."""
    calls: list[tuple[Tensor, float, Tensor]] = []

    def record(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        noisy, timestep = subject.call_of(arguments, named)
        assert len(noisy) == 1, "the pipeline hands over more than one picture's latents"
        calls.append((noisy.clone(), timestep, subject.output_of(output).clone()))

    handle = subject.denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        subject.reference_picture(prompt, 0, guidance_scale=subject.unguided, output_type="latent")
    finally:
        handle.remove()
    assert calls, "the pipeline made a picture without its noise predictor"
    return calls
