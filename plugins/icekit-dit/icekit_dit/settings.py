"""The settings of all components, without the modules that load models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from icekit.attention.settings import SoftMapSettings
from icekit.backbones.settings import MODEL, PipelineSettings, checkpointing
from icekit.paths import PLACE
from icekit.protocols.strict import needs_memory
from icekit.words import one_place

LAYOUTS = tuple(
    f"package:icekit_dit/layouts/{name}.json"
    for name in ("sd3.5-medium", "sd3.5-large", "sd3-medium", "flux-dev", "flux-schnell")
)
"""What models in one file look like."""
FILE = ", or a .safetensors file in the layout that it was published in"


def _one_place(template: str) -> str:
    return one_place(template, "the word goes")


class TransformerSettings(PipelineSettings):
    """Which model, and how it is run: what the backbones around a diffusion transformer share."""

    text_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="number format of the large text encoder (T5 or a language model; CLIP's are float32); auto: "
        "bfloat16 where the noise predictor is not float32, else float32",
        json_schema_extra=needs_memory("bfloat16"),
    )
    steps: int = Field(28, ge=1, le=1000, description="denoising steps of a generated image")
    guidance_scale: float = Field(7.0, ge=0, le=100, description="classifier-free guidance; 1 or less turns it off")


class FileSettings(TransformerSettings):
    """Which model, and how it is run: of families whose models people have in one file, too."""

    layouts: ClassVar[tuple[str, ...]] = LAYOUTS

    encoders: Annotated[str, PLACE] | None = Field(
        None,
        description="for a model in one file that has no text encoders or no autoencoder: a model of the same family "
        "that they are taken from, a folder in diffusers' format or an id of the Hugging Face hub",
    )


class StableDiffusion3Settings(FileSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)

    model: Annotated[str, PLACE] = Field(
        "stabilityai/stable-diffusion-3.5-medium", description=f"a Stable Diffusion 3.x model: {MODEL}{FILE}"
    )
    t5: bool = Field(
        True,
        description="false: without T5, the largest of the three text encoders (4.8 billion weights); a token then has "
        "no row for it, as with a model that comes without",
        json_schema_extra=needs_memory(False),
    )


class FluxSettings(FileSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)

    gradient_checkpointing: bool = checkpointing(True)

    model: Annotated[str, PLACE] = Field(
        "black-forest-labs/FLUX.1-dev", description=f"a FLUX.1 model, dev or schnell: {MODEL}{FILE}"
    )
    steps: int | None = Field(  # type: ignore[assignment]  # none: the model says which it is
        None, ge=1, le=1000, description="denoising steps of a generated image; none: 28 with dev, 4 with schnell"
    )
    guidance_scale: float = Field(
        3.5,
        ge=0,
        le=100,
        description="the guidance that FLUX.1-dev is told of while it makes a picture; schnell is told of none",
    )
    learning_guidance: float = Field(
        1.0,
        ge=0,
        le=100,
        description="the guidance that FLUX.1-dev is told of while tokens are learned and attention is read",
    )


class ConceptAttentionSettings(SoftMapSettings):
    """Settings of the ``conceptattention`` segmentor."""

    draws: int = Field(
        1,
        ge=1,
        le=1000,
        description="how many times noise is drawn for each share; the maps are averaged. Only with noise = true",
    )
    prompt: Annotated[str, AfterValidator(_one_place)] = Field(
        "a photo of a {}", description="the prompt under which the picture is looked at, {} being the word"
    )
    rivals: tuple[str, ...] = Field(
        ("background", "floor", "wall", "sky", "grass"),
        description="what else may be in a picture: each place is divided among the word and these",
    )
    threshold: float | Literal["otsu"] = Field(
        "otsu",
        description="a pixel is in the mask where the map, from 0 to 1, is at least this; otsu: the threshold is "
        "chosen from the map's histogram",
    )

    @field_validator("threshold")
    @classmethod
    def _is_share(cls, threshold: float | str) -> float | str:
        if isinstance(threshold, float) and not 0 <= threshold <= 1:
            raise ValueError("0 to 1, or otsu")
        return threshold

    @field_validator("rivals")
    @classmethod
    def _are_words(cls, rivals: tuple[str, ...]) -> tuple[str, ...]:
        if not rivals or not all(one.strip() for one in rivals):
            raise ValueError("one or more words, none of them empty")
        return rivals
