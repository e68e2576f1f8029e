"""ConceptExpress's localisation (Hao et al., ECCV 2024): the salient parts of an image, without a word.

The self-attention of a diffusion model says for every place of the image which places belong to it. These
distributions are clustered by FINCH under symmetric KL; clusters that the prompt's end-of-text token hardly looks at
are background; what is left is clustered on.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy import ndimage
from torch import Tensor

from icekit.builtin.attention_segmentor import Timesteps, upsample
from icekit.builtin.mask_refinement import refine, without_islands
from icekit.protocols import (
    Backbone,
    ComponentSettings,
    InputError,
    Proposal,
)
from icekit_neighbours.finch import Array, Labels, finch, means, renumbered


class ConceptExpressSegmentor:
    """The regions of an image by its self-attention: a ``protocols.Proposer``. Words are the retriever's to find.

    Raises:
        InputError: attention resolutions that the backbone does not have.
    """

    class Settings(ComponentSettings):
        """Settings of the ``conceptexpress`` segmentor; the numbers are ours, the paper's are for its own maps."""

        caption: str = Field("", description="prompt under which the attention is looked at; by default no word at all")
        salient_by: Literal["end_token", "last_word"] = Field(
            "end_token",
            description="whose cross-attention tells objects from background: the end-of-text token's, as published, "
            "or the caption's last word's, for a model that hides the end token from its noise predictor",
        )
        salience: float = Field(
            1.0, gt=0, description="a cluster is background if its attention is below this many times the image's mean"
        )
        timestep: Timesteps = Field(
            (0.15,), description="how noisy, 0 to 1 of the noise schedule; several are averaged"
        )
        draws: int = Field(4, ge=1, description="draws of the noise that are averaged, for each timestep")
        noise_seed: int = Field(0, ge=0, description="seed of the noise")
        resolution: int | None = Field(
            None, ge=1, description="attention grid that is clustered; none: the model's largest up to 32"
        )
        clusters: int = Field(
            10, ge=1, description="background is removed in the coarsest partition with this many clusters or more"
        )
        merge_below: float = Field(
            1.0,
            gt=0,
            description="what is left is merged further where its symmetric KL divergence is below this, nats",
        )
        apart: bool = Field(
            False, description="each connected part is a region of its own: for scenes of separate things"
        )
        min_area: float = Field(0.01, ge=0, lt=1, description="regions below this share of the image go")
        refinement: bool = Field(False, description="let the masks' edges follow the image's (not published)")

        @model_validator(mode="after")
        def _has_last_word(self) -> ConceptExpressSegmentor.Settings:
            if self.salient_by == "last_word" and not self.caption.split():
                raise ValueError("with salient_by=last_word, caption must have a word")
            return self

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        self.settings = settings
        self._backbone = backbone
        offered = backbone.attention_resolutions
        self._grid = settings.resolution or max((r for r in offered if r <= 32), default=min(offered))
        if self._grid not in offered:
            choices = ", ".join(str(one) for one in offered)
            raise InputError(f"segmentor.resolution: {self._grid} is none of the backbone's grids: {choices}")

    @torch.no_grad()
    def propose(self, image: Tensor) -> list[Proposal]:
        """The salient regions of the image ``[3, H, W]``, largest first; bool ``[H, W]`` masks that do not overlap.

        Raises:
            InputError: the model hides the end token, and ``salient_by`` is ``end_token``.
        """
        settings, grid = self.settings, self._grid
        self_attention, salience = self._attention(image)
        labels = salient_clusters(
            self_attention.double().numpy(),
            salience.flatten().double().numpy(),
            clusters=settings.clusters,
            salience=settings.salience,
            merge_below=settings.merge_below,
        ).reshape(grid, grid)
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
                mask = torch.from_numpy(without_islands(mask.numpy(), 0.1))
            mask &= free
            if bool(mask.any()) and float(mask.float().mean()) >= self.settings.min_area:
                masks.append(mask)
                free &= ~mask
        return masks

    def _attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Attention at the image, mean over timesteps and draws of the noise; float32 on the CPU.

        Returns:
            self_attention: ``[r * r, r * r]``, each row sums to one.
            salience: the cross-attention of the token that stands for the whole caption, ``[r, r]``.
        """
        backbone, settings, grid = self._backbone, self.settings, self._grid
        last, generator = self._summary_position(), torch.Generator().manual_seed(settings.noise_seed)
        conditioning = backbone.encode_prompts([settings.caption])
        latents = backbone.encode_images(image[None].to(backbone.device))
        self_attention, salience, passes = torch.zeros(grid**2, grid**2), torch.zeros(grid, grid), 0
        with backbone.capture_attention(cross=(grid,), self_=(grid,)) as maps:
            for share in settings.timestep:
                step = min(round(share * backbone.num_timesteps), backbone.num_timesteps - 1)
                timesteps = torch.tensor([step], device=backbone.device)
                for _ in range(settings.draws):
                    noise = torch.randn(latents.shape, generator=generator).to(latents)
                    backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
                    self_attention += maps.self_(grid)[0].float().cpu()
                    salience += maps.cross(grid)[0, last].float().cpu()
                    passes += 1
        if not bool((salience > 0).any()):
            raise InputError(
                "segmentor.salient_by: this model hides the end token from its noise predictor; use last_word and a"
                " caption, as in --set segmentor.salient_by=last_word --set 'segmentor.caption=a photo of things'"
            )
        return self_attention / passes, salience / passes

    def _summary_position(self) -> int:
        """The position that has read the whole caption (the encoder is causal): its last word, or the end after it."""
        caption = self.settings.caption
        words = caption.split()
        last = max(self._backbone.token_positions(caption, [words[-1]])[0]) if words else 0
        return last if self.settings.salient_by == "last_word" else last + 1


def salient_clusters(
    self_attention: Array, attention: Array, *, clusters: int, salience: float, merge_below: float
) -> Labels:
    """FINCH on the attention distributions, background removed, FINCH on what is left.

    Args:
        self_attention: ``[n, n]``, each row (one place of the grid) sums to one.
        attention: ``[n]``, how much the summarising token looks at each place.
        clusters: background is removed in the coarsest partition with this many clusters or more (or the finest).
        salience: a cluster is background if its mean attention is below this many times the mean of all places.
        merge_below: symmetric KL divergence under which salient clusters are merged further, nats.

    Returns:
        int64 ``[n]``: the cluster of each place, -1 for background.
    """
    partitions = finch(self_attention)
    fine = [labels for labels in partitions if labels.max() + 1 >= clusters]
    labels = fine[-1] if fine else partitions[0]
    looked_at = np.bincount(labels, weights=attention) / np.bincount(labels)
    salient = np.flatnonzero(looked_at >= salience * attention.mean())
    found = np.full(len(labels), -1, dtype=np.int64)
    if not len(salient):
        return found
    merged = finch(means(self_attention, labels)[salient], merge_below)[-1]
    for cluster, target in zip(salient, merged, strict=True):
        found[labels == cluster] = target
    return found


def connected_parts(labels: Labels) -> Labels:
    """Number each 4-connected part of equal labels by itself: int64 ``[r, r]``, -1 stays -1."""
    parts = np.full(labels.shape, -1, dtype=np.int64)
    for label in range(int(labels.max()) + 1):
        pieces, _ = ndimage.label(labels == label)
        inside: NDArray[np.bool_] = pieces > 0
        parts[inside] = parts.max() + pieces[inside]
    inside = parts >= 0
    parts[inside] = renumbered(parts[inside])
    return parts
