"""Settings of all methods. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from icekit.attention.settings import Grids, LookingSettings, Shares
from icekit.learning.settings import MAX_STEPS, LessonSettings, PriorSettings
from icekit.learning.templates import Templates
from icekit.protocols import Trained

Shown = Literal["alone", "image"]
Start = Literal["noun", "hints"]
START = (
    "noun: a token starts as the row of the region's word (published); hints: as the mean of that and of the rows of "
    "the words that the retriever described the region with, where there are some"
)

GRIDS = (64, 32, 16, 8)
"""Cells along the picture's shorter side of the grids that are read: all those of the published model."""


class WeightsSettings(LessonSettings, PriorSettings):
    """Settings of those that train the noise predictor's weights too."""

    weights: Trained = Field(
        "lora",
        description="what is trained of the noise predictor: a LoRA adapter on its attention, or all of its weights "
        "(published), which a run then keeps as a model of its own",
    )
    weights_rank: int = Field(4, ge=1, le=1024, description="rank of the LoRA adapter")


class PictureSettings(LessonSettings):
    """Settings of learners without masks of their own."""

    shown: Shown = Field(
        "alone",
        description="what a token is learned from: alone, the object on plain colours, or image, the whole image",
    )
    backgrounds: int = Field(
        8, ge=1, le=1000, description="number of random plain colours that an object alone is shown on"
    )
    batch_size: int = Field(1, ge=1, le=1000, description="pictures of each concept in one step")


class TextualInversionSettings(PictureSettings):
    """Settings of ``TextualInversionLearner``; the defaults are the published ones."""

    steps: int = Field(5000, ge=1, le=MAX_STEPS, description="learning steps")
    learning_rate: float = Field(
        5e-4, gt=0, description="AdamW's learning rate for the tokens, constant; it is multiplied by batch_size"
    )
    start: Start = Field("noun", description=START)


class DreamBoothSettings(PictureSettings, WeightsSettings):
    """Settings of ``DreamBoothLearner``; the defaults are the paper's, or are said to be ours."""

    steps: int = Field(1000, ge=1, le=MAX_STEPS, description="learning steps")
    weights_learning_rate: float | None = Field(
        None, gt=0, description="AdamW's learning rate of the weights; none: 1e-4 for lora, 5e-6 for all (published)"
    )
    identifiers: tuple[str, ...] = Field(
        ("sks", "ohwx", "zwx", "xjy", "qlk", "vzt", "jqh", "wpd", "kfx", "ybn"),
        min_length=1,
        description="rare words, one for each concept in turn",
    )
    start: Literal["identifier", "hints"] = Field(
        "identifier",
        description="what [V] is. identifier: a rare word (published); hints: the mean of the rows of the words that "
        "the retriever described the region with, where there are some",
    )

    @field_validator("identifiers")
    @classmethod
    def _differ(cls, identifiers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(identifiers)) < len(identifiers) or not all(identifiers):
            raise ValueError("words that differ, none of them empty")
        return identifiers


class BreakASceneSettings(WeightsSettings):
    """Settings of ``BreakASceneLearner``; the defaults are the paper's, or are said to be ours."""

    steps: int = Field(
        800, ge=2, le=MAX_STEPS, description="learning steps of both phases together; the first half is phase one"
    )
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for the tokens, phase one")
    tuning_learning_rate: float = Field(2e-6, gt=0, description="AdamW's learning rate for the tokens, phase two")
    weights_learning_rate: float | None = Field(
        None, gt=0, description="AdamW's learning rate of the weights; none: 1e-4 for lora, 2e-6 for all (published)"
    )
    attention_weight: float = Field(1e-2, ge=0, description="weight of the cross-attention loss")
    batch_size: int = Field(1, ge=1, le=1000, description="subsets of the concepts in one step")
    start: Start = Field("noun", description=START)
    templates: Templates = Field(("a photo of {}",), description="prompts, {} where the tokens go, joined by 'and'")


class ConceptExpressSettings(LessonSettings):
    """Settings of ``ConceptExpressLearner``; the defaults are the published ones, or are said to be ours."""

    steps: int = Field(
        500,
        ge=2,
        le=MAX_STEPS,
        description="learning steps; with updates=each one has an optimiser step for every token in turn",
    )
    split_share: float = Field(0.2, gt=0, lt=1, description="share of the steps before the split tokens are merged")
    split_tokens: int = Field(5, ge=1, le=100, description="tokens that each concept is split into at first")
    updates: Literal["each", "together"] = Field(
        "each",
        description="each: every split token has an optimiser step of its own, and after the merge every concept and "
        "the joint prompt (published: 3100 for 3 concepts); together: one optimiser step for all concepts, each with "
        "one of its tokens, as the other learners do",
    )
    joint: bool = Field(True, description="after the merge, learn from a prompt of all concepts too (published)")
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for the tokens, constant")
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    attention_target: Literal["self_attention", "mask"] = Field(
        "self_attention",
        description="what a token's attention is drawn to: the mean self-attention of its mask's places (published), "
        "or the mask itself, as in ICE",
    )
    contrastive_weight: float = Field(1e-3, ge=0, description="weight of the supervised contrastive loss")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss")
    templates: Templates = Field(("a photo of {}",), description="prompts, {} where the tokens go, joined by 'and'")
    start: Literal["random", "noun", "hints"] = Field(
        "random",
        description="random: every token starts as the row of a random word (published); noun: as that of the region's "
        "word; hints: as the mean of that and of the words that the retriever described the region with",
    )
    initial_noise: float = Field(
        0.5,
        ge=0,
        description="how far split tokens start apart, in standard deviations of their row; with noun and hints only "
        "(our choice)",
    )


class HyperExpressSettings(LessonSettings):
    """Settings of ``HyperExpressLearner``; the defaults are ICE's, or are said to be ours."""

    steps: int = Field(
        800, ge=2, le=MAX_STEPS, description="learning steps of all phases together; the first half is phase one"
    )
    compose_share: float = Field(
        0.25,
        ge=0,
        le=0.5,
        description="share of the steps, the last ones, that learn composability too (our choice)",
    )
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for the tokens, constant")
    map_learning_rate: float = Field(
        1e-4,
        ge=0,
        description="AdamW's learning rate for W, the map from text embeddings to the ball's tangent space; 0: W stays "
        "what it starts as (our choice)",
    )
    map_scale: float = Field(
        0.15,
        gt=0,
        description="W starts as this times the identity: half of a text's distance from the centre; if that is much "
        "more than the aperture, cones are too narrow to hold anything (our choice)",
    )
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    contrast: Literal["triplet", "infonce"] = Field(
        "triplet",
        description="how tokens are told apart: the paper's triplets, or the cross-entropy over minus the distances",
    )
    contrast_weight: float = Field(5e-2, ge=0, description="weight of that loss (ours: ICE's in phase two)")
    margin: float = Field(0.2, ge=0, description="margin of the triplets, a hyperbolic distance (our choice)")
    temperature: float = Field(0.2, gt=0, description="temperature of the cross-entropy (our choice)")
    entailment_weight: float = Field(2e-2, ge=0, description="weight of the entailment loss (our choice)")
    aperture: float = Field(0.1, gt=0, description="K, how wide entailment cones are; Ganea et al. and MERU: 0.1")
    anchors_entail: bool = Field(
        False, description="an attribute's anchor (colour) entails its token too, not only the object (ours)"
    )
    composition_weight: float = Field(5e-2, ge=0, description="weight of the composition loss (our choice)")
    composition_learning_rate: float = Field(
        1e-2, gt=0, description="AdamW's learning rate of the weights that parts have in a whole (our choice)"
    )
    directions: int = Field(
        8,
        ge=1,
        le=1000,
        description="geodesic directions of the projection, or one fewer than anchors, if less (our choice)",
    )
    noise_offset: float = Field(0.1, ge=0, le=10, description="standard deviation of the noise added to whole channels")


class LocalisationSettings(LookingSettings):
    """Settings of the ``conceptexpress`` segmentor; the defaults are the published ones, or are said to be ours."""

    caption: str = Field("", description="prompt under which the attention is looked at; by default no word at all")
    salient_by: Literal["end_token", "last_word"] = Field(
        "end_token",
        description="whose attention maps tell objects from background: the end-of-text token's, as published, "
        "or the caption's last word's, for a model that hides the end token from its noise predictor",
    )
    salience: float = Field(
        1.0,
        gt=0,
        description="a cluster is background if its attention is below this many times the mean (our choice)",
    )
    shares: Shares = Field((0.0,), description="how noisy, 0 to 1 of the noise schedule (published: 0)")
    noise: bool = Field(False, description="add that much noise to the image; published: a clean latent")
    noise_seed: int = Field(0, ge=0, lt=2**63, description="seed of the noise")
    grids: Grids = Field(
        GRIDS,
        description="attention grids that are read, brought to the finest: cells along the image's shorter side; "
        "the model's nearest are taken",
    )
    adjacent: bool = Field(True, description="link only clusters that touch in the grid (published)")
    clusters: int = Field(
        10,
        ge=1,
        description="background is removed in the coarsest partition with this many clusters or more (our choice)",
    )
    merge_below: float | None = Field(
        None,
        gt=0,
        description="what is left is merged further where its symmetric KL divergence is below this, nats; none: "
        "the limit adapts, no two clusters are linked that are further apart than places were in the first round "
        "(published)",
    )
    apart: bool = Field(False, description="each connected part is a region of its own: for scenes of separate things")
    min_area: float = Field(0.01, ge=0, lt=1, description="regions below this share of the image go")
    refinement: bool = Field(False, description="let the masks' edges follow the image's (not published)")

    @model_validator(mode="after")
    def _has_last_word(self) -> LocalisationSettings:
        if self.salient_by == "last_word" and not self.caption.split():
            raise ValueError("with salient_by=last_word, caption must have a word")
        return self
