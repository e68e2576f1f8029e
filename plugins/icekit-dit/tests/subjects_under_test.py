"""The families as icekit's conformance checks take them: a backbone beside the pipeline that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from icekit_dit.flux import Flux, pack, unpack
from icekit_dit.sd3 import StableDiffusion3
from torch import Tensor

from icekit.backbones.common import quiet
from icekit.testing import BackboneUnderTest


def pooled_at_the_end(*pairs: tuple[Any, Any]) -> None:
    """Tell CLIP models, each with its tokenizer, where a prompt ends: else at the highest id, an extra token's."""
    for tokenizer, model in pairs:
        getattr(model, "text_model", model).eos_token_id = tokenizer.eos_token_id


class FlowUnderTest(BackboneUnderTest):
    """Its time is how much is noise, in thousandths, and its schedule is shifted."""

    def share_of(self, timestep: float) -> float:
        return self.backbone.share_of(timestep / 1000)  # type: ignore[attr-defined]


class FluxUnderTest(FlowUnderTest):
    """Its latents are packed, and its time is how much is noise."""

    def share_of(self, timestep: float) -> float:
        return super().share_of(timestep * 1000)

    def latents_of(self, latents: Any) -> Tensor:
        return unpack(torch.as_tensor(latents), self.backbone.word_grids[0])

    def returned(self, prediction: Tensor) -> Any:
        return (pack(prediction),)


def sd3(folder: Path, **settings: Any) -> BackboneUnderTest:
    """Stable Diffusion 3.x; diffusers must be told which parts a folder has not got."""
    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    without = {part: None for part in ("tokenizer_3", "text_encoder_3") if parts[part] == [None, None]}
    with quiet():
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pooled_at_the_end((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    backbone = StableDiffusion3(StableDiffusion3.Settings(model=str(folder), steps=2, **settings), "cpu")
    return FlowUnderTest(backbone, pipeline, encoders=backbone.pipeline_encoders)


def flux(folder: Path, **settings: Any) -> BackboneUnderTest:
    """FLUX.1."""
    with quiet():
        pipeline = FluxPipeline.from_pretrained(folder)
    pooled_at_the_end((pipeline.tokenizer, pipeline.text_encoder))
    backbone = Flux(Flux.Settings(model=str(folder), steps=2, **settings), "cpu")
    return FluxUnderTest(backbone, pipeline, encoders=backbone.pipeline_encoders)
