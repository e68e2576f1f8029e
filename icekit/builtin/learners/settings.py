"""Settings of the learners. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from icekit.learning.settings import MAX_STEPS, IntrinsicForm, LessonSettings, PriorSettings, Shares
from icekit.protocols import ComponentSettings, Trained
from icekit.words import one_place


class IceSettings(LessonSettings, PriorSettings):
    """Settings of ``IceLearner``; numbers are the paper's by default. "Published" below is what its code does."""

    steps: int = Field(
        800,
        ge=2,
        le=MAX_STEPS,
        description="learning steps of both phases together; half of them are phase one (category and instance), half "
        "phase two (attributes)",
    )
    word_steps: int = Field(
        0,
        ge=0,
        le=MAX_STEPS,
        description="steps before phase one in which the words of each attribute are weighed by the denoising loss "
        "under them; attribute tokens and the instance then start from the words with the most weight "
        "(paper: 0)",
    )
    word_draws: int = Field(
        2,
        ge=1,
        le=1000,
        description="with word_steps: how many draws of noise and crop all words are compared on in each of these "
        "steps",
    )
    word_rate: float = Field(
        0.25,
        gt=0,
        description="with word_steps: how fast the weights move. A word whose loss is one standard deviation below "
        "the mean gains this much in its log weight in a step",
    )
    word_trust: float = Field(
        1.0,
        gt=0,
        description="with word_steps: weights start from the retriever's probabilities (naming = described) raised to "
        "this power; larger trusts the retriever more",
    )
    word_sharpness: float = Field(
        3.0,
        ge=1,
        description="with word_steps: at the end log weights are multiplied by this, so that one word wins: the mean "
        "of two words' rows draws neither",
    )
    word_timestep_range: Shares = Field(
        (0.1, 0.85),
        description="with word_steps: part of the noise schedule that these steps are drawn from, uniformly, [from, "
        "to] as shares of it",
    )
    instance_start: Literal["mean", "sum"] = Field(
        "mean",
        description="where the instance token starts when its attributes' words are known: the mean of the "
        "attributes' rows, or their sum, in which each word counts as much as in a phrase",
    )
    close_ups: int = Field(
        0,
        ge=0,
        le=1000,
        description="number of crops around each concept, with other concepts erased, that its tokens learn from in "
        "place of the whole picture; 0: the whole picture (paper)",
    )
    close_up_zoom: tuple[float, float] = Field(
        (1.4, 2.0),
        description="side of a crop, as a multiple of the side of the concept's bounding box, drawn between these two "
        "numbers",
    )
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate of the tokens, constant")
    category_learning_rate: float | None = Field(
        None,
        ge=0,
        description="AdamW's learning rate of the category tokens: if it is small they stay near their words, and "
        "what is particular is left to the instance; 0: they stay their words; none: learning_rate "
        "(paper)",
    )
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    object_triplet_weight: float = Field(1.0, ge=0, description="weight of the object triplet (phase one)")
    intrinsic_triplet_weight: float = Field(5e-2, ge=0, description="weight of the intrinsic triplet (phase two)")
    object_margin: float = Field(0.05, ge=0, description="margin of the object triplet")
    intrinsic_margin: float = Field(0.7, ge=0, description="factor of the margins of the intrinsic triplet")
    noise_offset: float = Field(
        0.1, ge=0, le=10, description="standard deviation of the noise that is added to whole channels of the latents"
    )
    concepts_per_step: Literal["all", "one"] = Field(
        "all",
        description="which concepts a step learns: all of them, or one that is drawn, so that all share the steps "
        "(published: one)",
    )
    optimizer: Literal["each", "one"] = Field(
        "each",
        description="each: every concept has its own gradient clipping and moments, and AdamW starts anew with phase "
        "two; one: all tokens are rows of one parameter, clipped together and moved by their momentum in "
        "every step, and phase two goes on with phase one's AdamW (published)",
    )
    intrinsic_form: IntrinsicForm = Field(
        "pairs",
        description="pairs: the intrinsic triplet is the mean over all pairs of a concept's tokens; tokens: the sum "
        "over tokens of the mean over the tokens that each is compared with, the category not among those "
        "of an attribute (published)",
    )
    attribute_anchor: str = Field(
        "{}",
        description="text of an attribute's anchor; {} is the anchor that the attribute names (paper: 'a {} concept')",
    )
    pooling: Literal["end", "highest"] = Field(
        "end",
        description="position at which the triplets read a text's embedding: end, the end token; highest, the highest "
        "token id, which is a new token itself and the end token of a plain text (published)",
    )
    word_row: Literal["mean", "first"] = Field(
        "mean",
        description="row that a token starts from if its word has several pieces: the mean of their rows, or the "
        "first (published)",
    )
    latents: Literal["mean", "sample"] = Field(
        "mean",
        description="latents that are denoised: the mean of the autoencoder's posterior, or a sample of it, anew in "
        "every step (published)",
    )
    mask_cells: Literal["coverage", "nearest"] = Field(
        "coverage",
        description="how a mask is brought to the latent and attention grids: coverage, by the covered share of each "
        "cell, or nearest neighbour (published)",
    )
    attribute_rows: Literal["free", "words"] = Field(
        "free",
        description="free: an attribute token can become any row, and starts from the instance's (paper); words: it "
        "is a weighted mean of the rows of the attribute's words, and the weights are learned",
    )
    row_norm: Literal["free", "keep"] = Field(
        "free",
        description="free: a learned row can become longer or shorter (paper); keep: it stays as long as it is when a "
        "phase begins, and its direction alone is learned",
    )
    word_learning_rate: float = Field(
        0.2, gt=0, description="with attribute_rows = words: AdamW's learning rate of the log weights, constant"
    )
    refine_steps: int = Field(
        0,
        ge=0,
        le=MAX_STEPS,
        description="steps of a last phase that fine-tunes the noise predictor; 0: its weights stay as they are; "
        "published: 300",
    )
    refine_weights: Trained = Field(
        "lora",
        description="weights that the last phase trains: lora, an adapter on the noise predictor's attention, or all "
        "of them (published), which a run then keeps as a model of its own",
    )
    refine_learning_rate: float | None = Field(
        None, gt=0, description="AdamW's learning rate of these weights; none: 1e-4 for lora, 2e-6 for all (published)"
    )
    refine_rank: int = Field(4, ge=1, le=1024, description="rank of the LoRA adapter")
    refine_prompts: Literal["both", "attributes"] = Field(
        "both",
        description="prompts of the last phase: both, those of phase one and of phase two, each with probability one "
        "half; attributes, those of phase two alone (published)",
    )
    refine_rows: Literal["none", "attributes"] = Field(
        "none",
        description="tokens that the last phase trains at the same rate: none, or those of the attributes, with the "
        "intrinsic triplet (published)",
    )

    @field_validator("attribute_anchor")
    @classmethod
    def _one_place_for_the_anchor(cls, text: str) -> str:
        return one_place(text, "the attribute's anchor goes")

    @field_validator("close_up_zoom")
    @classmethod
    def _not_inside_the_concept(cls, zoom: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= zoom[0] <= zoom[1]:
            raise ValueError(f"{list(zoom)}: must be two numbers of 1 or more, the smaller first, such as [1.4, 2.0]")
        return zoom


class WordTokenSettings(ComponentSettings):
    """Settings of the ``words`` learner."""

    words: tuple[dict[str, str], ...] = Field(
        (),
        description='for each concept in turn, the words of its tokens: {category = "cup", instance = "red metal", '
        'colour = "red"}; a category or instance that is not given is the concept\'s own word, an '
        "attribute is its anchor",
    )


class DescribedTokenSettings(ComponentSettings):
    """Settings of the ``described`` learner."""

    rows: Literal["mean", "likeliest"] = Field(
        "mean",
        description="row of an attribute's token: mean, the mean of its words' rows weighted by the retriever's "
        "probabilities (what ICE starts from), or likeliest, the row of the likeliest word",
    )
    instance: Literal["mean", "sum"] = Field(
        "mean", description="row of the instance token: the mean of the attributes' rows, or their sum"
    )


class RandomTokenSettings(ComponentSettings):
    """Settings of the ``random`` learner: there are none."""
