"""What the backbones around a UNet share: Stable Diffusion 1.x, 2.x and XL differ in how they read a prompt alone."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from icekit.backbones.attention_capture import attention_layers, capture_attention, checkpointed, grids_of
from icekit.backbones.common import fingerprint, predictor_dtype, quiet, rows_for, to_pictures, tuned_pipeline
from icekit.backbones.estimate import WEIGHTS_ALONE, Measured, memory_need, place_of, weights_in
from icekit.backbones.file_layouts import layout_of
from icekit.backbones.fine_tuning import fine_tuned
from icekit.backbones.loading import Family, load_pipeline
from icekit.backbones.residence import Residence
from icekit.backbones.settings import StableDiffusionSettings
from icekit.backbones.text_encoder import TextEncoder
from icekit.model_files import check_finite, one_line, read_json
from icekit.pixels import shape_for
from icekit.protocols import (
    NO_TOKENS,
    Conditioning,
    FineTuning,
    InputError,
    Look,
    MemoryNeed,
    Prediction,
    RunError,
    Tokens,
    Trained,
    Tuned,
    nearest_grids,
)

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a noise predictor of this family can be trained to return, as diffusers' schedulers name it."""
MULTIPLE = 8
"""diffusers' pipelines make pictures whose sides are multiples of this alone."""
TILED_ABOVE = 2**21
"""Pixels of a picture above which the autoencoder works in tiles, if nothing else is set. Decoding takes 4 GB a million
pixels without; the largest size that a model of this family was trained at has one million."""
DAMAGED = "its weights are damaged or another model's: get the model again"
"""The way out where a number format is not to blame."""


class UNetBackbone(ABC):
    """A diffusers pipeline around a UNet, taken apart; a family adds how it reads prompts.

    The noise predictor runs in ``StableDiffusionSettings.dtype``. Text encoders and autoencoder stay in float32: they
    are a small part of the work, what is learned goes through the text encoders, where bfloat16 would round a row's
    steps away, and Stable Diffusion XL's autoencoder overflows in float16.
    """

    Settings: type[StableDiffusionSettings] = StableDiffusionSettings
    family: Family
    """What a model of this family is made of."""
    measured: ClassVar[Measured] = WEIGHTS_ALONE
    """What a model of this family needs of memory beside its weights."""

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
    def from_pipeline(
        cls, pipeline: DiffusionPipeline, device: torch.device | str, settings: StableDiffusionSettings | None = None
    ) -> Self:
        """A backbone around a pipeline that is in memory already. Takes it over: use the pipeline no longer.

        ``settings.model`` and the settings of loading are not looked at.
        """
        self = cls.__new__(cls)
        self._take_apart(pipeline, settings or cls.Settings(), torch.device(device))
        return self

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
        self._pipeline = pipeline
        self._settings = settings
        self.unet, self._vae = pipeline.unet, pipeline.vae
        if self.unet.config.in_channels != self._vae.config.latent_channels:
            raise InputError(
                f"{named}: its noise predictor takes {self.unet.config.in_channels} "
                "channels (an inpainting or editing model?), a text-to-image model takes "
                f"{self._vae.config.latent_channels}"
            )
        saving = settings.low_memory == "on"
        modules: dict[str, torch.nn.Module] = {part: getattr(pipeline, part) for part in self.family.weights}
        with quiet():
            for part, module in modules.items():  # on the device there is never more than what stays there
                dtype = predictor_dtype(settings.dtype, device) if part == "unet" else torch.float32
                module.eval().requires_grad_(False).to(dtype=dtype)
            texts = [module for part, module in modules.items() if part.startswith("text_encoder")]
            parts = {"texts": texts, "unet": [modules["unet"]], "vae": [modules["vae"]]}
            self._parts = Residence(parts, device, in_turn=saving)
        if settings.gradient_checkpointing or saving:
            self.unet.enable_gradient_checkpointing(checkpointed)
        if saving:
            self._vae.enable_slicing()
        self.device = device
        self._predicts_finite = False
        try:
            self._texts = self._text_encoders(pipeline)
        except InputError as error:
            raise InputError(f"{named}: {error}") from error
        for text in self._texts.values():
            text.arrive = self._texts_in_use
        self.rows: Mapping[str, int] = {name: text.dim for name, text in self._texts.items()}
        self.identity = fingerprint({name: text.table for name, text in self._texts.items()})

        self._factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        size = settings.image_size or _trained_size(self.unet.config.sample_size, self._factor, named)
        if any(side % max(self._factor, MULTIPLE) for side in size):
            multiple = max(self._factor, MULTIPLE)
            raise InputError(f"backbone.image_size = {list(size)}: both sides must be multiples of {multiple}")
        self._take_shape(size)

        self._use_schedules(None if settings.prediction_type == "auto" else settings.prediction_type)
        self._try_out(named)
        if settings.prediction_type == "auto" and not says_what_it_predicts:
            self._use_schedules(self._predicts())

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
        try:
            encoded = self.encode_prompts(["a cup"])
            with capture_attention(self.unet, attention_layers(self.unet, (side, side))):
                output = self.predict(noisy, torch.ones(1, device=self.device), encoded).output
            image = self.decode_latents(noisy)
            latents = self.encode_images(image)
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except RunError as error:
            raise RunError(f"{named}: {error}") from error
        except Exception as error:  # torch, diffusers, transformers: each fails in its own way
            raise InputError(f"{named}: its parts do not work together: {one_line(error)}") from error
        for part, given in (("unet", output), ("vae", latents)):
            if given.shape != noisy.shape:
                raise InputError(
                    f"{named}: its {part} gives latents of shape {list(given.shape[1:])} where {list(noisy.shape[1:])} "
                    "is right: it is of another model"
                )

    # --- Prompts: the family's own ------------------------------------------------------------------------------------

    @abstractmethod
    def _text_encoders(self, pipeline: Any) -> dict[str, TextEncoder]:
        """The text encoders by name, taken over. Raises InputError for one that its tokenizer does not belong to."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """See ``protocols.Backbone``; a part "sequence" is what the UNet's cross-attention reads, ``[B, L, C]``.

        A part "mask", bool ``[B, L]``, hides positions of the prompt from the noise predictor.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``.
        """

    @abstractmethod
    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """See ``protocols.Backbone``."""

    def _conditions(self, prompts: Conditioning) -> dict[str, Any]:
        """What the UNet takes beside the sequence, by its argument's name."""
        return {}

    @abstractmethod
    def _latent_pipeline(self) -> Any:
        """A pipeline of the noise predictor alone, with the scheduler that generates: it takes embeddings as they are,
        in the noise predictor's dtype, and gives latents.
        """

    def _sampling_pipeline(self) -> Any:
        sampling = self._latent_pipeline()
        sampling.vae_scale_factor = self._factor  # which it cannot read off an autoencoder that it has not got
        sampling.set_progress_bar_config(disable=True)
        return sampling

    @abstractmethod
    def _sampler_inputs(self, encoded: Conditioning) -> dict[str, Tensor]:
        """What that pipeline takes of an empty prompt and the prompts, encoded in this order."""

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that loads this model without icekit."""
        return self.family.pipeline

    @property
    def pipeline_encoders(self) -> dict[str, tuple[str, str]]:
        """The pipeline's names of the tokenizer and the model of each text encoder."""
        ends = [""] if len(self._texts) == 1 else ["", *(f"_{number}" for number in range(2, len(self._texts) + 1))]
        return {name: (f"tokenizer{end}", f"text_encoder{end}") for name, end in zip(self._texts, ends, strict=True)}

    @property
    def pipeline_source(self) -> str | None:
        """What ``from_pretrained`` of ``pipeline_class`` takes to load this model: a folder or an id of the hub.

        None for a pipeline that was made in memory.
        """
        source: str | None = self._pipeline.name_or_path
        return source

    def knows(self, word: str) -> bool:
        """Every word: the vocabulary is open."""
        return True

    def word_rows(self, word: str, pieces: Literal["mean", "first"] = "mean") -> dict[str, Tensor]:
        """See ``protocols.Backbone``. Raises InputError for an empty word."""
        return {name: text.word_row(word, pieces) for name, text in self._texts.items()}

    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """See ``protocols.Backbone``. All of CLIP's encoders read a prompt in the same pieces."""
        name, text = next(iter(self._texts.items()))
        return text.token_positions(prompt, words, rows_for(name, tokens))

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> float32 latents ``[B, C, h, w]``, the posterior's mean times the scaling."""
        return self.posterior(images)[0]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` in [0, 1] -> the Gaussian that the autoencoder makes of them, times the scaling: mean and
        standard deviation, both float32 ``[B, C, h, w]``.
        """
        gaussian = self._autoencoder().encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        check_finite(torch.cat([gaussian.mean, gaussian.std]), "autoencoder's encoder in float32", DAMAGED)
        return gaussian.mean * self._vae.config.scaling_factor, gaussian.std * self._vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` -> float32 ``[B, 3, H, W]`` in [0, 1]."""
        scaled = latents.to(self.device, torch.float32) / self._vae.config.scaling_factor
        images = self._autoencoder().decode(scaled).sample
        check_finite(images, "autoencoder's decoder in float32", DAMAGED)
        return (images / 2 + 0.5).clamp(0, 1)

    def _texts_in_use(self) -> None:
        self._parts.use("texts")

    def _autoencoder(self) -> Any:
        """The autoencoder, on the device and as this picture's size needs it."""
        if not torch.is_grad_enabled():  # with gradients it is used in a step of learning, which needs all parts
            self._parts.release()
        self._parts.use("vae")
        large = self.image_size[0] * self.image_size[1] > TILED_ABOVE
        if self._settings.vae_tiling == "on" or (self._settings.vae_tiling == "auto" and large):
            self._vae.enable_tiling()
        else:
            self._vae.disable_tiling()
        return self._vae

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
        with capture_attention(self.unet, layers) as maps:
            output = self.unet(
                noisy.to(self.unet.dtype),
                self._steps(shares),
                encoder_hidden_states=prompts.parts["sequence"].to(self.unet.dtype),
                encoder_attention_mask=prompts.parts.get("mask"),
                **self._conditions(prompts),
            ).sample
        # What a learner makes of its tokens is the learner's to judge: with gradients, the model is checked at first.
        if not (self._predicts_finite and torch.is_grad_enabled()):
            self._check_predicted(output)
            self._predicts_finite = self._predicts_finite or torch.is_grad_enabled()
        return Prediction(output.to(noisy.dtype), maps.means())

    def _check_predicted(self, output: Tensor) -> None:
        dtype = str(self.unet.dtype).removeprefix("torch.")
        advice = DAMAGED if dtype == "float32" else f"{dtype} is too narrow for it: try --set backbone.dtype=float32"
        check_finite(output, f"noise predictor (unet) in {dtype}", advice)

    @contextmanager
    def fine_tuned(self, trained: Trained, rank: int, generator: torch.Generator) -> Iterator[Tuned]:
        """See ``protocols.Backbone``: the UNet, or a LoRA adapter on the projections of its attention."""
        with self._parts.pinned("unet"), fine_tuned(self.unet, trained, rank, generator) as tuned:
            yield tuned

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
        """One RGB image per prompt, by DPM-Solver++ (Lu et al., 2022); see ``protocols.Backbone``.

        With ``Settings.images_at_once`` 1, the default, image i is the same bits whatever is generated beside it. With
        more it is the same up to rounding: kernels round differently for batches of different sizes.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        guidance = self._settings.guidance_scale if guidance_scale is None else guidance_scale
        at_once = self._settings.images_at_once
        images: list[Image.Image] = []
        self._parts.release()
        with self._tuned(tuning):
            for name, text in self._texts.items():
                text.token_ids(prompts, rows_for(name, tokens))  # refuse a wrong prompt before the first image
            sampling, before = self._sampling_pipeline(), list[str]()
            for start in range(0, len(prompts), at_once):
                batch = range(start, min(start + at_once, len(prompts)))
                if all(place in skip for place in batch):
                    continue
                # Together with the empty prompt: sequences of one length.
                wanted = ["", *(prompts[place] for place in batch)]
                if wanted != before:
                    encoded, before = self.encode_prompts(wanted, tokens), wanted
                self._parts.use("unet")
                with self._masked(encoded.parts.get("mask"), guided=guidance > 1):
                    latents = sampling(
                        **self._sampler_inputs(encoded),
                        height=self.image_size[0],
                        width=self.image_size[1],
                        num_inference_steps=self._settings.steps if steps is None else steps,
                        guidance_scale=guidance,
                        generator=[torch.Generator("cpu").manual_seed(seeds[place]) for place in batch],
                        output_type="latent",
                    ).images
                self._check_predicted(latents)
                for place, image in zip(batch, to_pictures(self.decode_latents(latents)), strict=True):
                    if place not in skip:
                        images.append(image)
                        if on_image:
                            on_image(place, image)
        return images

    @contextmanager
    def _masked(self, mask: Tensor | None, *, guided: bool) -> Iterator[None]:
        """The noise predictor under a mask, bool ``[1 + B, L]``, of the empty prompt and the prompts: diffusers'
        pipeline has no argument for it.
        """
        if mask is None:
            yield
            return
        empty, mask = mask[:1], mask[1:]
        if guided:  # classifier-free guidance: the pipeline puts the negative half of the batch first
            mask = torch.cat([empty.expand_as(mask), mask])
        hook = self.unet.register_forward_pre_hook(
            lambda _unet, arguments, named: (arguments, {**named, "encoder_attention_mask": mask}), with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _tuned(self, tuning: FineTuning | None) -> Iterator[None]:
        """The model with what a learner made of its noise predictor, for the length of the block."""
        with ExitStack() as stack:
            if tuning:
                stack.enter_context(self._parts.pinned("unet"))
                stack.enter_context(tuned_pipeline(self._pipeline, self.unet, tuning))
            yield


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
