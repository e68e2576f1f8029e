"""Any FLUX.2-klein model as a backbone: packed latents, three layers' states of a language model as the sequence.

Black Forest Labs, "FLUX.2 [klein]" (2026).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from icekit.backbones.common import quiet
from icekit.backbones.estimate import Measured
from icekit.backbones.loading import Family
from icekit.backbones.lora import ATTENTION_PROJECTIONS
from icekit.backbones.pipeline import DAMAGED
from icekit.backbones.text_encoder import TextEncoder
from icekit.model_files import check_finite
from icekit.protocols import Conditioning
from icekit_dit.attention import Capture, RotaryProcessor, processors_of
from icekit_dit.concepts import ConceptTransformerBackbone
from icekit_dit.flux import PACKED, FluxProcessor, image_ids, pack, unpack
from icekit_dit.language import LanguageBackbone
from icekit_dit.llm_encoder import PaddedLanguageModel, chat_around
from icekit_dit.llm_settings import Flux2KleinSettings
from icekit_dit.settings import TransformerSettings
from icekit_dit.transformer import KLTransformerBackbone, Seen

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline

FLUX2_KLEIN = Family(
    "FLUX.2-klein",
    "Flux2KleinPipeline",
    {
        "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        "tokenizer": ("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        "text_encoder": ("transformers", ("Qwen3ForCausalLM",)),
        "transformer": ("diffusers", ("Flux2Transformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKLFlux2",)),
    },
    {"is_distilled": False},
    told=("is_distilled",),
)
ENCODERS = ("qwen3_4b", "qwen3_8b")
"""What a token's row is called: the language model of klein 4B, and that of 9B."""
WIDTH_OF_8B = 4096
"""Numbers of a row of the larger one; the smaller one's have 2560."""
LENGTH = 512
"""Positions of a prompt with the marks of a chat around it, and with padding: the pipeline's own."""
LAYERS = (9, 18, 27)
"""After which layers of the language model its states are taken: the pipeline's own."""
STEPS, STEPS_OF_DISTILLED = 50, 4
"""Denoising steps of a base model and of one that was distilled to take few, as published."""


def standardised(latents: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Latents of the autoencoder as the transformer takes them:  (z - m) / s, for each of the numbers of a square.

    Args:
        latents: z, float ``[B, C, h, w]``, both sides even.
        mean: m, ``[4 C]``: of each channel at the four places of a square, row by row.
        deviation: s > 0, likewise.

    Returns:
        ``[B, C, h, w]``.
    """
    squares = pixel_unshuffle(latents, PACKED)
    return pixel_shuffle((squares - mean[:, None, None]) / deviation[:, None, None], PACKED)


def unstandardised(latents: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """``standardised`` the other way round."""
    squares = pixel_unshuffle(latents, PACKED)
    return pixel_shuffle(squares * deviation[:, None, None] + mean[:, None, None], PACKED)


def position_ids(grid: tuple[int, int], length: int) -> tuple[Tensor, Tensor]:
    """Where things are, as the transformer is told: float32, (picture, row, column, position of the prompt) each.

    Args:
        grid: places of the picture, (height, width).
        length: positions of the prompt.

    Returns:
        Of the places, row by row, ``[h * w, 4]``, (0, row, column, 0); of the positions ``[length, 4]``, (0, 0, 0, n).
    """
    return pad(image_ids(grid), (0, 1)), pad(torch.arange(float(length))[:, None], (3, 0))


class Flux2Klein(ConceptTransformerBackbone, KLTransformerBackbone, LanguageBackbone):
    """Any FLUX.2-klein model, from the hub or a folder in diffusers' format.

    A token has one row, ``qwen3_4b``, or ``qwen3_8b`` with klein 9B. A prompt is what a user says in a chat, padded;
    the transformer reads the states after three layers of all of it, side by side.

    Some were distilled to take few steps and know of no guidance; their index says so. The base models take many and
    are guided by the empty prompt.
    """

    Settings = Flux2KleinSettings
    family = FLUX2_KLEIN
    # By shapes; the autoencoder's blocks are of the shape of FLUX.1's.
    measured = Measured(14.39, 3.14, 1.12, 4.33, "benchmarks/memory-by-shape.json")
    # Not the last layer of the blocks with one stream, ``to_out``: in the others that is the name of a list of layers.
    projections = (
        *ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    )  # fmt: skip

    _settings: Flux2KleinSettings

    def _take_apart(self, pipeline: Flux2KleinPipeline, settings: TransformerSettings, device: torch.device) -> None:
        # The language model without its head: what it would say next is not asked.
        pipeline.text_encoder = pipeline.text_encoder.model
        super()._take_apart(pipeline, settings, device)

    def _text_encoders(self, pipeline: Flux2KleinPipeline) -> dict[str, TextEncoder]:
        before, after = chat_around(pipeline.tokenizer, add_generation_prompt=True, enable_thinking=False)
        text = PaddedLanguageModel(
            pipeline.tokenizer, pipeline.text_encoder, LENGTH, LAYERS, before=before, after=after
        )  # fmt: skip
        self.encoder = ENCODERS[text.dim >= WIDTH_OF_8B]
        return {self.encoder: text}

    @property
    def _patch(self) -> int:
        return PACKED

    @property
    def _distilled(self) -> bool:
        return bool(self._pipeline.config.is_distilled)

    # --- Latents --------------------------------------------------------------------------------------------------

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents, as the model was trained: float32 ``[4 C]``."""
        norm, epsilon = self._autoencoder().bn, self._vae.config.batch_norm_eps
        return norm.running_mean, torch.sqrt(norm.running_var + epsilon)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` in [0, 1] -> the Gaussian that the autoencoder makes of them, standardised: mean and
        standard deviation, both float32 ``[B, C, h, w]``.
        """
        gaussian = self._autoencoder().encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        check_finite(torch.cat([gaussian.mean, gaussian.std]), "autoencoder's encoder in float32", DAMAGED)
        mean, deviation = self._statistics()
        return standardised(gaussian.mean, mean, deviation), standardised(gaussian.std, 0 * mean, deviation)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` -> float32 ``[B, 3, H, W]`` in [0, 1]."""
        autoencoder = self._autoencoder()
        latents = unstandardised(latents.to(self.device, torch.float32), *self._statistics())
        images = autoencoder.decode(latents).sample
        check_finite(images, "autoencoder's decoder in float32", DAMAGED)
        return (images / 2 + 0.5).clamp(0, 1)

    def _shift(self) -> float:
        """As the pipeline shifts the schedule of as many steps as the model is used with: it depends on both."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        config = self._pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return super()._shift()
        mu = compute_empirical_mu(self._grid[0] * self._grid[1], self._own_steps)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    # --- The transformer ------------------------------------------------------------------------------------------

    def _transform(self, noisy: Tensor, sigmas: Tensor, prompts: Conditioning) -> Tensor:
        grid = (noisy.shape[2] // PACKED, noisy.shape[3] // PACKED)
        sequence = prompts.parts["sequence"].to(self.transformer.dtype)
        places, positions = position_ids(grid, sequence.shape[1])
        output = self.transformer(
            hidden_states=pack(noisy),
            timestep=sigmas,
            guidance=None,
            encoder_hidden_states=sequence,
            txt_ids=positions.to(self.device),
            img_ids=places.to(self.device),
            return_dict=False,
        )[0]
        return unpack(output, grid)

    @contextmanager
    def _seeing(self, words: bool, pixels: bool, length: int) -> Iterator[Callable[[], Seen]]:
        """What a place gives the prompt's positions, its padding's and the other places sums to one, in all blocks."""
        capture = Capture(words=words, pixels=pixels)
        of_two, of_one = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        processors: list[FluxProcessor | ParallelProcessor] = [
            *(FluxProcessor(capture, layer, length) for layer in range(len(of_two))),
            *(ParallelProcessor(capture, layer, length) for layer in range(len(of_two), len(of_two) + len(of_one))),
        ]
        with processors_of([block.attn for block in (*of_two, *of_one)], processors, capture):
            yield capture.seen

    def _capturing_outputs(self, capture: Capture) -> AbstractContextManager[None]:
        blocks = self._joint_blocks()
        processors = [FluxProcessor(capture, layer, 0) for layer in range(len(blocks))]
        return processors_of([block.attn for block in blocks], processors, capture)

    def _concept_arguments(self, given: Mapping[str, Any], concepts: int) -> dict[str, Any]:
        """All concepts are where the first word of a prompt is, as each is in a prompt of nothing else."""
        length, place = given["encoder_hidden_states"].shape[1], self._first_place
        rotary = tuple(
            torch.cat([angles[place : place + 1].expand(concepts, -1), angles[length:]])
            for angles in given["image_rotary_emb"]
        )
        return {**given, "image_rotary_emb": rotary}

    @property
    def _first_place(self) -> int:
        """Where a prompt's first word is in the sequence."""
        return self.token_positions("cup", ["cup"])[0][0]

    # --- Sampling -------------------------------------------------------------------------------------------------

    def _sampling_pipeline(self) -> Flux2KleinPipeline:
        from diffusers import Flux2KleinPipeline

        pipeline = Flux2KleinPipeline(
            transformer=self.transformer,
            scheduler=self._sampler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            is_distilled=self._distilled,
        )
        # It undoes ``standardised`` before it gives latents; by a mean of 0 and a deviation of 1 nothing changes.
        channels = PACKED * PACKED * self._channels
        plain = torch.nn.BatchNorm2d(channels, affine=False, device=self.device)
        pipeline.vae = SimpleNamespace(bn=plain, config=SimpleNamespace(batch_norm_eps=0.0))
        return pipeline

    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        dtype = self.transformer.dtype
        return {
            "prompt_embeds": prompts.parts["sequence"].to(dtype),
            "negative_prompt_embeds": empty.parts["sequence"].to(dtype),
        }

    def _sampling(self, prompts: Conditioning, empty: Conditioning, *, guided: bool) -> AbstractContextManager[None]:
        """See ``PipelineBackbone``. That a distilled model passes over the guidance is no news at every picture."""
        return quiet()

    @property
    def _own_steps(self) -> int:
        return STEPS_OF_DISTILLED if self._distilled else STEPS

    def passes(self, steps: int | None, guidance_scale: float) -> int:
        """See ``protocols.Backbone``: one a step where it was distilled, whatever the guidance."""
        return self._sampling_steps(steps) * (2 if guidance_scale > 1 and not self._distilled else 1)


class ParallelProcessor(RotaryProcessor):
    """What ``Flux2ParallelSelfAttnProcessor`` computes: attention and feed-forward in one, on one sequence."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from positions and places to all of them."""
        projected: Tensor = attn.to_qkv_mlp_proj(hidden_states)
        attending, feeding = projected.tensor_split([3 * attn.inner_dim], dim=-1)
        query, key, value = attending.unflatten(-1, (3, -1, attn.head_dim)).unbind(dim=-3)
        attended = self._attend(attn.norm_q(query), attn.norm_k(key), value, image_rotary_emb, self._length)
        output: Tensor = attn.to_out(torch.cat([attended, attn.mlp_act_fn(feeding)], dim=-1))
        return output
