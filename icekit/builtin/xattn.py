"""The segmentor of ICE's article: which pixels the diffusion model looks at when it reads the word.

The image is noised a little, its noise predicted once with the word and some rivals as prompt, and the cross-attention
of the word read off: normalised over space, sharpened by propagation through self-attention, set against its rivals'
(ICE, Cendra and Han, CVPR 2025; prompt and timestep as in its published implementation), and last brought to the
image's own edges by ``mask_refinement``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from icekit.builtin.mask_refinement import refine, without_islands
from icekit.protocols import Backbone, ComponentSettings, InputError, View

Normalisation = Literal["minmax", "max", "l2"]
Competition = Literal["ratio", "softmax", "argmax", "none"]


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class CrossAttentionSegmentor:
    """A word's mask from the backbone's attention, without training.

    Raises:
        InputError: a prompt without ``{word}``, or attention resolutions that the backbone does not have.
    """

    class Settings(ComponentSettings):
        """Settings of the ``xattn`` segmentor."""

        prompt: str = Field("{word} things background", description="the word and its rivals")
        look_at: Literal["image", "rest"] = Field(
            "image", description="the whole image, or only the rest of it with found concepts filled in"
        )
        timestep: Annotated[tuple[float, ...], BeforeValidator(_one_or_more)] = Field(
            (0.15,), min_length=1, description="how noisy, 0 to 1 of the noise schedule; several are averaged"
        )
        draws: int = Field(4, ge=1, description="draws of the noise that are averaged, for each timestep")
        cross_resolutions: Annotated[tuple[int, ...] | None, BeforeValidator(_one_or_more)] = Field(
            None, description="attention grids the word is read on; none: those of 16 and 32, or else the largest"
        )
        self_resolution: int | None = Field(
            None, ge=1, description="attention grid the map is propagated on; none: the largest up to 32"
        )
        places: Annotated[tuple[Literal["down", "mid", "up"], ...], BeforeValidator(_one_or_more)] = Field(
            ("down", "mid", "up"), min_length=1, description="parts of the UNet whose attention is averaged"
        )
        normalisation: Normalisation = Field(
            "minmax", description="of each prompt word's map over space, before the words are compared"
        )
        propagation: int = Field(1, ge=0, description="how often the maps are propagated through self-attention")
        competition: Competition = Field("ratio", description="how the word's map is set against its rivals'")
        temperature: float = Field(
            0.5, gt=0, description="of the competition: small and the largest map takes all, large and all share"
        )
        threshold: float | Literal["otsu"] = Field(
            0.42, description="share of the map's maximum that is the word's, or otsu: chosen by the map's histogram"
        )
        one_piece: bool = Field(
            False,
            description="keep one connected part, that with the most attention: for scenes of separate things",
        )
        refinement: bool = Field(True, description="let the mask's edges follow the image's")
        foreground: float = Field(0.7, ge=0, le=1, description="refinement learns the object's colours above this")
        background: float = Field(0.2, ge=0, le=1, description="refinement learns its surroundings' colours below this")
        colour_weight: float = Field(0.5, ge=0, description="refinement: how much colour counts")
        map_weight: float = Field(2.0, ge=0, description="refinement: how much the attention map counts")
        smoothness: float = Field(10.0, gt=0, description="refinement: how far it averages between edges")
        min_island: float = Field(0.1, ge=0, lt=1, description="islands and holes below this share of the mask go")

        @field_validator("prompt")
        @classmethod
        def _has_word(cls, prompt: str) -> str:
            if prompt.count("{word}") != 1:
                raise ValueError("a text with {word} in it, once")
            return prompt

        @field_validator("timestep")
        @classmethod
        def _in_schedule(cls, timesteps: tuple[float, ...]) -> tuple[float, ...]:
            if not all(0 <= timestep <= 1 for timestep in timesteps):
                raise ValueError("0 to 1")
            return timesteps

        @field_validator("threshold")
        @classmethod
        def _is_share(cls, threshold: float | str) -> float | str:
            if isinstance(threshold, float) and not 0 < threshold < 1:
                raise ValueError("between 0 and 1, or otsu")
            return threshold

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        self.settings = settings
        self._backbone = backbone
        offered = backbone.attention_resolutions
        self._cross = settings.cross_resolutions or tuple(r for r in offered if 16 <= r <= 32) or (max(offered),)
        self._self = settings.self_resolution or max((r for r in offered if r <= 32), default=min(offered))
        named = {"cross_resolutions": self._cross, "self_resolution": (self._self,)}
        for name, resolutions in named.items():
            for resolution in resolutions:
                if resolution not in offered:
                    choices = ", ".join(str(one) for one in offered)
                    raise InputError(f"segmentor.{name}: {resolution} is none of the backbone's grids: {choices}")

    @torch.no_grad()
    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """The word's mask, bool ``[H, W]`` on the CPU, within what is visible; all False when nothing is."""
        soft = self.soft_map(view, word, generator)
        if not bool((soft > 0).any()):
            return torch.zeros_like(view.visible)
        settings = self.settings
        level = otsu(soft, view.visible) if settings.threshold == "otsu" else float(settings.threshold)
        if settings.one_piece:
            soft = soft * heaviest_part(soft, level)
        if settings.refinement:
            mask = refine(
                soft,
                self._looked_at(view),
                level=level,
                foreground=settings.foreground,
                background=settings.background,
                colour_weight=settings.colour_weight,
                map_weight=settings.map_weight,
                smoothness=settings.smoothness,
                min_island=settings.min_island,
            )
        else:
            mask = torch.from_numpy(without_islands((soft >= level).numpy(), settings.min_island))
        return mask & view.visible

    @torch.no_grad()
    def soft_map(self, view: View, word: str, generator: torch.Generator) -> Tensor:
        """How much each pixel is the word's, before any threshold: float32 ``[H, W]`` in [0, 1], 0 where erased."""
        settings, grid = self.settings, self._self
        prompt = settings.prompt.format(word=word)
        own = {part.lower() for part in word.split()}
        rivals = [part for part in settings.prompt.replace("{word}", " ").split() if part.lower() not in own]
        cross, self_attention = self._attention(self._looked_at(view), prompt, [word, *rivals], generator)

        visible = F.interpolate(view.visible.float()[None, None], size=(grid, grid), mode="area").flatten()
        maps = propagate(cross.flatten(1), self_attention, settings.propagation)
        maps = normalise_over_space(maps, settings.normalisation, visible > 0.5)
        soft = compete(maps, settings.competition, settings.temperature)
        size = (int(view.visible.shape[0]), int(view.visible.shape[1]))
        soft = upsample(soft.reshape(1, grid, grid), size)
        # The softmax over the prompt leaves every word some attention everywhere: the least of it means "not here".
        return normalise_over_space(soft.flatten(1), "minmax", view.visible.flatten()).reshape(size)

    def _looked_at(self, view: View) -> Tensor:
        return view.original if self.settings.look_at == "image" else view.pixels

    def _attention(
        self, image: Tensor, prompt: str, words: Sequence[str], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Attention at the image, mean over timesteps and draws of the noise; on the CPU.

        Returns:
            cross: float32 ``[T, r, r]``, one map a word, mean over its tokens and the resolutions.
            self_attention: float32 ``[r * r, r * r]``.
        """
        backbone, grid = self._backbone, self._self
        positions = backbone.token_positions(prompt, words)
        conditioning = backbone.encode_prompts([prompt])
        latents = backbone.encode_images(image[None].to(backbone.device))
        cross, self_attention, passes = torch.zeros(len(words), grid, grid), torch.zeros(grid**2, grid**2), 0
        with backbone.capture_attention(cross=self._cross, self_=(grid,), places=self.settings.places) as maps:
            for share in self.settings.timestep:
                step = min(round(share * backbone.num_timesteps), backbone.num_timesteps - 1)
                timesteps = torch.tensor([step], device=backbone.device)
                for _ in range(self.settings.draws):
                    noise = torch.randn(latents.shape, generator=generator).to(latents)
                    backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
                    for resolution in self._cross:
                        tokens = maps.cross(resolution)[0].float().cpu()
                        of_words = torch.stack([tokens[places].mean(dim=0) for places in positions])
                        cross += upsample(of_words, (grid, grid)) / len(self._cross)
                    self_attention += maps.self_(grid)[0].float().cpu()
                    passes += 1
        return cross / passes, self_attention / passes


def propagate(cross: Tensor, self_attention: Tensor, steps: int) -> Tensor:
    """Give every pixel the mean of what the pixels it attends to have:  c <- A c, ``steps`` times.

    Pixels of one object attend to one another, so a map that is high on a part of the object spreads over all of it.

    Args:
        cross: c, ``[T, n]``, one map a row.
        self_attention: A, ``[n, n]``, row i are the weights of query i and sum to one.
        steps: 0 changes nothing.

    Returns:
        ``[T, n]``.
    """
    for _ in range(steps):
        cross = cross @ self_attention.T
    return cross


def normalise_over_space(maps: Tensor, how: Normalisation, visible: Tensor) -> Tensor:
    """Make the maps of different words comparable: a frequent word gets more attention everywhere.

    ``max``: c / max c. ``minmax``: (c - min c) / (max c - min c). ``l2``: c / ||c||_2. The statistics are those of the
    visible pixels, and all others become 0. A constant map becomes 0 under ``minmax``, a zero map stays zero.

    Args:
        maps: c >= 0, ``[T, n]``.
        how: see above.
        visible: bool ``[n]``.

    Returns:
        ``[T, n]`` in [0, 1].
    """
    if not bool(visible.any()):
        return torch.zeros_like(maps)
    seen = maps[:, visible]
    lowest = seen.amin(dim=1, keepdim=True) if how == "minmax" else torch.zeros_like(seen[:, :1])
    seen = seen - lowest
    size = seen.norm(dim=1, keepdim=True) if how == "l2" else seen.amax(dim=1, keepdim=True)
    out = torch.zeros_like(maps)
    out[:, visible] = seen / size.clamp_min(torch.finfo(maps.dtype).tiny)
    return out


def compete(maps: Tensor, how: Competition, temperature: float) -> Tensor:
    """The first word's map where it is not a rival's:  c_0 * share_0.

    ``ratio``: share_0 = c_0^(1/tau) / sum_k c_k^(1/tau), which does not depend on a common scale. ``softmax``:
    share_0 = softmax(c / tau)_0. ``argmax``: share_0 = 1 where c_0 is the largest, 0 elsewhere. ``none``: share_0 = 1.

    Args:
        maps: c, ``[T, ...]`` in [0, 1], the word first.
        how: see above.
        temperature: tau > 0.

    Returns:
        ``[...]`` in [0, 1].
    """
    own = maps[0]
    if how == "none" or len(maps) == 1:
        return own
    if how == "argmax":
        return own * (own >= maps[1:].amax(dim=0))
    scores = maps / temperature
    if how == "ratio":  # c^(1/tau) = exp(log(c) / tau); a log of zero is kept finite, for 0 / 0 has no share at all
        scores = maps.clamp_min(1e-12).log() / temperature
    return own * scores.softmax(dim=0)[0]


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear (antialiased when it gets smaller): ``[T, r, r]`` -> ``[T, H, W]``."""
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def heaviest_part(soft: Tensor, level: float) -> Tensor:
    """The connected part of ``soft >= level`` with the largest sum; neighbours are left, right, above and below.

    Args:
        soft: float ``[H, W]`` in [0, 1].
        level: a share of its maximum.

    Returns:
        bool ``[H, W]``: that part and all that is below ``level``, so that only the other parts are left out.
    """
    from scipy import ndimage

    labels, count = ndimage.label((soft >= level).numpy())
    if count == 0:
        return torch.ones_like(soft, dtype=torch.bool)
    sums = ndimage.sum_labels(soft.numpy(), labels, index=range(1, count + 1))
    return torch.from_numpy((labels == 0) | (labels == 1 + int(sums.argmax())))


def otsu(soft: Tensor, visible: Tensor) -> float:
    """Otsu's threshold of the visible part of a soft map ``[H, W]``: the least variance within both of its sides."""
    from skimage.filters import threshold_otsu

    return float(threshold_otsu(soft[visible].numpy()))
