"""Settings of the metrics. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from icekit.clip_names import ClipName, ClipWeights
from icekit.paths import PLACE
from icekit.protocols import ComponentSettings

if TYPE_CHECKING:
    import torch

    from icekit.builtin.metrics.image_encoders import ImageEncoder
    from icekit.clip import ClipModel

PromptedBy = Literal["instance", "attributes"]
_PROMPT = (
    "tokens that a concept's images are made with: instance and category, or category and all attributes, as ICE's "
    "published figures were (where there are no attribute tokens: instance and category)"
)
_BACKGROUND = "what is around a concept when the source image is masked to it: black, or the mean colour"


class ClipModelSettings(ComponentSettings):
    """Which CLIP model looks at the pictures."""

    clip: ClipName = Field(
        "ViT-B-32",
        description="CLIP model that pictures are compared by: open_clip name, hf-hub:OWNER/NAME, or a folder "
        "(local-dir:PATH)",
    )
    pretrained: ClipWeights = Field("openai", description="open_clip's name of the weights; not for folders")

    def encoder(self, device: torch.device) -> ImageEncoder:
        """Its image encoder, loaded."""
        from icekit.builtin.metrics.image_encoders import clip_encoder

        return clip_encoder(self.clip, self.pretrained, device)


class ClipSettings(ClipModelSettings):
    """What the pictures are compared with."""

    background: Literal["black", "mean"] = Field("black", description=_BACKGROUND)
    prompt: PromptedBy = Field("instance", description=_PROMPT)


class AttributeClipSettings(ClipModelSettings):
    """What reads the pictures, and how words are put to it."""

    templates: tuple[str, ...] = Field(
        ("a photo of a {}",),
        min_length=1,
        description='prompts in which CLIP is asked for a word, {} is "red cup"; their embeddings are averaged',
    )

    @field_validator("templates")
    @classmethod
    def _has_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1 or {"{", "}"} & set(template.replace("{}", "")):
                raise ValueError(f"{template!r} has no single {{}} for the word")
        return templates

    def loaded(self, device: torch.device) -> ClipModel:
        """The whole model, for words, too."""
        from icekit.builtin.metrics.image_encoders import clip_model

        return clip_model(self.clip, self.pretrained, device)


class DinoSettings(ComponentSettings):
    """What the pictures are compared with."""

    dino: Annotated[str, PLACE] = Field(
        "facebook/dino-vits16",
        description="vision transformer that pictures are compared by: a hub id, or a folder for transformers",
    )
    background: Literal["black", "mean"] = Field("black", description=_BACKGROUND)
    prompt: PromptedBy = Field("instance", description=_PROMPT)

    def encoder(self, device: torch.device) -> ImageEncoder:
        """The encoder, loaded."""
        from icekit.builtin.metrics.image_encoders import dino_encoder

        return dino_encoder(self.dino, device)
