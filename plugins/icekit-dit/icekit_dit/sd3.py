"""Any Stable Diffusion 3.x model as a backbone: joint attention, flow matching, two CLIPs and T5.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from icekit.backbones.common import rows_for
from icekit.backbones.estimate import Measured
from icekit.backbones.loading import Family
from icekit.backbones.lora import ATTENTION_PROJECTIONS
from icekit.backbones.text_encoder import TextEncoder
from icekit.protocols import NO_TOKENS, Conditioning, InputError, Tokens
from icekit_dit.attention import Capture, processors_of
from icekit_dit.concepts import ConceptTransformerBackbone
from icekit_dit.encoders import CLIP_TOKENIZERS, T5_TOKENIZERS, ClipEncoder, T5Encoder
from icekit_dit.settings import StableDiffusion3Settings
from icekit_dit.transformer import KLTransformerBackbone, Seen

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

STABLE_DIFFUSION_3 = Family(
    "Stable Diffusion 3.x",
    "StableDiffusion3Pipeline",
    {
        "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        "tokenizer": ("transformers", CLIP_TOKENIZERS),
        "tokenizer_2": ("transformers", CLIP_TOKENIZERS),
        "tokenizer_3": ("transformers", T5_TOKENIZERS),
        "text_encoder": ("transformers", ("CLIPTextModelWithProjection",)),
        "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
        "text_encoder_3": ("transformers", ("T5EncoderModel",)),
        "transformer": ("diffusers", ("SD3Transformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL",)),
    },
    {},
    optional=("tokenizer_3", "text_encoder_3"),
)
T5_LENGTH = 256
"""Positions of a prompt that T5 encodes, the pipeline's own."""


class StableDiffusion3(ConceptTransformerBackbone, KLTransformerBackbone):
    """Any Stable Diffusion 3.x model, from the hub or a folder in diffusers' format; also one without T5.

    A token has a row for each text encoder, ``clip_l``, ``clip_g`` and ``t5xxl``. The pooled text is each CLIP's at a
    prompt's end. The pipeline reads it at the highest token id, an extra token's wherever there is one, unless it is
    told otherwise: ``pipeline.text_encoder.text_model.eos_token_id = pipeline.tokenizer.eos_token_id``, and the same of
    ``text_encoder_2``.
    """

    Settings = StableDiffusion3Settings
    family = STABLE_DIFFUSION_3
    # By shapes, the rows of T5 learned; the autoencoder is of the shape of FLUX.1's.
    measured = Measured(8.97, 2.08, 0.34, 4.33, "benchmarks/memory-by-shape.json")
    large_encoders = ("text_encoder_3",)
    projections = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    @classmethod
    def _left_out(cls, settings: StableDiffusion3Settings) -> Collection[str]:
        return () if settings.t5 else cls.family.optional

    def _text_encoders(self, pipeline: StableDiffusion3Pipeline) -> dict[str, TextEncoder]:
        self._clips = {
            "clip_l": ClipEncoder(pipeline.tokenizer, pipeline.text_encoder),
            "clip_g": ClipEncoder(pipeline.tokenizer_2, pipeline.text_encoder_2),
        }
        first, second = (clip.length for clip in self._clips.values())
        if first != second:
            raise InputError(f"its CLIP text encoders read prompts of {first} and of {second} tokens")
        if pipeline.text_encoder_3 is None or pipeline.tokenizer_3 is None:
            return dict(self._clips)
        return {**self._clips, "t5xxl": T5Encoder(pipeline.tokenizer_3, pipeline.text_encoder_3, T5_LENGTH)}

    def _largest_side(self) -> int:
        """As many places along a side as there are embeddings of positions."""
        return int(self.transformer.config.pos_embed_max_size) * self._multiple()

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """The joint sequence, ``[B, L, C]``: both CLIPs' positions, side by side, and then T5's, zeros without it; and
        the CLIPs' pooled vectors ``[B, P]``.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``.
        """
        states, pooled = zip(
            *(clip.states_and_pooled(prompts, rows_for(name, tokens)) for name, clip in self._clips.items()),
            strict=True,
        )
        width = self.transformer.config.joint_attention_dim
        clip = torch.cat(states, dim=-1)
        clip = pad(clip, (0, width - clip.shape[-1]))
        if "t5xxl" in self._texts:
            t5 = self._texts["t5xxl"].encode(prompts, rows_for("t5xxl", tokens)).float()
        else:
            t5 = clip.new_zeros(len(prompts), T5_LENGTH, width)
        return Conditioning({"sequence": torch.cat([clip, t5], dim=1), "pooled": torch.cat(pooled, dim=-1)})

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """The CLIPs' pooled vectors, each of length one, beside one another: ``[B, P]`` of length one.

        Raises:
            InputError: a text too long or with an unknown ``<token>``; a ``pool``.
        """
        if pool is not None:
            raise InputError(f"pooling {pool!r}: texts of this model are read in one way (none)")
        pooled = [clip.pooled(texts, rows_for(name, tokens)) for name, clip in self._clips.items()]
        return normalize(torch.cat([normalize(one, dim=-1) for one in pooled], dim=-1), dim=-1)

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """A word is at its place in the CLIPs' part of the joint sequence, and again in T5's."""
        clip = self._texts["clip_l"]
        found = clip.token_positions(prompt, words, rows_for("clip_l", tokens))
        if "t5xxl" not in self._texts:
            return found
        in_t5 = self._texts["t5xxl"].token_positions(prompt, words, rows_for("t5xxl", tokens))
        return [[*one, *(clip.length + place for place in other)] for one, other in zip(found, in_t5, strict=True)]

    def _transform(self, noisy: Tensor, sigmas: Tensor, prompts: Conditioning) -> Tensor:
        dtype = self.transformer.dtype
        output: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=sigmas * self._pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=prompts.parts["sequence"].to(dtype),
            pooled_projections=prompts.parts["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output

    @contextmanager
    def _seeing(self, words: bool, pixels: bool, length: int) -> Iterator[Callable[[], Seen]]:
        """What a place gives the prompt's positions and the other places sums to one."""
        capture = Capture(words=words, pixels=pixels)
        with self._capturing_outputs(capture):
            yield capture.seen

    def _capturing_outputs(self, capture: Capture) -> AbstractContextManager[None]:
        attentions = [block.attn for block in self._joint_blocks()]
        return processors_of(attentions, [JointProcessor(capture, layer) for layer in range(len(attentions))], capture)

    def _concept_positions(self, concept: str, tokens: Tokens) -> list[int]:
        """T5's; the CLIPs' where there is no T5."""
        positions = super()._concept_positions(concept, tokens)
        in_t5 = [place for place in positions if place >= self._texts["clip_l"].length]
        return in_t5 or positions

    def _sampling_pipeline(self) -> StableDiffusion3Pipeline:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self._sampler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )

    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        dtype = self.transformer.dtype
        return {
            "prompt_embeds": prompts.parts["sequence"].to(dtype),
            "pooled_prompt_embeds": prompts.parts["pooled"].to(dtype),
            "negative_prompt_embeds": empty.parts["sequence"].to(dtype),
            "negative_pooled_prompt_embeds": empty.parts["pooled"].to(dtype),
        }


class JointProcessor:
    """A diffusers attention processor: what ``JointAttnProcessor2_0`` computes, with a ``Capture`` at its side."""

    def __init__(self, capture: Capture, layer: int) -> None:
        self._capture = capture
        self._layer = layer

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend from places ``[B, N, C]`` and positions ``[B, L, C]`` to all of them; the places come first."""

        def heads(projected: Tensor, norm: nn.Module | None = None) -> Tensor:
            split = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        text = encoder_hidden_states
        query = [heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)]
        key = [heads(attn.to_k(hidden_states), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)]
        value = [heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(text))]
        joint = [torch.cat(parts, dim=2) for parts in (query, key, value)]
        count = hidden_states.shape[1]
        places, positions = slice(0, count), slice(count, None)
        attended = self._capture.attend(self._layer, joint[0], joint[1], joint[2], positions, places)
        of_places, of_positions = attended[:, places], attended[:, positions]
        if not attn.context_pre_only:
            of_positions = attn.to_add_out(of_positions)
        return attn.to_out[1](attn.to_out[0](of_places)), of_positions
