"""The triplet losses of ICE (Cendra and Han, "ICE: Intrinsic Concept Extraction from a Single Image", CVPR 2025).

Below, E(text) is the pooled, L2-normalised output of the text encoder: ``Backbone.embed_texts``. Both losses are finite
for every finite input: a satisfied hinge adds an exact zero to a mean whose denominator is the number of its terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icekit.learning.settings import IntrinsicForm


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


def intrinsic_triplet(anchors: Tensor, tokens: Tensor, scale: float = 0.7, form: IntrinsicForm = "pairs") -> Tensor:
    """Keeps every token near its own anchor and pushes the concept's other tokens, its rivals, off that anchor.

        h_jk = mean over D of max(0, (E(a_j) - E(t_j))^2 - (E(a_j) - E(t_k))^2 + gamma_jk)
        gamma_jk = scale * (E(a_j) - E(a_k))^2

    Squares, margin and hinge are element-wise, before the mean. Slot 0 is the category, its anchor a_0 the retrieved
    word; slots 1 to A are the intrinsic attributes (a_j = "colour", t_j its token). The two forms differ in which pairs
    (j, k) they take and how they weigh them; both are means over concepts:

    - ``"tokens"``, as ICE's published code does it: L = sum over j of the mean over j's rivals k of h_jk. The rivals of
      an attribute are the other attributes; those of the category are all attributes. So the category is held against
      its own word and the attributes' tokens are pushed off that word, but the category is no rival at an attribute's
      anchor.
    - ``"pairs"``: L = mean over all ordered pairs j != k of h_jk, so that its size does not grow with the number of
      attributes. The category is a rival at every anchor. Where all h_jk are alike it is A + 1 times weaker than
      ``"tokens"``: 3 to 5 times with 2 to 4 attributes.

    Args:
        anchors: E of the anchors, float ``[C, 1 + A, D]``: concepts, slots, embedding. ``[1, 1 + A, D]`` broadcasts.
        tokens: E of the tokens, ``[C, 1 + A, D]``, slots in the same order.
        scale: the paper's 0.7 in gamma_jk.
        form: which of the two.

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
    # On the diagonal j = k all three terms cancel to an exact zero: it adds nothing to a sum, and is not counted.
    if form == "pairs":
        return hinge.sum() / (tokens.shape[0] * slots * (slots - 1) * tokens.shape[2])
    concepts_mean = hinge.mean(dim=(0, 3))  # [j, k]
    category = concepts_mean[0].sum() / (slots - 1)
    attributes = concepts_mean[1:, 1:].sum() / max(slots - 2, 1)  # a lone attribute has no rival
    return category + attributes
