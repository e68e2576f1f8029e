"""Any Sana model as a backbone: linear self-attention, cross-attention to a language model's states, flow matching.

Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers" (ICLR 2025).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icekit.backbones.estimate import Measured
from icekit.backbones.loading import Family
from icekit.backbones.pipeline import DAMAGED
from icekit.backbones.text_encoder import TextEncoder
from icekit.model_files import check_finite
from icekit.protocols import Conditioning, InputError
from icekit_dit.language import LanguageBackbone
from icekit_dit.llm_encoder import LanguageModel, same_length
from icekit_dit.llm_settings import SanaSettings
from icekit_dit.transformer import Seen
from icekit_dit.watching import Watch, heads_of, watching

if TYPE_CHECKING:
    from diffusers import SanaPipeline

SANA = Family(
    "Sana",
    "SanaPipeline",
    {
        "scheduler": ("diffusers", ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")),
        "tokenizer": ("transformers", ("GemmaTokenizerFast", "GemmaTokenizer")),
        "text_encoder": ("transformers", ("Gemma2Model",)),
        "transformer": ("diffusers", ("SanaTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderDC",)),
    },
    {},
)
ENCODER = "gemma2_2b"
LENGTH = 300
"""Positions of a prompt that the transformer is shown, the pipeline's own."""
MULTIPLE = 32
"""The pipeline makes pictures whose sides are multiples of this alone."""


class Sana(LanguageBackbone):
    """Any Sana model, from the hub or a folder in diffusers' format.

    A token has one row, ``gemma2_2b``. As in the pipeline, plain words are read in lower case and after an instruction
    (``Settings.instruction``), of which the transformer is shown nothing, and the empty prompt of classifier-free
    guidance without it. Self-attention is linear: it has no weights, and so there is no map of places over places.
    """

    Settings = SanaSettings
    encoder = ENCODER
    family = SANA
    # A step by its shapes; the one that was measured had prompts of single letters.
    measured = Measured(3.58, 0.89, 0.12, 2.84, "benchmarks/memory.json, H100, and memory-by-shape.json")
    lacks = ("similarity", "posterior")
    schedulers = SANA.parts["scheduler"][1]
    _settings: SanaSettings

    def _text_encoders(self, pipeline: SanaPipeline) -> dict[str, TextEncoder]:
        tokenizer, model = pipeline.tokenizer, pipeline.text_encoder
        instruction = "\n".join(_instruction(type(pipeline))) if self._settings.instruction else ""
        # The pipeline shows the transformer the first position and the last 299, and leaves room for as many.
        read = len(tokenizer.encode(instruction)) - 2 if instruction else 0
        text = LanguageModel(tokenizer, model, LENGTH + read, before=instruction, hidden=read, lower=True)
        return {ENCODER: text}

    # --- Pictures and noise ---------------------------------------------------------------------------------------

    def _multiple(self) -> int:
        return math.lcm(super()._multiple(), MULTIPLE)

    def _trained_size(self) -> tuple[int, int]:
        side: int = self.transformer.config.sample_size * self._factor
        return side, side

    def _check_schedule(self, named: str) -> None:
        config = self._pipeline.scheduler.config
        if "use_flow_sigmas" in config and not (
            config.use_flow_sigmas and config.get("prediction_type") == "flow_prediction"
        ):
            raise InputError(
                f"{named}: its scheduler predicts {config.get('prediction_type')!r} with use_flow_sigmas = "
                f"{config.use_flow_sigmas}; Sana's predicts 'flow_prediction' with use_flow_sigmas = true"
            )
        super()._check_schedule(named)

    def _shift(self) -> float:
        config = self._pipeline.scheduler.config
        if "flow_shift" in config and not config.get("use_dynamic_shifting"):
            shift: float = config.flow_shift
            return shift
        return super()._shift()

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> float32 latents ``[B, C, h, w]``, scaled: this autoencoder draws nothing."""
        latents = self._autoencoder().encode(images.to(self.device, torch.float32) * 2 - 1, return_dict=False)[0]
        check_finite(latents, "autoencoder's encoder in float32", DAMAGED)
        return latents * self._vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` -> float32 ``[B, 3, H, W]`` in [0, 1]."""
        latents = latents.to(self.device, torch.float32) / self._vae.config.scaling_factor
        images = self._autoencoder().decode(latents, return_dict=False)[0]
        check_finite(images, "autoencoder's decoder in float32", DAMAGED)
        return (images / 2 + 0.5).clamp(0, 1)

    # --- The transformer ------------------------------------------------------------------------------------------

    def _transform(self, noisy: Tensor, sigmas: Tensor, prompts: Conditioning) -> Tensor:
        config = self.transformer.config
        output: Tensor = self.transformer(
            noisy,
            encoder_hidden_states=prompts.parts["sequence"].to(self.transformer.dtype),
            encoder_attention_mask=prompts.parts["mask"].long(),
            timestep=sigmas * self._pipeline.scheduler.config.num_train_timesteps * config.timestep_scale,
            return_dict=False,
        )[0]
        return output

    @contextmanager
    def _seeing(self, words: bool, pixels: bool, length: int) -> Iterator[Callable[[], Seen]]:
        """What a place gives the prompt's positions sums to one."""
        attentions = [block.attn2 for block in self.transformer.transformer_blocks]
        with watching(attentions, CrossProcessor) as watch:
            yield lambda: (watch.mean(), None)

    def _sampling_pipeline(self) -> Any:
        from diffusers import SanaPipeline

        return SanaPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=self.transformer, scheduler=self._sampler()
        )

    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        """The empty prompt is read without the instruction, as the pipeline does it."""
        count = len(prompts.parts["mask"])
        nothing, mask = self._text.encode_nothing()
        self._parts.use("transformer")
        sequence = same_length([prompts.parts["sequence"], nothing.float().expand(count, -1, -1)])
        masks = same_length([prompts.parts["mask"], mask.expand(count, -1)]).long()
        sequence = sequence.to(self.transformer.dtype)
        return {
            "prompt_embeds": sequence[:count],
            "prompt_attention_mask": masks[:count],
            "negative_prompt": None,
            "negative_prompt_embeds": sequence[count:],
            "negative_prompt_attention_mask": masks[count:],
            "use_resolution_binning": False,
        }


class CrossProcessor:
    """The processor that a cross-attention layer has, with its weights computed beside it."""

    def __init__(self, watch: Watch, own: Any) -> None:
        self._watch, self._own = watch, own

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from places ``[B, N, C]`` to positions ``[B, L, C]``; attention_mask: a bias ``[B, 1, L]``."""
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = heads_of(key if attn.norm_k is None else attn.norm_k(key), attn.heads)
        bias = None if attention_mask is None else attention_mask.unsqueeze(1)
        self._watch.tell(heads_of(query, attn.heads), key, 1 / math.sqrt(key.shape[-1]), bias)
        output: Tensor = self._own(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask
        )
        return output


def _instruction(pipeline: type) -> Sequence[str]:
    """The instruction that the pipeline puts before prompts by default, in lines."""
    lines: Sequence[str] = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    return lines
