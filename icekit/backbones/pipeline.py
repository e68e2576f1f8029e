"""What the backbones share that are a diffusers pipeline taken apart, whatever its noise predictor is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from PIL import Image
from torch import Tensor, nn

from icekit import wording
from icekit.backbones.attention_capture import checkpointed
from icekit.backbones.common import fingerprint, quiet, rows_for, to_pictures, tuned_pipeline
from icekit.backbones.estimate import WEIGHTS_ALONE, Measured
from icekit.backbones.loading import Family
from icekit.backbones.residence import Residence
from icekit.backbones.settings import PipelineSettings
from icekit.backbones.text_encoder import TextEncoder
from icekit.model_files import check_finite, one_line
from icekit.protocols import NO_TOKENS, Conditioning, FineTuning, InputError, RunError, Tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TILED_ABOVE = 2**21
"""Pixels of a picture above which the autoencoder works in tiles, if nothing else is set. Decoding takes 4 GB a million
pixels without; the largest size that models of these families were trained at has one million."""
DAMAGED = "its weights are damaged or another model's: get the model again"
"""The way out where a number format is not to blame."""


class PipelineBackbone(ABC):
    """A diffusers pipeline, taken apart. Learned rows, latents and noise are float32, whatever its parts are in.

    ``UNetBackbone`` is around a UNet, icekit-dit's ``TransformerBackbone`` around a diffusion transformer.
    """

    Settings: type[PipelineSettings] = PipelineSettings
    family: ClassVar[Family]
    """What a model of this family is made of."""
    predictor: ClassVar[str]
    """The pipeline's name of its noise predictor."""
    measured: ClassVar[Measured] = WEIGHTS_ALONE
    """What a model of this family needs of memory beside its weights."""

    device: torch.device
    image_size: tuple[int, int]
    latent_shape: tuple[int, int, int]

    @classmethod
    def from_pipeline(
        cls, pipeline: DiffusionPipeline, device: torch.device | str, settings: PipelineSettings | None = None
    ) -> Self:
        """A backbone around a pipeline that is in memory already. Takes it over: use the pipeline no longer.

        ``settings.model`` and the settings of loading are not looked at.
        """
        self = cls.__new__(cls)
        self._take_apart(pipeline, settings or cls.Settings.model_validate({}), torch.device(device))
        return self

    @abstractmethod
    def _take_apart(self, pipeline: Any, settings: Any, device: torch.device) -> None:
        """Take a pipeline over: ``_place_parts``, ``_read_texts``, and what is the family's own."""

    def _place_parts(
        self, pipeline: Any, settings: PipelineSettings, device: torch.device, dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """Bring the pipeline's parts into their number formats and to the device, as the settings have it.

        dtypes: part with weights -> number format.
        """
        self._pipeline: Any = pipeline
        self._settings: Any = settings
        self.device = device
        setattr(self, self.predictor, getattr(pipeline, self.predictor))
        self._vae: Any = pipeline.vae
        self._predicts_finite = False
        saving = settings.low_memory == "on"
        parts: dict[str, list[nn.Module]] = {"texts": [], self.predictor: [], "vae": []}
        with quiet():
            for part, dtype in dtypes.items():  # on the device there is never more than what stays there
                module: nn.Module | None = getattr(pipeline, part)
                if module is not None:
                    module.eval().requires_grad_(False).to(dtype=dtype)
                    parts["texts" if part.startswith("text_encoder") else part].append(module)
            self._parts = Residence(parts, device, in_turn=saving)
        if settings.gradient_checkpointing or saving:
            self._predictor.enable_gradient_checkpointing(checkpointed)
        if saving and hasattr(self._vae, "enable_slicing"):
            self._vae.enable_slicing()

    def _read_texts(self, named: str) -> None:
        """Take the text encoders over. Raises InputError for one that its tokenizer does not belong to."""
        try:
            self._texts = self._text_encoders(self._pipeline)
        except InputError as error:
            raise InputError(f"{named}: {error}") from error
        for text in self._texts.values():
            text.arrive = self._texts_in_use
        self.rows: Mapping[str, int] = {name: text.dim for name, text in self._texts.items()}
        self.identity = fingerprint({name: text.table for name, text in self._texts.items()})

    @property
    def _predictor(self) -> Any:
        """The noise predictor."""
        return getattr(self, self.predictor)

    @property
    @abstractmethod
    def _factor(self) -> int:
        """Pixels along one side of a latent."""

    # --- Prompts --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _text_encoders(self, pipeline: Any) -> dict[str, TextEncoder]:
        """The text encoders by name, taken over. Raises InputError for one that its tokenizer does not belong to."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], tokens: Tokens = NO_TOKENS) -> Conditioning:
        """See ``protocols.Backbone``; a part "sequence" is the prompt as the noise predictor reads it, ``[B, L, C]``.

        Raises:
            InputError: a prompt too long or with an unknown ``<token>``.
        """

    @abstractmethod
    def embed_texts(self, texts: Sequence[str], tokens: Tokens = NO_TOKENS, pool: str | None = None) -> Tensor:
        """See ``protocols.Backbone``."""

    def knows(self, word: str) -> bool:
        """Every word: the vocabulary is open."""
        return True

    def word_rows(self, word: str, pieces: Literal["mean", "first"] = "mean") -> dict[str, Tensor]:
        """See ``protocols.Backbone``. Raises InputError for an empty word."""
        return {name: text.word_row(word, pieces) for name, text in self._texts.items()}

    def _texts_in_use(self) -> None:
        self._parts.use("texts")

    # --- The same model in diffusers --------------------------------------------------------------------------------

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
    def pipeline_without(self) -> tuple[str, ...]:
        """Parts that the pipeline must be told to do without."""
        return tuple(part for part in self.family.optional if getattr(self._pipeline, part) is None)

    @property
    def pipeline_loads_tokens(self) -> bool:
        """Whether that pipeline has ``load_textual_inversion``."""
        return hasattr(self._pipeline, "load_textual_inversion")

    @property
    def pipeline_source(self) -> str | None:
        """What ``from_pretrained`` of ``pipeline_class`` takes to load this model: a folder or an id of the hub.

        None for a pipeline that was made in memory.
        """
        source: str | None = self._pipeline.name_or_path
        return source

    # --- Pictures -------------------------------------------------------------------------------------------------

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

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> float32 latents ``[B, C, h, w]``, as the noise predictor takes them."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` -> float32 ``[B, 3, H, W]`` in [0, 1]."""

    # --- Prediction -----------------------------------------------------------------------------------------------

    def _check_output(self, output: Tensor) -> None:
        """Refuse NaN and infinity. What a learner makes of its tokens is the learner's to judge: with gradients, the
        model is checked at first.
        """
        if not (self._predicts_finite and torch.is_grad_enabled()):
            self._check_predicted(output)
            self._predicts_finite = self._predicts_finite or torch.is_grad_enabled()

    def _check_predicted(self, output: Tensor) -> None:
        dtype = str(self._predictor.dtype).removeprefix("torch.")
        wider = wording.settings({"backbone": {"dtype": "float32"}})
        advice = DAMAGED if dtype == "float32" else f"{dtype} is too narrow for it: try {wider}"
        check_finite(output, f"noise predictor ({self.predictor}) in {dtype}", advice)

    @contextmanager
    def _trying_out(self, named: str) -> Iterator[None]:
        """What goes wrong in a first try of all parts is the model's: they do not fit together.

        Raises:
            InputError: they do not.
            RunError: they give NaN or infinity.
        """
        try:
            yield
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except RunError as error:
            raise RunError(f"{named}: {error}") from error
        except Exception as error:  # torch, diffusers, transformers: each fails in its own way
            raise InputError(f"{named}: its parts do not work together: {one_line(error)}") from error

    def _check_shapes(self, named: str, noisy: Tensor, output: Tensor, latents: Tensor) -> None:
        """Refuse parts that give latents of another shape than ``noisy`` has. Raises InputError."""
        for part, given in ((self.predictor, output), ("vae", latents)):
            if given.shape != noisy.shape:
                raise InputError(
                    f"{named}: its {part} gives latents of shape {list(given.shape[1:])} where {list(noisy.shape[1:])} "
                    "is right: it is of another model"
                )

    # --- Generation -----------------------------------------------------------------------------------------------

    @abstractmethod
    def _sampling_pipeline(self) -> Any:
        """The family's pipeline of the noise predictor alone, with a scheduler of its own: it takes prompts as they
        were encoded, in the noise predictor's number format, and gives latents.
        """

    @abstractmethod
    def _sampler_inputs(self, prompts: Conditioning, empty: Conditioning) -> dict[str, Any]:
        """What that pipeline's call takes of prompts, and of as many empty ones, beside ``guidance_scale``."""

    def _sampling(self, prompts: Conditioning, empty: Conditioning, *, guided: bool) -> AbstractContextManager[None]:
        """While that pipeline makes pictures of prompts: what its arguments do not tell the noise predictor of them.

        guided: whether it is asked about the empty ones as well, in the first half of each batch.
        """
        return nullcontext()

    def _from_sampler(self, latents: Tensor) -> Tensor:
        """Latents as that pipeline gives them -> ``[B, C, h, w]``."""
        return latents

    @property
    def _own_steps(self) -> int | None:
        """Denoising steps that the model was trained to take, in a family whose settings may leave it open."""
        return None

    def _sampling_steps(self, steps: int | None) -> int:
        """Denoising steps of a picture, as a call says it, or else the settings, or else the model."""
        return next(one for one in (steps, self._settings.steps, self._own_steps) if one is not None)

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
        """One RGB image per prompt, by the family's own pipeline and its scheduler; see ``protocols.Backbone``.

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
            sampling.vae_scale_factor = self._factor  # which it cannot read off an autoencoder that it has not got
            sampling.set_progress_bar_config(disable=True)
            for start in range(0, len(prompts), at_once):
                batch = range(start, min(start + at_once, len(prompts)))
                if all(place in skip for place in batch):
                    continue
                # Together with the empty prompt: sequences of one length.
                wanted = ["", *(prompts[place] for place in batch)]
                if wanted != before:
                    encoded, before = self.encode_prompts(wanted, tokens), wanted
                self._parts.use(self.predictor)
                prompted, empty = encoded[slice(1, None)], encoded[[0] * len(batch)]
                with self._sampling(prompted, empty, guided=guidance > 1):
                    latents = sampling(
                        **self._sampler_inputs(prompted, empty),
                        height=self.image_size[0],
                        width=self.image_size[1],
                        num_inference_steps=self._sampling_steps(steps),
                        guidance_scale=guidance,
                        generator=[torch.Generator("cpu").manual_seed(seeds[place]) for place in batch],
                        output_type="latent",
                    ).images
                self._check_predicted(latents)
                pictures = to_pictures(self.decode_latents(self._from_sampler(latents)))
                for place, image in zip(batch, pictures, strict=True):
                    if place not in skip:
                        images.append(image)
                        if on_image:
                            on_image(place, image)
        return images

    @contextmanager
    def _tuned(self, tuning: FineTuning | None) -> Iterator[None]:
        """The model with what a learner made of its noise predictor, for the length of the block."""
        with ExitStack() as stack:
            if tuning:
                stack.enter_context(self._parts.pinned(self.predictor))
                stack.enter_context(tuned_pipeline(self._pipeline, self._predictor, tuning))
            yield


class KLPipelineBackbone(PipelineBackbone):
    """One with diffusers' ``AutoencoderKL``, whose latents are shifted, if its configuration says so, and scaled."""

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> float32 latents ``[B, C, h, w]``: the posterior's mean, shifted and scaled."""
        return self.posterior(images)[0]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` in [0, 1] -> the Gaussian that the autoencoder makes of them, shifted and scaled: mean and
        standard deviation, both float32 ``[B, C, h, w]``.
        """
        config = self._vae.config
        gaussian = self._autoencoder().encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        check_finite(torch.cat([gaussian.mean, gaussian.std]), "autoencoder's encoder in float32", DAMAGED)
        mean = (gaussian.mean - (config.shift_factor or 0)) * config.scaling_factor
        return mean, gaussian.std * config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` -> float32 ``[B, 3, H, W]`` in [0, 1]."""
        config = self._vae.config
        latents = latents.to(self.device, torch.float32) / config.scaling_factor + (config.shift_factor or 0)
        images = self._autoencoder().decode(latents).sample
        check_finite(images, "autoencoder's decoder in float32", DAMAGED)
        return (images / 2 + 0.5).clamp(0, 1)
