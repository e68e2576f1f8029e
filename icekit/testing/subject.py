"""What the conformance checks are run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

    from icekit.protocols import Backbone


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    name: the check's. holds: what must hold. outcome: whether it does. found: what was found instead, or why it was
    skipped; empty when it passed.
    """

    name: str
    holds: str
    outcome: Literal["passed", "failed", "skipped"]
    found: str


@dataclass
class BackboneUnderTest:
    """A backbone, and what its checks have to know of it. A family that differs more overrides a method.

    backbone: on the CPU and in float32, of a small model.
    reference: the diffusers pipeline of the same model, loaded apart, with the scheduler that the backbone samples
        with; None leaves out what is compared with it.
    words: two words of the prompt below that the text encoders were made for; one piece each is best.
    prompt: plain words, among them both.
    steps: denoising steps of the pictures that are compared.
    guidance_scale: how strongly the prompt is followed in them.
    encoders: name of a text encoder -> the pipeline's names of its tokenizer and its model.
    call: further arguments of the pipeline's call.
    """

    backbone: Backbone
    reference: Any = None
    words: tuple[str, str] = ("cup", "table")
    prompt: str = "a photo of a cup on a table"
    steps: int = 3
    guidance_scale: float = 5.0
    encoders: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.encoders and len(self.backbone.rows) == 1:
            self.encoders = dict.fromkeys(self.backbone.rows, ("tokenizer", "text_encoder"))

    @property
    def denoiser(self) -> Any:
        """The reference's noise predictor."""
        return getattr(self.reference, "unet", None) or self.reference.transformer

    def share_of(self, timestep: float) -> float:
        """The share of the schedule at which the pipeline tells its noise predictor this time."""
        return timestep / self.reference.scheduler.config.num_train_timesteps

    def reference_picture(self, prompt: str, seed: int, **others: Any) -> Image.Image:
        """The picture that the pipeline makes by itself; others: arguments of its call that are to be different."""
        import torch

        self.reference.set_progress_bar_config(disable=True)
        height, width = self.backbone.image_size
        arguments = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(seed),
            **self.call,
            **others,
        }
        return self.reference(**arguments).images[0]
