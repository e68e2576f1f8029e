"""Settings that learners share, and types for settings. Quick to import: without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from icekit.learning.templates import PHOTO_TEMPLATES, Templates
from icekit.protocols import CHANGES_NO_RESULT, ComponentSettings
from icekit.protocols.strict import needs_memory

MAX_STEPS = 1_000_000
"""Most learning steps of a phase: days of learning, and a log that can still be read."""

IntrinsicForm = Literal["pairs", "tokens"]
"""How the intrinsic triplet adds its terms up; see ``intrinsic_triplet``."""


def _rising_shares(shares: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= shares[0] < shares[1] <= 1:
        raise ValueError(f"{list(shares)}: must be two rising shares of the schedule, such as [0.4, 0.9]")
    return shares


Shares = Annotated[tuple[float, float], AfterValidator(_rising_shares)]
"""The type of a setting that is a part of the noise schedule, as shares of it."""


class TrainingSettings(ComponentSettings):
    """Settings that every learner that trains has."""

    weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay")
    gradient_clip: float = Field(
        1.0, gt=0, description="largest norm of the gradient; longer ones are scaled down to it"
    )
    flip_probability: float = Field(
        0.5, ge=0, le=1, description="probability that a step sees the picture mirrored left to right"
    )
    templates: Templates = Field(
        PHOTO_TEMPLATES, description="prompts that the model is trained with; {} is where the tokens go"
    )
    max_batch: int = Field(
        4,
        ge=1,
        description="largest number of pictures in one pass of the noise predictor; lower it to save memory, the "
        "result is the same",
        json_schema_extra=CHANGES_NO_RESULT | needs_memory(1),
    )
    checkpoint_every: int = Field(
        50,
        ge=1,
        description="steps between two saves of the learning state, from which a killed run goes on",
        json_schema_extra=CHANGES_NO_RESULT,
    )


class LessonSettings(TrainingSettings):
    """Settings of every learner that is made of a lesson."""

    timestep_range: Shares = Field(
        (0.0, 1.0),
        description="part of the noise schedule that steps are drawn from, [from, to] as shares of it (papers: all of "
        "it, [0, 1])",
    )
    by_area: bool = Field(
        False,
        description="divide the denoising loss of a concept by its mask's share of the picture, so that a small "
        "object counts as much as a large one (papers: no)",
    )
    attention_grid: int = Field(
        16,
        ge=1,
        description="attention grid of the attention loss: cells along the picture's shorter side; the model's "
        "nearest is taken",
    )


class PriorSettings(TrainingSettings):
    """Settings of learners that preserve the prior while they train weights."""

    prior_images: int = Field(
        64,
        ge=0,
        le=100_000,
        description="pictures that the model draws beforehand, and must still draw while its weights are trained "
        "(prior preservation); published: 1000",
    )
    prior_weight: float = Field(1.0, ge=0, description="weight of the prior-preservation loss")
    prior_prompt: str | None = Field(
        None,
        description="prompt of the prior images; none: the regions' words in turn, in the templates (DreamBooth: the "
        "class noun); ICE as published: 'a photo at the beach'",
    )
    prior_steps: int | None = Field(
        None, ge=1, le=1000, description="denoising steps of the prior images; none: the backbone's own number"
    )
    prior_guidance: float | None = Field(
        None, ge=0, le=100, description="guidance scale of the prior images; none: the backbone's own"
    )

    @field_validator("prior_prompt")
    @classmethod
    def _says_something(cls, prompt: str | None) -> str | None:
        if prompt is not None and not prompt.strip():
            raise ValueError("a prompt, or none for the regions' words")
        return prompt
