"""Settings of what is about offsets of the modulation. Quick to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from icekit.learning.settings import MAX_STEPS, IntrinsicForm, LessonSettings
from icekit_dit.settings import FluxSettings, StableDiffusion3Settings


class ModulatedFluxSettings(FluxSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ()  # its models are the plain backbone's, where nobody asks for offsets


class ModulatedStableDiffusion3Settings(StableDiffusion3Settings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ()


class ModulationSettings(LessonSettings):
    """Settings of ``ModulationLearner``; the defaults are ICE's, or are said to be ours."""

    backbones: ClassVar[Mapping[str, str]] = {"flux": "flux-modulation", "sd3": "sd3-modulation"}
    """The backbones that it works on, in the place of those that are taken for a model otherwise."""

    steps: int = Field(
        800,
        ge=2,
        le=MAX_STEPS,
        description="learning steps of both phases together; half of them are phase one (category and instance), half "
        "phase two (attributes)",
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="AdamW's learning rate of the offsets, constant (our choice, not measured yet)"
    )
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    object_triplet_weight: float = Field(1.0, ge=0, description="weight of the object triplet (phase one)")
    intrinsic_triplet_weight: float = Field(5e-2, ge=0, description="weight of the intrinsic triplet (phase two)")
    object_margin: float = Field(0.05, ge=0, description="margin of the object triplet")
    intrinsic_margin: float = Field(0.7, ge=0, description="factor of the margins of the intrinsic triplet")
    intrinsic_form: IntrinsicForm = Field(
        "pairs", description="how the intrinsic triplet adds its terms up, see the setting of the same name of ice"
    )
