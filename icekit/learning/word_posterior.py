"""Which of an attribute's words a region is, by the denoising loss itself: the words compete as hypotheses.

A diffusion model denoises better under the words that are true of an image than under others: its loss is a classifier
(Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV 2023). Here that classifier is learned step
by step as a distribution over words, which is where an attribute's token starts from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from icekit.protocols import Backbone

LEAST_SHARE = 1e-2
"""A word that is less likely than this share of the likeliest is not tried any more."""


def signal_to_noise(backbone: Backbone, shares: Tensor) -> Tensor:
    """The amplitude of the image over that of the noise in a noised latent, above 0: float32 ``[B]``.

    shares: of the noise schedule, float ``[B]``. sqrt(alpha_bar / (1 - alpha_bar)) of a variance-preserving schedule,
    (1 - t) / t of a rectified flow: read from what the backbone's own forward process does to an image of ones without
    noise, and to noise of ones without an image.
    """
    ones = torch.ones(len(shares), *backbone.latent_shape, device=backbone.device)
    signal = backbone.add_noise(ones, torch.zeros_like(ones), shares)
    noise = backbone.add_noise(torch.zeros_like(ones), ones, shares)
    return signal[:, 0, 0, 0].float() / noise[:, 0, 0, 0].float().clamp_min(1e-6)


class Mixture:
    """A token that is a weighted mean of words: softmax(logits) @ rows, encoder by encoder.

    Such a token can say nothing but what its attribute's words say: it cannot become a copy of the instance.

    rows: text encoder -> float32 ``[W, D]``. logits: a parameter ``[W]``, at first the logarithms of ``weights``,
    float32 ``[W]``, above zero.
    """

    def __init__(self, rows: Mapping[str, Tensor], weights: Tensor) -> None:
        self.rows = dict(rows)
        device = next(iter(self.rows.values())).device
        self.logits = nn.Parameter(weights.to(device, torch.float32).log(), requires_grad=False)

    def token(self) -> dict[str, Tensor]:
        """Rows ``[D]`` by text encoder; gradients flow to the logits."""
        shares = self.logits.softmax(dim=0)
        return {encoder: shares @ rows for encoder, rows in self.rows.items()}


class WordPosterior(Mixture):
    """A distribution q over words, learned by mirror descent on the mean of the words' losses, E_q[L(w)]:

        log q(w) <- log q(w) - rate * (L(w) - mean L) / s

    up to normalisation, where s is the root mean square of all L(w) - mean L so far: the rate has no unit. Many steps
    of it are a product of likelihoods. A token's loss at the words' mean row is another thing, for a mean of rows is
    no word.

    The weights that it starts with are the prior. squares, count: float32 scalars, what s is made of.
    """

    def __init__(self, rows: Mapping[str, Tensor], prior: Tensor) -> None:
        super().__init__(rows, prior)
        self.squares = torch.zeros((), device=self.logits.device)
        self.count = torch.zeros((), device=self.logits.device)

    @property
    def probabilities(self) -> Tensor:
        """q: ``[W]``, sums to one."""
        return self.logits.softmax(dim=0)

    def sharpened(self, sharpness: float) -> Tensor:
        """The power ``sharpness`` of q, normalised: ``[W]``. The likeliest word stays so."""
        return (sharpness * self.logits).softmax(dim=0)

    def tried(self) -> list[int]:
        """The words that are still in question, in order."""
        q = self.probabilities
        return (q >= LEAST_SHARE * q.max()).nonzero().flatten().tolist()

    def update(self, words: list[int], losses: Tensor, rate: float) -> None:
        """One step, in place.

        Args:
            words: the words whose losses were measured, n of them.
            losses: float ``[B, n]``, for the same B pictures and noises under each word.
            rate: above 0.
        """
        better = losses - losses.mean(dim=1, keepdim=True)
        self.squares += better.square().mean()
        self.count += 1
        scale = (self.squares / self.count).sqrt()
        if bool(scale > 0):
            self.logits[words] -= rate * better.mean(dim=0) / scale
