"""What the backbones around a diffusion transformer share: flow matching, latents, sampling, fine-tuning.

A family inherits from ``TransformerBackbone`` and says how it reads prompts, how its transformer is called and how its
attention is read.

Flow matching: Lipman et al., "Flow Matching for Generative Modeling" (ICLR 2023); Esser et al., "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis" (ICML 2024).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from icekit.backbones.common import predictor_dtype
from icekit.backbones.estimate import memory_need, place_of, weights_in
from icekit.backbones.file_layouts import layout_of
from icekit.backbones.fine_tuning import fine_tuned
from icekit.backbones.loading import divided, load_pipeline
from icekit.backbones.lora import ATTENTION_PROJECTIONS
from icekit.backbones.pipeline import KLPipelineBackbone, PipelineBackbone
from icekit.pixels import shape_for
from icekit.protocols import (
    NO_TOKENS,
    Attention,
    Capability,
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
from icekit_dit.settings import TransformerSettings

if TYPE_CHECKING:
    pass

Seen = tuple[Tensor | None, Tensor | None]
"""What was seen in one pass, mean over heads and layers, float32: from N places to L positions of the prompt
``[B, N, L]``, and from N places to N places ``[B, N, N]``; None for what was not asked for."""

LARGEST_SIDE = 65_536


def shifted(shares: Tensor, shift: float) -> Tensor:
    """How much of a picture is noise at shares of the schedule:  sigma = a s / (1 + (a - 1) s)  (Esser et al., eq. 23).

    Args:
        shares: s, float of any shape, in [0, 1].
        shift: a > 0; above 1 more of the schedule is spent on noisy pictures.

    Returns:
        sigma, of the same shape, in [0, 1].
    """
    return shift * shares / (1 + (shift - 1) * shares)


def unshifted(sigma: float, shift: float) -> float:
    """The share of the schedule at which so much is noise: ``shifted`` the other way round."""
    return sigma / (shift - (shift - 1) * sigma)


def dynamic_shift(config: Any, places: int) -> float:
    """The shift of a scheduler that depends on a picture's size, as diffusers' pipelines compute it.

    mu is linear in the number of places, through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift);
    the shift is e^mu, or mu itself.

    Args:
        config: of a ``FlowMatchEulerDiscreteScheduler``.
        places: how many positions of the transformer's sequence are the picture's.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) / (many - few) * (places - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


class TransformerBackbone(PipelineBackbone):
    """A diffusers pipeline around a diffusion transformer, taken apart; a family adds what is its own.

    The noise predictor runs in ``TransformerSettings.dtype``, the parts in ``large_encoders`` in its ``text_dtype``,
    and the others in float32. Latents, noise and learned rows are float32.

    A family says ``Settings``, ``family``, ``lacks`` and ``large_encoders``, and defines the abstract methods. It
    overrides others where it differs.
    """

    Settings: type[TransformerSettings] = TransformerSettings
    predictor = "transformer"
    transformer: Any
    lacks: ClassVar[Collection[Capability]] = ()
    native_pixels: ClassVar[int] = 1024 * 1024
    """Of the pictures that the family's models were trained with."""
    large_encoders: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that are text encoders of billions of weights."""
    schedulers: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)
    """Classes of diffusers' schedulers that the family's models come with."""
    projections: ClassVar[tuple[str, ...]] = ATTENTION_PROJECTIONS
    """Ends of the names of the layers that a LoRA adapter changes."""

    def __init__(self, settings: TransformerSettings, device: torch.device | str) -> None:
        """Load the model.

        Raises:
            InputError: no such model, or one of another kind.
        """
        device = torch.device(device)
        pipeline, _ = load_pipeline(
            settings, self.family, self._dtypes(settings, device), without=self._left_out(settings)
        )
        self._take_apart(pipeline, settings, device)

    @classmethod
    def memory_needed(cls, settings: TransformerSettings, device: torch.device, pictures: int) -> MemoryNeed | None:
        """What the device must have free, see ``protocols.Backbone``; None for a model that is not on this machine."""
        counts = cls._weights_of(settings)
        if counts is None:
            return None
        dtypes = cls._dtypes(settings, device)
        left_out = cls._left_out(settings)
        return memory_need(
            {part: count for part, count in counts.items() if part in dtypes and part not in left_out},
            {part: dtype.itemsize for part, dtype in dtypes.items()},
            "transformer",
            settings,
            cls.measured,
            pixels=math.prod(settings.image_size) if settings.image_size else cls.native_pixels,
            pictures=pictures,
            in_turn=settings.low_memory == "on" and device.type != "cpu",
        )

    @classmethod
    def _weights_of(cls, settings: TransformerSettings) -> dict[str, int] | None:
        """Part -> the number of its weights; None for a model that is not on this machine.

        Raises:
            InputError: a file that is no model of a family that is known.
        """
        place = place_of(settings.model, settings.revision)
        if place is None or place.is_dir():
            return None if place is None else weights_in(place)
        named = f"backbone.model = {settings.model!r}"
        layout = layout_of(place, settings.layouts, named)
        _, others = divided(layout, place, cls.family, list(cls.family.parts), named)
        encoders = getattr(settings, "encoders", None)
        folder = None if encoders is None else place_of(encoders, None)
        beside = {} if folder is None else weights_in(folder)
        return weights_in(place, layout.prefixes) | {part: beside[part] for part in others if part in beside}

    @classmethod
    def _left_out(cls, settings: Any) -> Collection[str]:
        """Optional parts of the pipeline that the settings do without."""
        return ()

    @classmethod
    def _dtypes(cls, settings: TransformerSettings, device: torch.device) -> dict[str, torch.dtype]:
        """The number format of each part with weights."""
        predictor = predictor_dtype(settings.dtype, device)
        narrow = torch.float32 if predictor == torch.float32 else torch.bfloat16
        text = narrow if settings.text_dtype == "auto" else getattr(torch, settings.text_dtype)
        dtypes = dict.fromkeys(cls.family.weights, torch.float32)
        return dtypes | {"transformer": predictor} | dict.fromkeys(cls.large_encoders, text)

    def _take_apart(self, pipeline: Any, settings: TransformerSettings, device: torch.device) -> None:
        named = f"backbone.model = {settings.model!r}"
        self._pipeline = pipeline
        self._check_schedule(named)
        self._place_parts(pipeline, settings, device, self._dtypes(settings, device))
        self._read_texts(named)

        size = settings.image_size or self._trained_size()
        multiple, largest = self._multiple(), self._largest_side()
        if any(side % multiple or side > largest for side in size):
            most = "" if largest == LARGEST_SIDE else f" of at most {largest}"
            raise InputError(f"backbone.image_size = {list(size)}: both sides must be multiples of {multiple}{most}")
        self._take_shape(size)
        self._try_out(named)

    # --- Sizes ----------------------------------------------------------------------------------------------------

    @property
    def _factor(self) -> int:
        """Pixels along one side of a latent."""
        factor: int = self._pipeline.vae_scale_factor
        return factor

    @property
    def _patch(self) -> int:
        """Latents along one side of a place of the transformer's sequence."""
        patch: int = self.transformer.config.patch_size
        return patch

    @property
    def _channels(self) -> int:
        """Channels of the latents."""
        channels: int = self._vae.config.latent_channels
        return channels

    def _multiple(self) -> int:
        """Of which both sides of a picture must be multiples, pixels."""
        return self._factor * self._patch

    def _largest_side(self) -> int:
        """How long a side of a picture may be, pixels."""
        return LARGEST_SIDE

    def _trained_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        side: int = self._pipeline.default_sample_size * self._factor
        return side, side

    def _take_shape(self, size: tuple[int, int]) -> None:
        """Work with pictures of this (height, width), and with the grid that follows from it."""
        height, width = (side // self._factor for side in size)
        self.image_size = size
        self.latent_shape = (self._channels, height, width)
        self._grid = (height // self._patch, width // self._patch)
        self.word_grids = () if "attention" in self.lacks else (self._grid,)
        self.pixel_grids = () if "similarity" in self.lacks else (self._grid,)

    def for_picture(self, height: int, width: int) -> Self:
        """See ``protocols.ShapedBackbone``. The weights are shared: neither changes them."""
        if self._settings.image_size:
            return self
        multiple, largest = self._multiple(), self._largest_side()
        native = self.image_size
        shape = shape_for((width, height), native, multiple)
        while max(shape) > largest:
            native = (native[0] - multiple, native[1] - multiple)
            shape = shape_for((width, height), native, multiple)
        shaped = copy.copy(self)
        shaped._take_shape(shape)
        return shaped

    # --- What a family says ---------------------------------------------------------------------------------------

    @abstractmethod
    def token_positions(self, prompt: str, words: Sequence[str], tokens: Tokens = NO_TOKENS) -> list[list[int]]:
        """See ``protocols.Backbone``: positions in the part "sequence"."""

    @abstractmethod
    def _transform(self, noisy: Tensor, sigmas: Tensor, prompts: Conditioning) -> Tensor:
        """One pass of the transformer: the flow, noise minus picture.

        Args:
            noisy: ``[B, C, h, w]`` in the transformer's number format; h and w need not be ``latent_shape``'s.
            sigmas: how much of each is noise, float32 ``[B]`` in [0, 1].
            prompts: in float32, to be brought to the transformer's number format.

        Returns:
            ``[B, C, h, w]``.
        """

    @abstractmethod
    def _seeing(self, words: bool, pixels: bool, length: int) -> AbstractContextManager[Callable[[], Seen]]:
        """Let the transformer keep its attention until the block ends; it must change nothing of what is computed.

        Args:
            words: whether it is asked where positions of the prompt are looked for. Never where ``lacks`` has it.
            pixels: whether it is asked what places look at. Never where ``lacks`` has it.
            length: positions of the prompt.

        Yields:
            A function that says, after a pass, what was seen in it.
        """

    # --- Noise ----------------------------------------------------------------------------------------------------

    def _check_schedule(self, named: str) -> None:
        """Refuse a scheduler that is not the family's: its times would mean something else.

        Raises:
            InputError: it is.
        """
        schedule = self._pipeline.scheduler
        kind = type(schedule).__name__
        if kind not in self.schedulers:
            raise InputError(f"{named}: its scheduler is {kind}; supported is {' or '.join(self.schedulers)}")
        if schedule.config.get("invert_sigmas"):
            raise InputError(f"{named}: its scheduler has invert_sigmas = true, which is another family's")
        if not schedule.config.get("use_dynamic_shifting"):
            shift = self._shift()
            if not (isinstance(shift, int | float) and 0 < shift < math.inf):
                raise InputError(f"{named}: its scheduler's shift is {shift!r}; it should be a number above 0")

    def _shift(self) -> float:
        """By which the noise schedule is shifted, for pictures of ``image_size``: see ``shifted``."""
        config = self._pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            return dynamic_shift(config, self._grid[0] * self._grid[1])
        shift: float = config.shift
        return shift

    def _sigmas(self, shares: Tensor) -> Tensor:
        """How much is noise at shares of the schedule: float32 ``[B]``."""
        return shifted(shares.to(self.device, torch.float32), self._shift())

    def share_of(self, sigma: float) -> float:
        """The share of the schedule at which so much of a picture, 0 to 1, is noise."""
        return unshifted(sigma, self._shift())

    def add_noise(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The straight line from a picture to noise:  (1 - sigma) x + sigma e."""
        sigmas = self._sigmas(shares).to(latents.device)[:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise

    def training_target(self, latents: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The flow: the direction of the line, e - x, whatever the share."""
        return noise - latents

    # --- Prediction -----------------------------------------------------------------------------------------------

    def predict(self, noisy: Tensor, shares: Tensor, prompts: Conditioning, look: Look | None = None) -> Prediction:
        """See ``protocols.Backbone``; the output has the shape and dtype of ``noisy``.

        Raises:
            InputError: attention is asked for that this family does not have.
        """
        look = look or Look()
        for asked, capability in ((look.words, "attention"), (look.pixels, "similarity")):
            if asked and capability in self.lacks:
                raise InputError(f"models of {self.family.name} tell nothing of {capability}")
        words, pixels = nearest_grids(self.word_grids, look.words), nearest_grids(self.pixel_grids, look.pixels)
        if not (words or pixels):
            return Prediction(self._predicted(noisy, shares, prompts))
        length = prompts.parts["sequence"].shape[1]
        with self._seeing(bool(words), bool(pixels), length) as seen:
            output = self._predicted(noisy, shares, prompts)
            of_words, of_pixels = seen()
        maps: dict[str, tuple[Tensor, ...]] = {}
        if words and of_words is not None:
            maps["words"] = (of_words.transpose(1, 2).unflatten(2, self._grid),)
        if pixels and of_pixels is not None:
            weights = of_pixels / of_pixels.sum(dim=-1, keepdim=True)
            maps["pixels"] = (weights.unflatten(2, self._grid).unflatten(1, self._grid),)
        return Prediction(output, Attention(**maps))

    def _predicted(self, noisy: Tensor, shares: Tensor, prompts: Conditioning) -> Tensor:
        self._parts.use("transformer")
        output = self._transform(noisy.to(self.transformer.dtype), self._sigmas(shares), prompts)
        self._check_output(output)
        return output.to(noisy.dtype)

    @torch.no_grad()
    def _try_out(self, named: str) -> None:
        """Send the smallest picture there is through all parts, once: what does not fit together shows here.

        Raises:
            InputError: it does not.
            RunError: it gives NaN or infinity.
        """
        small = copy.copy(self)
        small._take_shape((self._multiple(), self._multiple()))
        noisy = torch.zeros(1, *small.latent_shape, device=self.device)
        look = Look(words=(1,) if small.word_grids else (), pixels=(1,) if small.pixel_grids else ())
        with self._trying_out(named):
            encoded = self.encode_prompts(["a cup"])
            output = small.predict(noisy, torch.ones(1, device=self.device), encoded, look).output
            latents = small.encode_images(small.decode_latents(noisy))
        self._check_shapes(named, noisy, output, latents)

    @contextmanager
    def fine_tuned(self, trained: Trained, rank: int, generator: torch.Generator) -> Iterator[Tuned]:
        """See ``protocols.Backbone``: the transformer, or a LoRA adapter on its attention's projections."""
        options: Any = {"targets": self.projections, "folder": "transformer"}
        with (
            self._parts.pinned("transformer"),
            fine_tuned(self.transformer, trained, rank, generator, **options) as tuned,
        ):
            yield tuned

    def _sampler(self) -> Any:
        """A scheduler like the pipeline's own, for ``_sampling_pipeline``."""
        schedule = self._pipeline.scheduler
        return type(schedule).from_config(schedule.config)


class KLTransformerBackbone(KLPipelineBackbone, TransformerBackbone):
    """A diffusion transformer on the latents of diffusers' ``AutoencoderKL``."""
