"""Settings of the learners. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from icekit.learning.settings import MAX_STEPS, IntrinsicForm, LessonSettings, PriorSettings, Shares
from icekit.protocols import ComponentSettings, Trained


class IceSettings(LessonSettings, PriorSettings):
    """Settings of ``IceLearner``; numbers are the paper's by default. "Published" below is what its code does."""

    steps: int = Field(
        800, ge=2, le=MAX_STEPS, description="learning steps of both phases together; the first half is phase one"
    )
    word_steps: int = Field(
        0,
        ge=0,
        le=MAX_STEPS,
        description="steps before these, in which each attribute's words are weighed by the denoising loss under them; "
        "attribute tokens and the instance then start from the words that win (paper: none)",
    )
    word_draws: int = Field(
        2, ge=1, le=1000, description="noises and pictures that all words are tried on in such a step"
    )
    word_rate: float = Field(
        0.25,
        gt=0,
        description="how fast words win: what a loss of one standard deviation adds to their logarithms",
    )
    word_trust: float = Field(
        1.0,
        gt=0,
        description="how much what the retriever saw (naming = described) counts where words are weighed: its "
        "probabilities are taken to this power",
    )
    word_sharpness: float = Field(
        3.0,
        ge=1,
        description="when words were weighed, their logarithms are multiplied by this: the mean of two words' rows "
        "paints neither",
    )
    word_timestep_range: Shares = Field(
        (0.1, 0.85), description="share of the noise schedule that these steps are drawn from, uniformly"
    )
    instance_start: Literal["mean", "sum"] = Field(
        "mean",
        description="where an instance starts whose attributes' words are known, weighed or seen by the retriever: the "
        "mean of the attributes' rows, or their sum, in which each word is as strong as in a phrase",
    )
    close_ups: int = Field(
        0,
        ge=0,
        le=1000,
        description="how many crops around each concept, other concepts taken out, its tokens learn from in place of "
        "the whole image: a token cannot become a place then; 0: the whole image (paper)",
    )
    close_up_zoom: tuple[float, float] = Field(
        (1.4, 2.0), description="a crop's side, in sides of the concept's bounding box: drawn between these two"
    )
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for the tokens, constant")
    category_learning_rate: float | None = Field(
        None,
        ge=0,
        description="the category tokens' own; small, and they stay near their words, so that what is particular is "
        "left to the instance; 0: they are their words; none: as the others (paper)",
    )
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    object_triplet_weight: float = Field(1.0, ge=0, description="weight of the object triplet (phase one)")
    intrinsic_triplet_weight: float = Field(5e-2, ge=0, description="weight of the intrinsic triplet (phase two)")
    object_margin: float = Field(0.05, ge=0, description="margin of the object triplet")
    intrinsic_margin: float = Field(0.7, ge=0, description="factor in the margins of the intrinsic triplet")
    noise_offset: float = Field(0.1, ge=0, le=10, description="standard deviation of the noise added to whole channels")
    concepts_per_step: Literal["all", "one"] = Field(
        "all",
        description="whose losses a step is of: all concepts', or one's that is drawn, so that all concepts share the "
        "steps (published: one)",
    )
    optimizer: Literal["each", "one"] = Field(
        "each",
        description="each: a concept learns as if it were alone, its gradient clipped by itself, and AdamW starts anew "
        "with phase two; one: all tokens are rows of one parameter, clipped together, moved on by their momentum in "
        "steps that are not theirs, and phase two goes on with phase one's AdamW (published)",
    )
    intrinsic_form: IntrinsicForm = Field(
        "pairs",
        description="pairs: the intrinsic triplet is a mean over all pairs of a concept's tokens; tokens: a sum over "
        "tokens of means over their rivals, the category no rival of an attribute (published)",
    )
    attribute_anchor: str = Field(
        "{}", description="anchor text of an attribute, {} is the attribute's own; paper: 'a {} concept'"
    )
    pooling: Literal["end", "highest"] = Field(
        "end",
        description="where the triplets read a text's embedding: at its end, or at its highest token id, which is a "
        "new token itself and the end of a plain text (published: highest)",
    )
    word_row: Literal["mean", "first"] = Field(
        "mean",
        description="where a token that starts from a word in several pieces starts: their mean, or the first "
        "(published)",
    )
    latents: Literal["mean", "sample"] = Field(
        "mean",
        description="what is denoised: the mean of what the autoencoder makes of the image, or a sample of it, anew in "
        "every step (published)",
    )
    mask_cells: Literal["coverage", "nearest"] = Field(
        "coverage",
        description="a mask on the latent and attention grids: by how much of a cell it covers, or by nearest "
        "neighbour (published)",
    )
    attribute_rows: Literal["free", "words"] = Field(
        "free",
        description="free: an attribute token can become any row, and starts from the instance's (paper); words: it is "
        "a weighted mean of the rows of its attribute's vocabulary, and the weights are learned",
    )
    word_learning_rate: float = Field(
        0.2, gt=0, description="AdamW's learning rate of those weights (of their logarithms), constant"
    )
    refine_steps: int = Field(
        0, ge=0, le=MAX_STEPS, description="steps of fine-tuning the noise predictor after the tokens; published: 300"
    )
    refine_weights: Trained = Field(
        "lora",
        description="what is fine-tuned: a LoRA adapter on the noise predictor's attention, or all of its weights "
        "(published), which a run then keeps as a model of its own",
    )
    refine_learning_rate: float | None = Field(
        None, gt=0, description="AdamW's learning rate of the weights; none: 1e-4 for lora, 2e-6 for all (published)"
    )
    refine_rank: int = Field(4, ge=1, le=1024, description="rank of the LoRA adapter")
    refine_prompts: Literal["both", "attributes"] = Field(
        "both",
        description="what the weights learn to draw: the prompts of phase one and those of phase two, each as likely, "
        "or phase two's alone, the category with its attributes (published)",
    )
    refine_rows: Literal["none", "attributes"] = Field(
        "none",
        description="what is trained beside the weights, at the same rate: no token, or the attributes', still under "
        "the intrinsic triplet (published)",
    )

    @field_validator("attribute_anchor")
    @classmethod
    def _one_place_for_the_anchor(cls, text: str) -> str:
        if text.count("{}") != 1:
            raise ValueError(f"{text!r}: must have {{}} exactly once, where the attribute's anchor goes")
        return text

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
        description="for each concept in turn, the words of its tokens: "
        '{category = "cup", instance = "red metal", colour = "red"}; the category and the instance that are not '
        "given are the concept's own word, an attribute is its anchor",
    )


class DescribedTokenSettings(ComponentSettings):
    """Settings of the ``described`` learner."""

    rows: Literal["mean", "likeliest"] = Field(
        "mean",
        description="an attribute's row: the mean of the rows of its words, each as much as it is likely, which is "
        "what ICE starts from; or the row of the likeliest word alone",
    )
    instance: Literal["mean", "sum"] = Field(
        "mean", description="the instance's row: the mean of the attributes' rows, or their sum"
    )


class RandomTokenSettings(ComponentSettings):
    """Settings of the ``random`` learner: there are none."""
