"""The triplet losses of ICE (Cendra and Han, "ICE: Intrinsic Concept Extraction from a Single Image", CVPR 2025).

Below, E(text) is the pooled, L2-normalised output of the text encoder: ``Backbone.embed_texts``. Both losses are finite
for every finite input: a satisfied hinge adds an exact zero to a mean whose denominator is the number of its terms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def object_triplet(anchor: Tensor, category: Tensor, instance: Tensor, margin: float = 0.05) -> Tensor:
    """Keeps the category token near the retrieved word and pushes the instance token off it.

        L = mean over concepts of max(0, d(E(anchor), E(category)) - d(E(anchor), E(instance)) + margin)

    with d(u, v) = mean over D of (u - v)^2. Between unit vectors d is at most 4 / D, so with D > 80 the paper's margin
    of 0.05 is never reached and the loss pulls and pushes at every step; and where a token equals its anchor its
    gradient is zero: both tokens start there, and it is the denoising loss that moves them first.

    Args:
        anchor: E of the retrieved word, float ``[C, D]``, one row per concept.
        category: E of the category token, ``[C, D]``.
        instance: E of the instance token, ``[C, D]``.
        margin: the hinge's margin, in the units of d.

    Returns:
        A scalar, at least zero.
    """
    positive = (anchor - category).square().mean(-1)
    negative = (anchor - instance).square().mean(-1)
    return torch.relu(positive - negative + margin).mean()


def intrinsic_triplet(anchors: Tensor, tokens: Tensor, scale: float = 0.7) -> Tensor:
    """Keeps every token near its own anchor and pushes the concept's other tokens off that anchor.

        L = mean over concepts, ordered pairs j != k and D of
            max(0, (E(a_j) - E(t_j))^2 - (E(a_j) - E(t_k))^2 + gamma_jk),    gamma_jk = scale * (E(a_j) - E(a_k))^2

    Squares, margin and hinge are element-wise, before the mean. One slot j is one intrinsic attribute (a_j = "colour",
    t_j its token). The category is one slot more, its anchor the retrieved word: it is held against its own word and
    pushed off the attributes' tokens, and they off it, in the same way.

    Args:
        anchors: E of the anchors, float ``[C, A, D]``: concepts, slots, embedding. ``[1, A, D]`` broadcasts.
        tokens: E of the tokens, ``[C, A, D]``, slots in the same order.
        scale: the paper's 0.7 in gamma_jk.

    Returns:
        A scalar, at least zero; zero when there is only one slot, for it has no other to be pushed from.
    """
    slots = tokens.shape[1]
    if slots < 2:
        return tokens.sum() * 0.0
    anchors = anchors.expand_as(tokens)
    own = (anchors - tokens).square().unsqueeze(2)  # [C, j, 1, D]
    other = (anchors.unsqueeze(2) - tokens.unsqueeze(1)).square()  # [C, j, k, D]
    gamma = scale * (anchors.unsqueeze(2) - anchors.unsqueeze(1)).square()  # [C, j, k, D]
    hinge = torch.relu(own - other + gamma)
    # On the diagonal j = k all three terms cancel to an exact zero: it adds nothing to the sum, and is not counted.
    return hinge.sum() / (tokens.shape[0] * slots * (slots - 1) * tokens.shape[2])
