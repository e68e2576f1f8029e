"""Any Stable Diffusion 1.x or 2.x model as a backbone: a folder in diffusers' format or a model of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from icekit.backbones.common import rows_for
from icekit.backbones.estimate import Measured
from icekit.backbones.loading import STABLE_DIFFUSION
from icekit.backbones.text_encoder import TextEncoder, pooling_of
from icekit.backbones.unet import UNetBackbone
from icekit.protocols import NO_TOKENS, Conditioning, Tokens

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ENCODER_NAMES = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
"""What other tools call a CLIP text encoder, by the length of its rows; ``clip_l`` where that tells nothing."""


class StableDiffusion(UNetBackbone):
    """Any Stable Diffusion 1.x or 2.x model, from the hub or a folder in diffusers' format."""

    family = STABLE_DIFFUSION
    # Checkpointed: a step by its shapes, and what refinement was measured to take more.
    measured = Measured(3.62, 1.76, 0.39, 4.44, "benchmarks/memory.json, H100, and memory-by-shape.json")

    def _text_encoders(self, pipeline: StableDiffusionPipeline) -> dict[str, TextEncoder]:
        self._text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
        self._encoder = ENCODER_NAMES.get(self._text.dim, "clip_l")
        return {self._encoder: self._text}

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """See ``protocols.Backbone``. Raises InputError for a prompt too long or with an unknown ``<token>``."""
        return Conditioning({"sequence": self._text.encode(prompts, self._own_rows(tokens))})

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """The state at a text's end, ``[B, P]`` of length one, or with ``pool`` "highest" that at its highest token id.

        Raises:
            InputError: a text too long or with an unknown ``<token>``; another ``pool``.
        """
        return self._text.embed(texts, self._own_rows(tokens), pooling_of(pool))

    def _own_rows(self, tokens: Tokens) -> dict[str, Tensor]:
        """The tokens' rows for the one text encoder there is."""
        return rows_for(self._encoder, tokens)

    def _sampling_pipeline(self) -> StableDiffusionPipeline:
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=self.unet,
            scheduler=DPMSolverMultistepScheduler.from_config(self._sampler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        dtype = self.unet.dtype
        return {
            "prompt_embeds": prompts.parts["sequence"].to(dtype),
            "negative_prompt_embeds": empty.parts["sequence"].to(dtype),
        }
