"""What the backbones around a UNet share: Stable Diffusion 1.x, 2.x and XL differ in how they read a prompt alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from icekit.backbones.attention_capture import attention_layers, capture_attention, grids_of
from icekit.backbones.common import predictor_dtype, rows_for
from icekit.backbones.estimate import memory_need, place_of, weights_in
from icekit.backbones.file_layouts import layout_of
from icekit.backbones.fine_tuning import fine_tuned
from icekit.backbones.loading import load_pipeline
from icekit.backbones.pipeline import KLPipelineBackbone
from icekit.backbones.settings import StableDiffusionSettings
from icekit.model_files import one_line, read_json
from icekit.pixels import shape_for
from icekit.protocols import (
    NO_TOKENS,
    Conditioning,
    InputError,
    Look,
    MemoryNeed,
    Prediction,
    Tokens,
    Trained,
    Tuned,
    nearest_grids,
)

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a noise predictor of this family can be trained to return, as diffusers' schedulers name it."""
MULTIPLE = 8
"""diffusers' pipelines make pictures whose sides are multiples of this alone."""


class UNetBackbone(KLPipelineBackbone):
    """A diffusers pipeline around a UNet, taken apart; a family adds how it reads prompts.

    The noise predictor runs in ``StableDiffusionSettings.dtype``. Text encoders and autoencoder stay in float32: they
    are a small part of the work, what is learned goes through the text encoders, where bfloat16 would round a row's
    steps away, and Stable Diffusion XL's autoencoder overflows in float16.
    """

    Settings: type[StableDiffusionSettings] = StableDiffusionSettings
    predictor = "unet"
    unet: Any

    def __init__(self, settings: StableDiffusionSettings, device: torch.device | str) -> None:
        """Load the model.

        Raises:
            InputError: no such model, or one of another kind.
        """
        device = torch.device(device)
        dtypes = {"unet": predictor_dtype(settings.dtype, device)}
        pipeline, says_what_it_predicts = load_pipeline(settings, self.family, dtypes)
        self._take_apart(pipeline, settings, device, says_what_it_predicts)

    @classmethod
    def memory_needed(cls, settings: StableDiffusionSettings, device: torch.device, pictures: int) -> MemoryNeed | None:
        """What the device must have free, see ``protocols.Backbone``; None for a model that is not on this machine."""
        place = place_of(settings.model, settings.revision)
        if place is None:
            return None
        named = f"backbone.model = {settings.model!r}"
        if place.is_file():
            layout = layout_of(place, settings.layouts, named)
            counts, config = weights_in(place, layout.prefixes), layout.files["unet/config.json"]
        else:
            counts, config = weights_in(place), read_json(place / "unet" / "config.json", named)
        height, width = settings.image_size or _trained_size(config.get("sample_size"), MULTIPLE, named)
        sizes = {part: 4 for part in counts} | {"unet": predictor_dtype(settings.dtype, device).itemsize}
        return memory_need(
            {part: count for part, count in counts.items() if part in cls.family.weights},
            sizes,
            "unet",
            settings,
            cls.measured,
            pixels=height * width,
            pictures=pictures,
            in_turn=settings.low_memory == "on" and device.type != "cpu",
        )

    def _take_apart(
        self, pipeline: Any, settings: StableDiffusionSettings, device: torch.device, says_what_it_predicts: bool = True
    ) -> None:
        named = f"backbone.model = {settings.model!r}"
        channels, latent_channels = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
        if channels != latent_channels:
            raise InputError(
                f"{named}: its noise predictor takes {channels} channels (an inpainting or editing model?), a "
                f"text-to-image model takes {latent_channels}"
            )
        dtypes = dict.fromkeys(self.family.weights, torch.float32) | {"unet": predictor_dtype(settings.dtype, device)}
        self._place_parts(pipeline, settings, device, dtypes)
        self._read_texts(named)

        size = settings.image_size or _trained_size(self.unet.config.sample_size, self._factor, named)
        if any(side % max(self._factor, MULTIPLE) for side in size):
            multiple = max(self._factor, MULTIPLE)
            raise InputError(f"backbone.image_size = {list(size)}: both sides must be multiples of {multiple}")
        self._take_shape(size)

        self._use_schedules(None if settings.prediction_type == "auto" else settings.prediction_type)
        self._try_out(named)
        if settings.prediction_type == "auto" and not says_what_it_predicts:
            self._use_schedules(self._predicts())

    @property
    def _factor(self) -> int:
        return 2 ** (len(self._vae.config.block_out_channels) - 1)

    def _take_shape(self, size: tuple[int, int]) -> None:
        """Work with pictures of this (height, width), and with grids that follow from it."""
        height, width = (side // self._factor for side in size)
        self.image_size = size
        self.latent_shape = (self._vae.config.latent_channels, height, width)
        self._layers = attention_layers(self.unet, (height, width))
        self.word_grids, self.pixel_grids = grids_of(self._layers, "cross"), grids_of(self._layers, "self")

    def for_picture(self, height: int, width: int) -> Self:
        """See ``protocols.ShapedBackbone``. The weights are shared: neither changes them."""
        if self._settings.image_size:
            return self
        shaped = copy.copy(self)
        shaped._take_shape(shape_for((width, height), self.image_size, max(self._factor, MULTIPLE)))
        return shaped

    def _use_schedules(self, prediction_type: str | None) -> None:
        """Read the schedule that the model was trained with; None: it says itself what is predicted."""
        named = f"backbone.model = {self._settings.model!r}"
        config = dict(self._pipeline.scheduler.config)
        config |= {} if prediction_type is None else {"prediction_type": prediction_type}
        self._schedule, self._sampler = _schedules(config, self._settings.steps, named)
        self._prediction_type = self._schedule.config.prediction_type

    @torch.no_grad()
    def _predicts(self) -> Literal["epsilon", "v_prediction"]:
        """What the noise predictor returns, found out by a trial, where nothing says it.

        Of noise alone, at the end of the schedule, a model that predicts the noise returns its input (a cosine near 1);
        one that predicts v = a noise - s picture, with a near 0, returns a picture, which has little to do with it
        (0.01 to 0.19 by the tabletop's model).
        """
        noise = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        encoded = self.encode_prompts(["a photo"])
        output = self.predict(noise, torch.ones(1, device=self.device), encoded).output
        cosine = torch.nn.functional.cosine_similarity(output.float().flatten(), noise.flatten(), dim=0)
        return "epsilon" if float(cosine) > 0.5 else "v_prediction"

    @torch.no_grad()
    def _try_out(self, named: str) -> None:
        """Send the smallest picture there is through all parts, once: what does not fit together shows here.

        Raises:
            InputError: it does not.
            RunError: it gives NaN or infinity.
        """
        side = 2 ** (len(self.unet.down_blocks) - 1)
        noisy = torch.zeros(1, self.latent_shape[0], side, side, device=self.device)
        with self._trying_out(named):
            encoded = self.encode_prompts(["a cup"])
            with capture_attention(self.unet, attention_layers(self.unet, (side, side))):
                output = self.predict(noisy, torch.ones(1, device=self.device), encoded).output
            latents = self.encode_images(self.decode_latents(noisy))
        self._check_shapes(named, noisy, output, latents)

    def _conditions(self, prompts: Conditioning) -> dict[str, Any]:
        """What the UNet takes beside the sequence, by its argument's name."""
        return {}

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """See ``protocols.Backbone``. All of CLIP's encoders read a prompt in the same pieces."""
        name, text = next(iter(self._texts.items()))
        return text.token_positions(prompt, words, rows_for(name, tokens))

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The forward process of the model's own schedule, at the discrete steps nearest to ``shares``."""
        return self._schedule.add_noise(latents, noise, self._steps(shares))

    def training_target(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """What the model was trained to predict: the noise, v, or the latents themselves."""
        if self._prediction_type == "epsilon":
            return noise
        if self._prediction_type == "v_prediction":
            return self._schedule.get_velocity(latents, noise, self._steps(shares))
        return latents

    def _steps(self, shares: Tensor) -> Tensor:
        """The discrete steps nearest to shares of the schedule: int64 ``[B]``."""
        count = self._schedule.config.num_train_timesteps
        return (shares.to(self.device, torch.float32) * count).round().long().clamp(0, count - 1)

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        """See ``protocols.Backbone``; the output has the shape and dtype of ``noisy``."""
        look = look or Look()
        words = nearest_grids(self.word_grids, look.words)
        pixels = nearest_grids(self.pixel_grids, look.pixels)
        layers = [one for one in self._layers if one.grid in (words if one.kind == "cross" else pixels)]
        self._parts.use("unet")
        dtype = self.unet.dtype  # once: diffusers goes through all modules for it
        with capture_attention(self.unet, layers) as maps:
            output = self.unet(
                noisy.to(dtype),
                self._steps(shares),
                encoder_hidden_states=prompts.parts["sequence"].to(dtype),
                encoder_attention_mask=prompts.parts.get("mask"),
                **self._conditions(prompts),
            ).sample
        self._check_output(output)
        return Prediction(output.to(noisy.dtype), maps.means())

    @contextmanager
    def fine_tuned(self, trained: Trained, rank: int, generator: torch.Generator) -> Iterator[Tuned]:
        """See ``protocols.Backbone``: the UNet, or a LoRA adapter on the projections of its attention."""
        with self._parts.pinned("unet"), fine_tuned(self.unet, trained, rank, generator) as tuned:
            yield tuned

    @contextmanager
    def _sampling(self, prompts: Conditioning, empty: Conditioning, *, guided: bool) -> Iterator[None]:
        """The noise predictor under the prompts' mask, for which diffusers' pipeline has no argument."""
        mask = prompts.parts.get("mask")
        if mask is None:
            yield
            return
        if guided:  # classifier-free guidance: the pipeline puts the negative half of the batch first
            mask = torch.cat([empty.parts["mask"], mask])
        hook = self.unet.register_forward_pre_hook(
            lambda _unet, arguments, named: (arguments, {**named, "encoder_attention_mask": mask}), with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()


def _trained_size(sample_size: Any, factor: int, named: str) -> tuple[int, int]:
    """(height, width) in pixels that a noise predictor was trained at, from the latents' side or sides."""
    sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if not (
        isinstance(sides, list | tuple)
        and len(sides) == 2
        and all(type(one) is int and 0 < one <= 4096 for one in sides)
    ):
        raise InputError(
            f"{named}: unet/config.json: sample_size is {sample_size!r}; it should be the side of the latents, 64 or so"
        )
    height, width = sides
    return height * factor, width * factor


def _schedules(config: Any, steps: int, named: str) -> tuple[DDPMScheduler, DPMSolverMultistepScheduler]:
    """The schedule that the model was trained with, and the sampler that generates with it."""
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    try:
        trained: DDPMScheduler = DDPMScheduler.from_config(config)
        kept = trained.alphas_cumprod
        if not (len(kept) == trained.config.num_train_timesteps and bool(((kept >= 0) & (kept <= 1)).all())):
            raise ValueError("its betas should be numbers from 0 to 1, one a step")
        if bool((kept.diff() > 0).any()):
            raise ValueError("its betas let noise shrink from step to step")
        if bool(kept[-1] == 1):
            raise ValueError("its betas add no noise")
        if trained.config.prediction_type in PREDICTION_TYPES:
            sampler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler.from_config(
                config, algorithm_type="dpmsolver++", solver_order=2
            )
            trial = DPMSolverMultistepScheduler.from_config(sampler.config)
            trial.set_timesteps(steps)
            if not bool(trial.sigmas.isfinite().all()):
                raise ValueError("its betas leave a step without noise")
            return trained, sampler
    except MemoryError:
        raise
    except Exception as error:  # diffusers, numpy, torch: each fails in its own way
        raise InputError(f"{named}: scheduler/scheduler_config.json cannot be used: {one_line(error)}") from error
    raise InputError(
        f"{named}: its scheduler says that it predicts {trained.config.prediction_type!r}; "
        f"supported are {', '.join(PREDICTION_TYPES)}"
    )
