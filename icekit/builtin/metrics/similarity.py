"""The UCE protocol (ConceptExpress, Hao et al., ECCV 2024): do images made with a concept's tokens look like it?

For every concept images are generated with its tokens and embedded; SIM^I, SIM^C and ACC^k compare them with the
source. A concept that was not found has no images: it counts as wrong in ACC^k and is left out of SIM^I.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from icekit.builtin.metrics.settings import ClipSettings, DinoSettings, PromptedBy
from icekit.pixels import isolate, to_tensor
from icekit.protocols import (
    Backbone,
    BenchImage,
    Column,
    FoundConcept,
    InputError,
    Outcome,
    Score,
    object_tokens,
)


def object_phrase(concept: FoundConcept, prompted_by: PromptedBy = "instance") -> str:
    """A concept's tokens as a phrase: ``"a <cup-0-instance> <cup-0>"``, or ``"a <cup-0> <cup-0-colour> ..."``."""
    attributes = [token for part, token in concept.tokens.items() if part not in ("category", "instance")]
    if prompted_by == "attributes" and attributes and "category" in concept.tokens:
        return " ".join(["a", concept.tokens["category"], *attributes])
    return f"a {object_tokens(concept.tokens)}"


def masked(image: Tensor, mask: Tensor, background: str) -> Tensor:
    """The image ``[3, H, W]`` masked to a concept (bool ``[H, W]``)."""
    return isolate(image, mask) if background == "mean" else image * mask


def mean_cosine(generated: Tensor, source: Tensor) -> float:
    """Mean cosine of embeddings ``[N, D]`` with one embedding ``[D]``, all of length one; in [-1, 1]."""
    return float((generated @ source).mean())


def share_within_nearest(generated: Tensor, prototypes: Tensor, concepts: Sequence[int], own: int, k: int) -> float:
    """ACC^k: the share of images whose own concept is among the ``k`` nearest to them, by cosine.

    A concept is as near as the nearest of its prototypes.

    Args:
        generated: the images' embeddings ``[N, D]``, of length one.
        prototypes: embeddings of the data set's concepts ``[P, D]``, of length one.
        concepts: which concept each prototype shows, 0 to C - 1.
        own: the images' own concept.
        k: how many may be nearest; of equally near ones the own concept is the first.
    """
    similarity = generated @ prototypes.T
    index = torch.tensor(concepts).expand_as(similarity)
    nearness = torch.full((len(generated), max(concepts) + 1), -torch.inf).scatter_reduce(1, index, similarity, "amax")
    nearer = (nearness > nearness[:, own : own + 1]).sum(dim=1)
    return float((nearer < k).float().mean())


class _Similarity:
    """What the metrics of this module share: the encoder, and pictures as it takes them."""

    Settings: type[ClipSettings] | type[DinoSettings] = ClipSettings
    columns: Mapping[str, Column] = {}
    needs: Collection[str] = ()

    def __init__(self, settings: ClipSettings | DinoSettings, backbone: Backbone) -> None:
        self.settings = settings
        self.encoder = settings.encoder(backbone.device)

    def prepare(self, images: Sequence[BenchImage]) -> None:
        """Nothing to prepare."""

    def phrase(self, concept: FoundConcept) -> str:
        """What a concept is prompted with."""
        return object_phrase(concept, self.settings.prompt)

    def embed_generated(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Generated pictures -> ``[N, D]``."""
        return self.encoder.embed([to_tensor(picture) for picture in pictures])

    def embed_concept(self, image: BenchImage, mask: Tensor) -> Tensor:
        """The source image masked to a concept -> ``[D]``."""
        return self.encoder.embed([masked(image.pixels, mask, self.settings.background)])[0]

    def score(self, value: float | None, prompts: Sequence[str]) -> dict[str, Score]:
        """The value of this metric's only column."""
        [column] = self.columns
        return {column: Score(value, prompts)}


class Identity(_Similarity):
    """SIM^I: cosine of images made with a concept's tokens to the source image masked to the concept (CLIP)."""

    columns: Mapping[str, Column] = {"sim_i": Column("likeness of a concept's images to the concept, CLIP")}

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """The mean over the concepts found."""
        values, prompts = [], []
        for match in outcome.matches:
            if match.found is not None:
                prompts.append(f"a photo of {self.phrase(match.found)}")
                generated = self.embed_generated(outcome.generate(prompts[-1]))
                values.append(mean_cosine(generated, self.embed_concept(outcome.image, match.mask)))
        return self.score(_mean(values), prompts)


class Composition(_Similarity):
    """SIM^C: cosine of images made with all concepts' tokens together to the whole source image (CLIP)."""

    columns: Mapping[str, Column] = {"sim_c": Column("likeness of images of all concepts to the whole image, CLIP")}

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """All concepts found, in one prompt; as many of them, from the first on, as fit into it."""
        for count in range(len(outcome.found), 0, -1):
            prompt = "a photo of " + " and ".join(self.phrase(concept) for concept in outcome.found[:count])
            try:
                generated = self.embed_generated(outcome.generate(prompt))
            except InputError:  # too long for the text encoder
                continue
            return self.score(mean_cosine(generated, self.encoder.embed([outcome.image.pixels])[0]), (prompt,))
        return self.score(None, ())


class Accuracy(_Similarity):
    """ACC^1: share of a concept's images that are nearer to it than to any other concept of the data set (CLIP).

    Where the data set says of two objects the same word and attributes, they are one concept shown twice: no image made
    after the one could be told to be not the other.
    """

    columns: Mapping[str, Column] = {"acc1": Column("images nearest to their own concept of the data set, CLIP")}
    needs: Collection[str] = ("masks",)
    k = 1

    def prepare(self, images: Sequence[BenchImage]) -> None:
        """Embed every true concept of the data set."""
        prototypes = []
        known: dict[Hashable, int] = {}
        self._concepts: dict[tuple[str, int], int] = {}
        for image in images:
            for number, concept in enumerate(image.concepts):
                place = (image.name, number)
                look = (concept.word, frozenset(concept.attributes.items())) if concept.attributes else place
                self._concepts[place] = known.setdefault(look, len(known))
                prototypes.append(self.embed_concept(image, concept.mask))
        self._prototypes = torch.stack(prototypes)

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """The mean over the true concepts; 0 for one that was not found."""
        values, prompts = [], []
        for number, match in enumerate(outcome.matches):
            if match.found is None:
                values.append(0.0)
                continue
            prompts.append(f"a photo of {self.phrase(match.found)}")
            generated = self.embed_generated(outcome.generate(prompts[-1]))
            own = self._concepts[outcome.image.name, number]
            values.append(share_within_nearest(generated, self._prototypes, list(self._concepts.values()), own, self.k))
        return self.score(_mean(values), prompts)


class Accuracy3(Accuracy):
    """ACC^3: share of a concept's images that have it among the three nearest concepts of the data set (CLIP)."""

    columns: Mapping[str, Column] = {"acc3": Column("images with their own concept among the nearest three, CLIP")}
    k = 3


class DinoIdentity(Identity):
    """SIM^I with DINO's embeddings."""

    Settings = DinoSettings
    columns: Mapping[str, Column] = {"sim_i_dino": Column("likeness of a concept's images to the concept, DINO")}


class DinoComposition(Composition):
    """SIM^C with DINO's embeddings."""

    Settings = DinoSettings
    columns: Mapping[str, Column] = {
        "sim_c_dino": Column("likeness of images of all concepts to the whole image, DINO")
    }


class DinoAccuracy(Accuracy):
    """ACC^1 with DINO's embeddings."""

    Settings = DinoSettings
    columns: Mapping[str, Column] = {"acc1_dino": Column("images nearest to their own concept of the data set, DINO")}


class DinoAccuracy3(Accuracy3):
    """ACC^3 with DINO's embeddings."""

    Settings = DinoSettings
    columns: Mapping[str, Column] = {"acc3_dino": Column("images with their own concept among the nearest three, DINO")}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
