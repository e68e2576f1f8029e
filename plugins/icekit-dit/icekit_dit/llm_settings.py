"""Settings of the backbones that read prompts with a language model. Quick to import."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from icekit.backbones.settings import MODEL, checkpointing
from icekit.paths import PLACE
from icekit_dit.settings import TransformerSettings


class SanaSettings(TransformerSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)

    model: Annotated[str, PLACE] = Field(
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers", description=f"a Sana model: {MODEL}"
    )
    steps: int = Field(20, ge=1, le=1000, description="denoising steps of a generated image")
    guidance_scale: float = Field(4.5, ge=0, le=100, description="classifier-free guidance; 1 or less turns it off")
    instruction: bool = Field(
        True,
        description="read every prompt after the pipeline's own instruction to enhance it (complex_human_instruction), "
        "about 250 pieces long; false: the prompt alone, which is quicker, and is "
        "complex_human_instruction=None of the pipeline",
    )


class Flux2KleinSettings(TransformerSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)

    gradient_checkpointing: bool = checkpointing(True)

    model: Annotated[str, PLACE] = Field(
        "black-forest-labs/FLUX.2-klein-4B", description=f"a FLUX.2-klein model, distilled or base: {MODEL}"
    )
    steps: int | None = Field(  # type: ignore[assignment]  # none: the model says which it is
        None,
        ge=1,
        le=1000,
        description="denoising steps of a generated image; none: 50 with a base model, 4 with a distilled one",
    )
    guidance_scale: float = Field(
        4.0,
        ge=0,
        le=100,
        description="classifier-free guidance of a base model; 1 or less turns it off. Distilled ones have none",
    )


class ZImageSettings(TransformerSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)

    gradient_checkpointing: bool = checkpointing(True)

    model: Annotated[str, PLACE] = Field("Tongyi-MAI/Z-Image-Turbo", description=f"a Z-Image model: {MODEL}")
    steps: int = Field(9, ge=1, le=1000, description="denoising steps of a generated image")
    guidance_scale: float = Field(
        0.0,
        ge=0,
        le=100,
        description="classifier-free guidance as this family's pipeline counts it, one less than others: 0 turns it "
        "off (Turbo), 4 is usual without distillation",
    )
