"""Settings of the metrics. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from icekit.clip_names import ClipName, ClipWeights
from icekit.paths import PLACE
from icekit.protocols import ComponentSettings

if TYPE_CHECKING:
    import torch

    from icekit.builtin.metrics.image_encoders import ImageEncoder

PromptedBy = Literal["instance", "attributes"]
_PROMPT = (
    "tokens that a concept's images are made with: instance and category, or category and all attributes, as ICE's "
    "published figures were (where there are no attribute tokens: instance and category)"
)
_BACKGROUND = "what is around a concept when the source image is masked to it: black, or the mean colour"


class ClipSettings(ComponentSettings):
    """What the pictures are compared with."""

    clip: ClipName = Field(
        "ViT-B-32",
        description="CLIP model that pictures are compared by: open_clip name, hf-hub:OWNER/NAME, or a folder "
        "(local-dir:PATH)",
    )
    pretrained: ClipWeights = Field("openai", description="open_clip's name of the weights; not for folders")
    background: Literal["black", "mean"] = Field("black", description=_BACKGROUND)
    prompt: PromptedBy = Field("instance", description=_PROMPT)

    def encoder(self, device: torch.device) -> ImageEncoder:
        """The encoder, loaded."""
        from icekit.builtin.metrics.image_encoders import clip_encoder

        return clip_encoder(self.clip, self.pretrained, device)


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
