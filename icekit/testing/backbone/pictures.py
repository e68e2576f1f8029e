"""Pictures, their latents, and noise."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from PIL import Image

from icekit.protocols import PosteriorBackbone
from icekit.testing.asserting import assert_same, assert_same_picture, assert_shape
from icekit.testing.backbone.common import SHARES, latents_of, mixture_at, needs_reference, parts_of_both, pictures_of
from icekit.testing.subjects import BackboneUnderTest


@torch.no_grad()
def latents_of_pictures(subject: BackboneUnderTest) -> None:
    """A picture has latents of the shape it says, the same every time; they make a picture with values in [0, 1]."""
    backbone = subject.backbone
    pictures = pictures_of(backbone, 2)
    latents = backbone.encode_images(pictures)
    assert_shape("encode_images", latents, (2, *backbone.latent_shape))
    assert torch.equal(backbone.encode_images(pictures), latents), "the same pictures have other latents a second time"
    assert_same("the latents of a picture beside another", latents[1:], backbone.encode_images(pictures[1:]))
    decoded = backbone.decode_latents(latents)
    assert_shape("decode_latents", decoded, tuple(pictures.shape))
    assert float(decoded.min()) >= 0 and float(decoded.max()) <= 1, (
        f"decode_latents has values from {float(decoded.min()):.3g} to {float(decoded.max()):.3g}, not in [0, 1]"
    )
    if isinstance(backbone, PosteriorBackbone):
        mean, deviation = backbone.posterior(pictures)
        assert_same("the posterior's mean, against encode_images", mean, latents)
        assert deviation.shape == mean.shape and bool((deviation > 0).all()), "the posterior's deviation is not above 0"


@torch.no_grad()
def latents_are_the_pipelines(subject: BackboneUnderTest) -> None:
    """Latents that the pipeline ends with are decoded to its picture; a picture that is encoded and decoded is what the
    autoencoder makes of it, so that latents are scaled as the noise predictor takes them.
    """
    needs_reference(subject)
    backbone = subject.backbone
    ended: Any = subject.reference_picture(subject.prompt, 5, output_type="latent")
    latents = subject.latents_of(ended[None])
    expected = subject.reference_picture(subject.prompt, 5)
    decoded = Image.fromarray((backbone.decode_latents(latents)[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert_same_picture("the picture of the pipeline's latents", decoded, expected)
    pictures, autoencoder = pictures_of(backbone, 1), subject.reference.vae
    encoded = autoencoder.encode(pictures * 2 - 1)
    its_own = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    through = autoencoder.decode(its_own).sample / 2 + 0.5
    again = backbone.decode_latents(backbone.encode_images(pictures))
    assert_same("a picture encoded and decoded, against the pipeline's autoencoder", again, through.clamp(0, 1))


def noise_grows_with_the_share(subject: BackboneUnderTest) -> None:
    """At share 0 there is almost only the picture, at share 1 almost only noise, and always more noise in between."""
    backbone = subject.backbone
    kept = []
    for share in SHARES:
        signal, noise = mixture_at(backbone, share)
        kept.append(signal**2 / (signal**2 + noise**2))
    shown = ", ".join(f"{share:g}: {part:.3f}" for share, part in zip(SHARES, kept, strict=True))
    assert kept[0] > 0.95, f"at share 0 too little is of the picture (part of the variance by share: {shown})"
    assert kept[-1] < 0.05, f"at share 1 too much is of the picture (part of the variance by share: {shown})"
    assert all(later < earlier for earlier, later in itertools.pairwise(kept)), (
        f"a greater share is not noisier (part of the variance that is the picture's, by share: {shown})"
    )
    latents, eps = latents_of(backbone, 2)
    both = backbone.add_noise(latents, eps, torch.tensor([0.2, 0.7]))
    assert_shape("add_noise", both, tuple(latents.shape))
    for place, share in enumerate((0.2, 0.7)):
        one = slice(place, place + 1)
        alone = backbone.add_noise(latents[one], eps[one], torch.tensor([share]))
        assert_same(f"latents noised at share {share} beside others", both[one], alone)


def the_training_target_tells_picture_from_noise(subject: BackboneUnderTest) -> None:
    """The target is linear in latents and noise, and with the noisy latents it says what the latents were: whoever
    predicts it perfectly has denoised perfectly.
    """
    backbone = subject.backbone
    latents, noise = latents_of(backbone, 1)
    for share in SHARES[1:-1]:
        at = torch.tensor([share])
        target = backbone.training_target(latents, noise, at)
        assert_shape("training_target", target, tuple(latents.shape))
        of_latents, of_noise = parts_of_both(backbone.training_target, latents, share)
        assert_same(f"training_target at share {share}", target, of_latents * latents + of_noise * noise)
        signal, amount = mixture_at(backbone, share)
        determinant = signal * of_noise - amount * of_latents
        assert abs(determinant) > 1e-3, (
            f"at share {share} the target is {of_latents:.3g} x + {of_noise:.3g} e and the noisy latents are "
            f"{signal:.3g} x + {amount:.3g} e: the latents x cannot be told from them"
        )
        noisy = backbone.add_noise(latents, noise, at)
        told = (of_noise * noisy - amount * target) / determinant
        assert_same(f"latents told from the target at share {share}", told, latents)
