"""Any FLUX.1 model, dev or schnell, as a backbone: packed latents, T5 as the sequence, CLIP in the modulation alone.

Black Forest Labs, "FLUX.1" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pixel_shuffle, pixel_unshuffle

from icekit.backbones.common import rows_for
from icekit.backbones.estimate import Measured
from icekit.backbones.loading import Family
from icekit.backbones.lora import ATTENTION_PROJECTIONS
from icekit.backbones.text_encoder import TextEncoder
from icekit.protocols import NO_TOKENS, Conditioning, InputError, Tokens
from icekit_dit.attention import Capture, RotaryProcessor, processors_of
from icekit_dit.concepts import ConceptTransformerBackbone
from icekit_dit.encoders import CLIP_TOKENIZERS, T5_TOKENIZERS, ClipEncoder, T5Encoder
from icekit_dit.settings import FluxSettings
from icekit_dit.transformer import KLTransformerBackbone, Seen

if TYPE_CHECKING:
    from diffusers import FluxPipeline

FLUX = Family(
    "FLUX.1",
    "FluxPipeline",
    {
        "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        "tokenizer": ("transformers", CLIP_TOKENIZERS),
        "tokenizer_2": ("transformers", T5_TOKENIZERS),
        "text_encoder": ("transformers", ("CLIPTextModel",)),
        "text_encoder_2": ("transformers", ("T5EncoderModel",)),
        "transformer": ("diffusers", ("FluxTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL",)),
    },
    {},
)
T5_LENGTH = 512
"""Positions of a prompt that T5 encodes, the pipeline's own."""
STEPS, STEPS_OF_SCHNELL = 28, 4
"""Denoising steps of dev and of schnell, as published."""
PACKED = 2
"""Latents along one side of a place of the transformer's sequence."""


def pack(latents: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` as a sequence, squares of four at one place: ``[B, h / 2 * w / 2, 4 C]``."""
    return pixel_unshuffle(latents, PACKED).flatten(2).transpose(1, 2)


def unpack(sequence: Tensor, grid: tuple[int, int]) -> Tensor:
    """``pack`` the other way round; grid: (h / 2, w / 2)."""
    return pixel_shuffle(sequence.transpose(1, 2).unflatten(2, grid), PACKED)


class Flux(ConceptTransformerBackbone, KLTransformerBackbone):
    """Any FLUX.1 model, from the hub or a folder in diffusers' format.

    A token has two rows, ``clip_l`` and ``t5xxl``. The transformer reads T5's states; of CLIP it is told the pooled
    vector at a prompt's end, in its modulation. The pipeline reads that at the highest token id, an extra token's
    wherever there is one, unless it is told otherwise: ``pipeline.text_encoder.eos_token_id =
    pipeline.tokenizer.eos_token_id``.

    There is no negative prompt: FLUX.1-dev is told how strongly to follow the prompt, schnell is not.
    """

    Settings = FluxSettings
    family = FLUX
    # A step by its shapes, T5's rows learned: without checkpointing it did not fit into 79 GiB.
    measured = Measured(26.04, 4.88, 0.89, 4.33, "benchmarks/memory.json, H100, and memory-by-shape.json")
    large_encoders = ("text_encoder_2",)
    projections = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    advice_on_rows = (
        "on FLUX.1 learned rows alone are weak: T5's change almost nothing, CLIP's give most of the likeness; "
        "--learner modulation learns offsets of the modulation instead"
    )

    _settings: FluxSettings

    def _text_encoders(self, pipeline: FluxPipeline) -> dict[str, TextEncoder]:
        self._clip = ClipEncoder(pipeline.tokenizer, pipeline.text_encoder)
        return {"clip_l": self._clip, "t5xxl": T5Encoder(pipeline.tokenizer_2, pipeline.text_encoder_2, T5_LENGTH)}

    @property
    def _patch(self) -> int:
        return PACKED

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """T5's states, ``[B, L, C]``, and CLIP's pooled vectors ``[B, P]``.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``.
        """
        pooled = self._clip.pooled(prompts, rows_for("clip_l", tokens))
        states = self._texts["t5xxl"].encode(prompts, rows_for("t5xxl", tokens))
        return Conditioning({"sequence": states.float(), "pooled": pooled})

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """CLIP's pooled vectors, ``[B, P]`` of length one.

        Raises:
            InputError: a text too long or with an unknown ``<token>``; a ``pool``.
        """
        if pool is not None:
            raise InputError(f"pooling {pool!r}: texts of this model are read in one way (none)")
        return normalize(self._clip.pooled(texts, rows_for("clip_l", tokens)), dim=-1)

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """See ``protocols.Backbone``: a word's places in T5's sequence."""
        return self._texts["t5xxl"].token_positions(prompt, words, rows_for("t5xxl", tokens))

    def _transform(self, noisy: Tensor, sigmas: Tensor, prompts: Conditioning) -> Tensor:
        dtype, config = self.transformer.dtype, self.transformer.config
        grid = (noisy.shape[2] // PACKED, noisy.shape[3] // PACKED)
        sequence = prompts.parts["sequence"].to(dtype)
        guidance = torch.full_like(sigmas, self._settings.learning_guidance) if config.guidance_embeds else None
        output = self.transformer(
            hidden_states=pack(noisy),
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=prompts.parts["pooled"].to(dtype),
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(sequence.shape[1], 3, device=self.device, dtype=dtype),
            img_ids=image_ids(grid).to(self.device, dtype),
            return_dict=False,
        )[0]
        return unpack(output, grid)

    @contextmanager
    def _seeing(self, words: bool, pixels: bool, length: int) -> Iterator[Callable[[], Seen]]:
        """What a place gives the prompt's positions and the other places sums to one, in all blocks."""
        capture = Capture(words=words, pixels=pixels)
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        with self._capturing(capture, blocks, length):
            yield capture.seen

    def _capturing_outputs(self, capture: Capture) -> AbstractContextManager[None]:
        return self._capturing(capture, self._joint_blocks(), 0)

    def _capturing(self, capture: Capture, blocks: Sequence[Any], length: int) -> AbstractContextManager[None]:
        processors = [FluxProcessor(capture, layer, length) for layer in range(len(blocks))]
        return processors_of([block.attn for block in blocks], processors, capture)

    def _concept_arguments(self, given: Mapping[str, Any], concepts: int) -> dict[str, Any]:
        """All of the text is at one place, where the first of its positions is."""
        length = given["encoder_hidden_states"].shape[1]
        rotary = tuple(
            torch.cat([angles[:1].expand(concepts, -1), angles[length:]]) for angles in given["image_rotary_emb"]
        )
        return {**given, "image_rotary_emb": rotary}

    def _sampling_pipeline(self) -> FluxPipeline:
        from diffusers import FluxPipeline

        return FluxPipeline(
            transformer=self.transformer,
            scheduler=self._sampler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
        )

    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        dtype = self.transformer.dtype
        return {
            "prompt_embeds": prompts.parts["sequence"].to(dtype),
            "pooled_prompt_embeds": prompts.parts["pooled"].to(dtype),
        }

    @property
    def _own_steps(self) -> int:
        """Schnell, which is told of no guidance, takes few."""
        return STEPS if self.transformer.config.guidance_embeds else STEPS_OF_SCHNELL

    def passes(self, steps: int | None, guidance_scale: float) -> int:
        """See ``protocols.Backbone``: one a step, whatever the guidance."""
        return self._sampling_steps(steps)

    def _from_sampler(self, latents: Tensor) -> Tensor:
        return unpack(latents, self._grid)


def image_ids(grid: tuple[int, int]) -> Tensor:
    """Where each place of a picture is, as the transformer is told: float32 ``[h * w, 3]``, (0, row, column)."""
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


class FluxProcessor(RotaryProcessor):
    """What ``FluxAttnProcessor`` computes; ``length`` is for blocks where prompt and picture are one sequence."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from positions and places to all of them; the positions come first."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, attn.head_dim))

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        text, length = encoder_hidden_states, self._length
        if text is not None:
            length = text.shape[1]
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], dim=1)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(text)), value], dim=1)
        attended = self._attend(query, key, value, image_rotary_emb, length)
        if text is None:
            return attended
        of_places = attn.to_out[1](attn.to_out[0](attended[:, length:].contiguous()))
        return of_places, attn.to_add_out(attended[:, :length].contiguous())
