"""Stable Diffusion 3's classes as a backbone: a diffusion transformer with joint attention, flow matching and three
text encoders. The proof that the seam of ``icekit.protocols.Backbone`` is not made for UNets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from icekit import hookimpl
from icekit.backbones.attention_capture import attention_weights
from icekit.backbones.common import fingerprint, quiet, rows_for, tuned_pipeline
from icekit.backbones.fine_tuning import fine_tuned
from icekit.backbones.lora import ATTENTION_PROJECTIONS
from icekit.backbones.settings import ImageSize
from icekit.backbones.text_encoder import TextEncoder
from icekit.protocols import (
    NO_TOKENS,
    Attention,
    ComponentSettings,
    Conditioning,
    FineTuning,
    InputError,
    Look,
    Prediction,
    Tokens,
    Trained,
    Tuned,
    nearest_grids,
)

ENCODERS = {
    "clip_l": ("tokenizer", "text_encoder"),
    "clip_g": ("tokenizer_2", "text_encoder_2"),
    "t5xxl": ("tokenizer_3", "text_encoder_3"),
}
"""Name of a text encoder -> the pipeline's names of its tokenizer and its model."""
T5_LENGTH = 256
"""Positions of a prompt that T5 encodes, the pipeline's own."""
TRAINED_PROJECTIONS = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class JointCapturingProcessor:
    """What diffusers' ``JointAttnProcessor2_0`` computes, with the weights of the picture's queries kept.

    ``weights``: the last pass's, mean over heads, float32 ``[B, N, N + L]``: from N places to N places and L positions.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend from places ``[B, N, C]`` and positions ``[B, L, C]`` to all of them."""

        def heads(projected: Tensor, norm: nn.Module | None = None) -> Tensor:
            split = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = torch.cat(
            [
                heads(attn.to_k(hidden_states), attn.norm_k),
                heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k),
            ],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        weights = attention_weights(query, key, query.shape[-1] ** -0.5)
        self.weights = weights.mean(dim=1)
        places = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        text_query = heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)
        positions = scaled_dot_product_attention(text_query, key, value).transpose(1, 2).flatten(2)
        if not attn.context_pre_only:
            positions = attn.to_add_out(positions)
        return attn.to_out[1](attn.to_out[0](places)), positions


@contextmanager
def captured(transformer: SD3Transformer2DModel) -> Iterator[list[JointCapturingProcessor]]:
    """Let the joint attention of every block keep its weights until the block ends."""
    attentions = [block.attn for block in transformer.transformer_blocks]
    before = [attention.processor for attention in attentions]
    processors = [JointCapturingProcessor() for _ in attentions]
    try:
        for attention, processor in zip(attentions, processors, strict=True):
            attention.set_processor(processor)
        yield processors
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.set_processor(processor)


class JointAttention:
    """A Stable Diffusion 3 model from a folder in diffusers' format."""

    class Settings(ComponentSettings):
        """Which model, and how it is run."""

        model: str = Field(description="a folder in diffusers' format")
        image_size: ImageSize | None = None
        steps: int = Field(28, ge=1)
        guidance_scale: float = Field(7.0, ge=0)

    lacks = ("posterior",)

    def __init__(self, settings: Settings, device: torch.device | str) -> None:
        self._settings = settings
        self.device = torch.device(device)
        with quiet():
            self._pipeline = StableDiffusion3Pipeline.from_pretrained(settings.model).to(self.device)
        self._pipeline.set_progress_bar_config(disable=True)
        schedule = self._pipeline.scheduler
        if not isinstance(schedule, FlowMatchEulerDiscreteScheduler) or schedule.config.use_dynamic_shifting:
            raise InputError(
                f"backbone.model = {settings.model!r}: its schedule is {type(schedule).__name__}; supported is "
                "FlowMatchEulerDiscreteScheduler with one shift for all sizes"
            )
        self.transformer, self._vae = self._pipeline.transformer, self._pipeline.vae
        parts = {name: [getattr(self._pipeline, part) for part in places] for name, places in ENCODERS.items()}
        for module in (self.transformer, self._vae, *(model for _, model in parts.values())):
            module.eval().requires_grad_(False)
        self._text = {
            name: TextEncoder(tokenizer, model, T5_LENGTH if name == "t5xxl" else None)
            for name, (tokenizer, model) in parts.items()
        }
        self.rows = {name: encoder.dim for name, encoder in self._text.items()}
        self.identity = fingerprint({name: encoder.table for name, encoder in self._text.items()})

        factor, patch = self._pipeline.vae_scale_factor, self.transformer.config.patch_size
        side = self.transformer.config.sample_size * factor
        self.image_size = settings.image_size or (side, side)
        if any(side % (factor * patch) for side in self.image_size):
            raise InputError(
                f"backbone.image_size = {list(self.image_size)}: both sides must be multiples of {factor * patch}"
            )
        height, width = (side // factor for side in self.image_size)
        self.latent_shape = (self._vae.config.latent_channels, height, width)
        self.word_grids = self.pixel_grids = ((height // patch, width // patch),)

    def knows(self, word: str) -> bool:
        """Every word: the vocabulary is open."""
        return True

    def word_rows(self, word: str, pieces: Literal["mean", "first"] = "mean") -> dict[str, Tensor]:
        """See ``protocols.Backbone``."""
        return {name: encoder.word_row(word, pieces) for name, encoder in self._text.items()}

    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """The joint sequence, ``[B, L, C]``: both CLIPs' positions, side by side, and then T5's; and the CLIPs' pooled
        vectors ``[B, P]``.
        """
        clips = [
            self._text[name].outputs(prompts, rows_for(name, tokens), output_hidden_states=True)
            for name in ("clip_l", "clip_g")
        ]
        t5 = self._text["t5xxl"].encode(prompts, rows_for("t5xxl", tokens))
        words = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        words = pad(words, (0, t5.shape[-1] - words.shape[-1]))
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
        return Conditioning({"sequence": torch.cat([words, t5], dim=1), "pooled": pooled})

    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """The CLIPs' pooled vectors, each of length one, beside one another."""
        if pool is not None:
            raise InputError(f"pooling {pool!r}: texts of this model are read in one way (none)")
        pooled = [self._text[name].outputs(texts, rows_for(name, tokens)).text_embeds for name in ("clip_l", "clip_g")]
        return normalize(torch.cat([normalize(one, dim=-1) for one in pooled], dim=-1), dim=-1)

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """A word is at its place in the CLIPs' part of the joint sequence, and again in T5's."""
        in_clip = self._text["clip_l"].token_positions(prompt, words, rows_for("clip_l", tokens))
        in_t5 = self._text["t5xxl"].token_positions(prompt, words, rows_for("t5xxl", tokens))
        start = self._text["clip_l"].length
        return [[*clip, *(start + position for position in t5)] for clip, t5 in zip(in_clip, in_t5, strict=True)]

    def encode_images(self, images: Tensor) -> Tensor:
        """See ``protocols.Backbone``: the posterior's mean."""
        mean = self._vae.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist.mean
        return (mean - self._vae.config.shift_factor) * self._vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See ``protocols.Backbone``."""
        latents = latents.to(self.device, torch.float32) / self._vae.config.scaling_factor
        return (self._vae.decode(latents + self._vae.config.shift_factor).sample / 2 + 0.5).clamp(0, 1)

    def _sigmas(self, shares: Tensor) -> Tensor:
        """How much of it is noise, ``[B]``: the schedule's shift makes more of its shares noisy ones."""
        shift = self._pipeline.scheduler.shift
        shares = shares.to(self.device, torch.float32)
        return shift * shares / (1 + (shift - 1) * shares)

    def share_of(self, timestep: float) -> float:
        """The share of the schedule at which the transformer is told this time: the other way round."""
        shift = self._pipeline.scheduler.shift
        sigma = timestep / self._pipeline.scheduler.config.num_train_timesteps
        return sigma / (shift - (shift - 1) * sigma)

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The straight line from a picture to noise."""
        sigmas = self._sigmas(shares)[:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise

    def training_target(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The flow: the direction of the line, whatever the share."""
        return noise - latents

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        """See ``protocols.Backbone``. What a place gives the prompt's positions and the other places sums to one."""
        look = look or Look()
        if not (look.words or look.pixels):
            return Prediction(self._transform(noisy, shares, prompts))
        with captured(self.transformer) as processors:
            output = self._transform(noisy, shares, prompts)
        weights = torch.stack([one.weights for one in processors if one.weights is not None]).mean(dim=0)
        [grid] = self.word_grids
        places = grid[0] * grid[1]
        words = weights[..., places:].transpose(1, 2).unflatten(2, grid)
        pixels = weights[..., :places]
        pixels = (pixels / pixels.sum(dim=-1, keepdim=True)).unflatten(2, grid).unflatten(1, grid)
        return Prediction(
            output,
            Attention(
                words=tuple(words for _ in nearest_grids(self.word_grids, look.words)),
                pixels=tuple(pixels for _ in nearest_grids(self.pixel_grids, look.pixels)),
            ),
        )

    def _transform(self, noisy: Tensor, shares: Tensor, prompts: Conditioning) -> Tensor:
        return self.transformer(
            hidden_states=noisy,
            timestep=self._sigmas(shares) * self._pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=prompts.parts["sequence"],
            pooled_projections=prompts.parts["pooled"],
        ).sample

    def fine_tuned(self, trained: Trained, rank: int, generator: torch.Generator) -> AbstractContextManager[Tuned]:
        """See ``protocols.Backbone``: the transformer, or a LoRA adapter on its attention to picture and prompt."""
        return fine_tuned(self.transformer, trained, rank, generator, targets=TRAINED_PROJECTIONS, folder="transformer")

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        tokens: Tokens = NO_TOKENS,
        steps: int | None = None,
        guidance_scale: float | None = None,
        tuning: FineTuning | None = None,
        skip: Collection[int] = (),
        on_image: Callable[[int, Image.Image], None] | None = None,
    ) -> list[Image.Image]:
        """See ``protocols.Backbone``: one at a time, by the pipeline itself."""
        encoded = self.encode_prompts([*prompts, ""], tokens)
        images = []
        with tuned_pipeline(self._pipeline, self.transformer, tuning or FineTuning()):
            for place, seed in enumerate(seeds):
                if place in skip:
                    continue
                prompt, negative = encoded[[place]], encoded[[-1]]
                [image] = self._pipeline(
                    prompt_embeds=prompt.parts["sequence"],
                    pooled_prompt_embeds=prompt.parts["pooled"],
                    negative_prompt_embeds=negative.parts["sequence"],
                    negative_pooled_prompt_embeds=negative.parts["pooled"],
                    height=self.image_size[0],
                    width=self.image_size[1],
                    num_inference_steps=self._settings.steps if steps is None else steps,
                    guidance_scale=self._settings.guidance_scale if guidance_scale is None else guidance_scale,
                    generator=torch.Generator("cpu").manual_seed(seed),
                ).images
                images.append(image)
                if on_image:
                    on_image(place, image)
        return images


@hookimpl
def register_backbones(register: Callable[[str, type], None]) -> None:
    """The plugin: a module with hooks, like anybody's."""
    register("joint", JointAttention)
