"""Any Stable Diffusion XL model as a backbone: two text encoders, a pooled text and the picture's size beside them.

SDXL: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from icekit.backbones.common import rows_for
from icekit.backbones.estimate import Measured
from icekit.backbones.loading import STABLE_DIFFUSION_XL
from icekit.backbones.settings import StableDiffusionXLSettings
from icekit.backbones.text_encoder import TextEncoder, pooling_of
from icekit.backbones.unet import UNetBackbone
from icekit.protocols import NO_TOKENS, Conditioning, InputError, Tokens

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


class StableDiffusionXL(UNetBackbone):
    """Any Stable Diffusion XL model, from the hub or a folder in diffusers' format.

    A token has two rows, ``clip_l`` and ``clip_g``. The pooled text is the second encoder's state at a prompt's end, as
    it is in A1111 and ComfyUI. diffusers' pipeline reads it at the highest token id, which is an extra token's wherever
    there is one, unless it is told otherwise: ``pipeline.text_encoder_2.text_model.eos_token_id =
    pipeline.tokenizer_2.eos_token_id``.
    """

    Settings = StableDiffusionXLSettings
    family = STABLE_DIFFUSION_XL
    # Drawing was not measured: it holds less than a checkpointed step. The autoencoder has the shape of 2.1's.
    measured = Measured(7.03, 0.72, 0.72, 4.44, "benchmarks/memory.json, H100")

    def _text_encoders(self, pipeline: StableDiffusionXLPipeline) -> dict[str, TextEncoder]:
        first = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
        second = TextEncoder(pipeline.tokenizer_2, pipeline.text_encoder_2)
        if first.length != second.length:
            raise InputError(f"its text encoders read prompts of {first.length} and of {second.length} tokens")
        self._empty_is_zero = bool(pipeline.config.force_zeros_for_empty_prompt)
        return {"clip_l": first, "clip_g": second}

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """Both encoders' second last states beside one another, ``[B, L, C]``, and the pooled text ``[B, P]``.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``.
        """
        states = []
        for name, text in self._texts.items():
            outputs = text.outputs(prompts, rows_for(name, tokens), output_hidden_states=True)
            states.append(outputs.hidden_states[-2])
        return Conditioning({"sequence": torch.cat(states, dim=-1), "pooled": self._pooled(outputs, prompts, tokens)})

    def _pooled(self, outputs: Any, prompts: Sequence[str], tokens: Tokens) -> Tensor:
        """The second encoder's projected state at each prompt's end, ``[B, P]``."""
        text = self._texts["clip_g"]
        ends = text.ends(text.token_ids(prompts, rows_for("clip_g", tokens)))
        return text.model.text_projection(outputs.last_hidden_state[torch.arange(len(prompts)), ends])

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """Both encoders' states at a text's end, each of length one, beside one another: ``[B, P]`` of length one.

        With ``pool`` "highest" they are read at the highest token id.

        Raises:
            InputError: a text too long or with an unknown ``<token>``; another ``pool``.
        """
        where = pooling_of(pool)
        both = [text.embed(texts, rows_for(name, tokens), where) for name, text in self._texts.items()]
        return normalize(torch.cat(both, dim=-1), dim=-1)

    def _conditions(self, prompts: Conditioning) -> dict[str, Any]:
        """The pooled text, and the sizes: of the picture before it was cut, where it was cut, and what is made."""
        pooled = prompts.parts["pooled"].to(self.unet.dtype)
        sizes = torch.tensor([*self.image_size, 0, 0, *self.image_size], device=pooled.device, dtype=pooled.dtype)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), 6)}}

    def _sampling_pipeline(self) -> StableDiffusionXLPipeline:
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=None,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=self.unet,
            scheduler=DPMSolverMultistepScheduler.from_config(self._sampler.config),
            add_watermarker=False,
        )

    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        """As the family's pipeline does it, the empty prompt is all zeros where the model was trained so."""
        inputs: dict[str, Any] = {}
        for name, part in (("prompt_embeds", "sequence"), ("pooled_prompt_embeds", "pooled")):
            states, nothing = (each.parts[part].to(self.unet.dtype) for each in (prompts, empty))
            inputs |= {name: states, f"negative_{name}": torch.zeros_like(nothing) if self._empty_is_zero else nothing}
        return inputs
