"""ConceptExpress's localisation (Hao et al., ECCV 2024): the salient parts of an image, without a word.

The self-attention of a diffusion model says for every place of the image which places belong to it. These
distributions are clustered by FINCH under symmetric KL; clusters that hardly look at the prompt's end-of-text token
are background; what is left is clustered on.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, sparse
from torch import Tensor

from icekit.attention import flat, refine, require_similarity, upsample, without_islands
from icekit.protocols import Backbone, Capability, InputError, Proposal
from icekit_neighbours.finch import (
    Array,
    Labels,
    clusters_touching,
    finch,
    grid_touching,
    longest_link,
    means,
    renumbered,
)
from icekit_neighbours.looking import look
from icekit_neighbours.settings import LocalisationSettings


class ConceptExpressSegmentor:
    """The regions of an image by its self-attention: a ``protocols.Proposer``. Words are the retriever's to find.

    Raises:
        InputError: the backbone does not tell what is looked at.
    """

    Settings = LocalisationSettings

    needs: Collection[Capability] = ("attention", "similarity")

    def __init__(self, settings: LocalisationSettings, backbone: Backbone) -> None:
        require_similarity(backbone)
        self.settings = settings
        self._backbone = backbone

    @torch.no_grad()
    def propose(self, image: Tensor) -> list[Proposal]:
        """The salient regions of the image ``[3, H, W]``, largest first; bool ``[H, W]`` masks that do not overlap.

        Raises:
            InputError: the model hides the end token, and ``salient_by`` is ``end_token``.
        """
        settings = self.settings
        pixels, salience = self._attention(image)
        grid = (pixels.shape[0], pixels.shape[1])
        labels = salient_clusters(
            flat(pixels).double().numpy(),
            salience.flatten().double().numpy(),
            clusters=settings.clusters,
            salience=settings.salience,
            merge_below=settings.merge_below,
            touching=grid_touching(grid) if settings.adjacent else None,
        ).reshape(grid)
        if settings.apart:
            labels = connected_parts(labels)
        return [Proposal(mask) for mask in self._masks(labels, image)]

    def _masks(self, labels: Labels, image: Tensor) -> list[Tensor]:
        """Each cluster at the image's size: bool ``[H, W]``, largest first."""
        if labels.max() < 0:
            return []
        size = (int(image.shape[1]), int(image.shape[2]))
        kinds = torch.from_numpy(labels[None] == np.arange(-1, labels.max() + 1)[:, None, None])
        soft = upsample(kinds.float(), size)  # background first
        free = torch.ones(size, dtype=torch.bool)
        masks = []
        winner = soft.argmax(dim=0)
        for number in sorted(range(1, len(soft)), key=lambda n: -int((winner == n).sum())):
            mask = winner == number
            if self.settings.refinement:
                mask = refine(soft[number], image.cpu(), level=0.5)
            elif bool(mask.any()):
                mask = without_islands(mask, 0.1)
            mask &= free
            if bool(mask.any()) and float(mask.float().mean()) >= self.settings.min_area:
                masks.append(mask)
                free &= ~mask
        return masks

    def _attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What places look at, ``[h, w, h, w]``, and how much each of them looks at the token that stands for the whole
        caption, ``[h, w]``; float32 on the CPU.
        """
        settings = self.settings
        pixels, words = look(
            self._backbone,
            image,
            settings.caption,
            settings.grids,
            shares=settings.shares,
            noise=settings.noise,
            draws=settings.draws,
            noise_seed=settings.noise_seed,
        )
        salience = words[self._summary_position()]
        if not bool((salience > 0).any()):
            raise InputError(
                "segmentor.salient_by: this model hides the end token from its noise predictor; use last_word and a"
                " caption, as in --set segmentor.salient_by=last_word --set 'segmentor.caption=a photo of things'"
            )
        return pixels, salience

    def _summary_position(self) -> int:
        """The position that has read the whole caption (the encoder is causal): its last word, or the end after it."""
        caption = self.settings.caption
        words = caption.split()
        last = max(self._backbone.token_positions(caption, [words[-1]])[0]) if words else 0
        return last if self.settings.salient_by == "last_word" else last + 1


def salient_clusters(
    self_attention: Array,
    attention: Array,
    *,
    clusters: int,
    salience: float,
    merge_below: float | None,
    touching: sparse.spmatrix | None = None,
) -> Labels:
    """FINCH on the attention distributions, background removed, FINCH on what is left.

    Args:
        self_attention: ``[n, n]``, each row (one place of the grid) sums to one.
        attention: ``[n]``, how much each place looks at the summarising token.
        clusters: background is removed in the coarsest partition with this many clusters or more (or the finest).
        salience: a cluster is background if its mean attention is below this many times the mean of all places.
        merge_below: symmetric KL divergence under which salient clusters are merged further, nats; the first clustering
            has no limit. None: both have that of ``longest_link``.
        touching: ``[n, n]``, nonzero where places are neighbours: only what touches is linked. None: anything may be.

    Returns:
        int64 ``[n]``: the cluster of each place, -1 for background.
    """
    adapted = longest_link(self_attention, touching) if merge_below is None else None
    partitions = finch(self_attention, np.inf if adapted is None else adapted, touching)
    fine = [labels for labels in partitions if labels.max() + 1 >= clusters]
    labels = fine[-1] if fine else partitions[0]
    looked_at = np.bincount(labels, weights=attention) / np.bincount(labels)
    salient = np.flatnonzero(looked_at >= salience * attention.mean())
    found = np.full(len(labels), -1, dtype=np.int64)
    if not len(salient):
        return found
    near = None
    if touching is not None:
        near = sparse.csr_matrix(clusters_touching(touching, labels)[np.ix_(salient, salient)])
    limit = adapted if adapted is not None else merge_below
    assert limit is not None
    merged = finch(means(self_attention, labels)[salient], limit, near)[-1]
    for cluster, target in zip(salient, merged, strict=True):
        found[labels == cluster] = target
    return found


def connected_parts(labels: Labels) -> Labels:
    """Number each 4-connected part of equal labels by itself: int64 ``[h, w]``, -1 stays -1."""
    parts = np.full(labels.shape, -1, dtype=np.int64)
    for label in range(int(labels.max()) + 1):
        pieces, _ = ndimage.label(labels == label)
        inside: NDArray[np.bool_] = pieces > 0
        parts[inside] = parts.max() + pieces[inside]
    inside = parts >= 0
    parts[inside] = renumbered(parts[inside])
    return parts
