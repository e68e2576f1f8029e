"""The contrast of the `unet` stage: a picture must be denoised better under its caption than under a wrong one.

What a single word changes of a picture is small beside all that noise hides, so the denoising loss teaches it late:
material, and which of two objects a colour belongs to, last of all. But a denoiser is a classifier too (Li et al. 2023,
"Your Diffusion Model is Secretly a Zero-Shot Classifier"): of two captions that is likelier under which the error is
smaller. Both errors share the picture, the noise and the timestep, and what they have in common cancels. Hard negatives
for diffusion models are Krojer et al.'s (2023, "Are Diffusion Models Vision-And-Language Reasoners?").
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from icekit_tabletop.train.data import VALUES
from icekit_tabletop.world import ObjectSpec, is_held_out

EXCHANGED = 0.7
"""Share of the wrong captions of several objects in which two of them have exchanged a value."""

CHANGED = {"shape": 0.35, "colour": 0.15, "material": 0.35, "texture": 0.15}
"""How often each attribute is the one that is wrong: shapes and materials are the hardest to see."""

TRIES = 8


def mistake(objects: Sequence[ObjectSpec], rng: random.Random) -> tuple[ObjectSpec, ...] | None:
    """The objects with one thing wrong: two have exchanged a value, or one has another.

    No combination that is held out is ever named, not even as wrong. None when no mistake of the kind can be made.
    """
    for _ in range(TRIES if objects else 0):
        [attribute] = rng.choices(list(CHANGED), list(CHANGED.values()))
        wrong = list(objects)
        if len(wrong) > 1 and rng.random() < EXCHANGED:
            first, second = rng.sample(range(len(wrong)), 2)
            values = getattr(wrong[first], attribute), getattr(wrong[second], attribute)
            wrong[first] = dataclasses.replace(wrong[first], **{attribute: values[1]})
            wrong[second] = dataclasses.replace(wrong[second], **{attribute: values[0]})
        else:
            place = rng.randrange(len(wrong))
            wrong[place] = dataclasses.replace(wrong[place], **{attribute: rng.choice(VALUES[attribute])})
        if set(wrong) != set(objects) and not any(is_held_out(o.shape, o.colour, o.material) for o in wrong):
            return tuple(wrong)
    return None


def contrast_loss(predicted: Tensor, contradicted: Tensor, target: Tensor) -> Tensor:
    """-log of the probability that the caption and not the wrong one is the picture's, as the denoiser sees it.

    With errors e = |prediction - target|^2, summed over a picture, and noise of unit variance the logarithm of the
    likelihoods' ratio is (e_wrong - e_true) / 2; the loss is log(1 + exp of minus that).

    Args:
        predicted: float32 [B, ...], what is predicted under the captions.
        contradicted: the same under the wrong captions.
        target: what should have been predicted.

    Returns:
        The mean over the pictures; 0 without pictures.
    """
    if not len(target):
        return target.new_zeros(())
    true, wrong = ((each - target).square().flatten(1).sum(1) for each in (predicted, contradicted))
    return F.softplus((true - wrong) / 2).mean()
