"""What the segmentors that read a diffusion model's attention have in common.

The image's noise is predicted, with the word and some rivals as prompt: where the model looks meanwhile is all they
know (``xattn`` reads the word's cross-attention, ``diffseg`` clusters the self-attention). The image is noised a little
for it, or only said to be. What they find on the attention grid is brought to the image's own edges by
``mask_refinement``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from torch import Tensor

from icekit.attention.refinement import Joining, heaviest_part, refine, without_islands
from icekit.protocols import Backbone, ComponentSettings, InputError, View

Normalisation = Literal["minmax", "max", "l2"]


def one_or_more(value: Any) -> Any:
    """``0.15`` -> ``[0.15]``: a setting that takes a list takes a single value, too."""
    return [value] if isinstance(value, int | float | str) else value


def _in_schedule(timesteps: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 <= timestep <= 1 for timestep in timesteps):
        raise ValueError("0 to 1")
    return timesteps


Timesteps = Annotated[
    tuple[float, ...], Field(min_length=1), BeforeValidator(one_or_more), AfterValidator(_in_schedule)
]
"""The type of a setting that says how noisy images are looked at: shares of the noise schedule, one or several."""

Resolutions = Annotated[tuple[int, ...] | None, BeforeValidator(one_or_more)]

CrossResolutions = Annotated[
    tuple[int, ...] | Literal["all"] | None,
    BeforeValidator(lambda value: value if value == "all" else one_or_more(value)),
]


class AttentionSegmentor:
    """The attention at an image, and the way from a soft map to a mask.

    Raises:
        InputError: a prompt without ``{word}``, or attention resolutions that the backbone does not have.
    """

    class Settings(ComponentSettings):
        """Settings that these segmentors share."""

        prompt: str = Field("{word} things background", description="the word and its rivals")
        look_at: Literal["image", "rest"] = Field(
            "image", description="the whole image, or only the rest of it with found concepts filled in"
        )
        timestep: Timesteps = Field(
            (0.15,), description="how noisy, 0 to 1 of the noise schedule; several are averaged"
        )
        noise: bool = Field(
            True, description="add that timestep's noise to the image; published: a clean latent, said to be that noisy"
        )
        draws: int = Field(
            4, ge=1, description="draws of the noise that are averaged, for each timestep; with noise only"
        )
        cross_resolutions: CrossResolutions = Field(
            None, description="attention grids the word is read on; all, or none: those of 16 and 32, else the largest"
        )
        cross_weights: Literal["equal", "side"] = Field(
            "equal", description="how much each of these grids counts: the same, or in proportion to its side"
        )
        places: Annotated[tuple[Literal["down", "mid", "up"], ...], BeforeValidator(one_or_more)] = Field(
            ("down", "mid", "up"), min_length=1, description="parts of the UNet whose attention is averaged"
        )
        one_piece: bool = Field(
            False,
            description="keep one peak of the attention, the heaviest: for scenes of separate things",
        )
        dip: float = Field(
            0.1, gt=0, lt=1, description="two maxima are two peaks when attention between them is lower by this share"
        )
        join: float = Field(
            0.75,
            gt=0,
            le=1,
            description="a peak that attends to the heaviest, and it to that, this much as to itself, is its own",
        )
        join_alike: float = Field(0.5, gt=0, le=1, description="the same, for a peak of the heaviest's colours")
        alike: float = Field(
            10.0, ge=0, description="colours are the same up to this mean distance to the nearest, in CIELAB's units"
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

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        self._shared = settings
        self._backbone = backbone
        offered = backbone.attention_resolutions
        chosen = tuple(offered) if settings.cross_resolutions == "all" else settings.cross_resolutions
        self._cross = chosen or tuple(r for r in offered if 16 <= r <= 32) or (max(offered),)
        self._check_offered("cross_resolutions", self._cross)

    def _check_offered(self, name: str, resolutions: Collection[int]) -> None:
        offered = self._backbone.attention_resolutions
        for resolution in resolutions:
            if resolution not in offered:
                choices = ", ".join(str(one) for one in offered)
                raise InputError(f"segmentor.{name}: {resolution} is none of the backbone's grids: {choices}")

    def _looked_at(self, view: View) -> Tensor:
        return view.original if self._shared.look_at == "image" else view.pixels

    def _rivals(self, word: str) -> list[str]:
        """The other words of the prompt, in its order."""
        own = {part.lower() for part in word.split()}
        return [part for part in self._shared.prompt.replace("{word}", " ").split() if part.lower() not in own]

    def _attention(
        self, view: View, word: str, grid: int, self_resolutions: Collection[int], generator: torch.Generator
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Attention at the image, mean over timesteps and, with noise, over its draws; on the CPU.

        Args:
            view: what there is to see.
            word: its rivals are the other words of the prompt.
            grid: side of the grid that the cross-attention is brought to.
            self_resolutions: sides of the grids whose self-attention is wanted.
            generator: makes the noise.

        Returns:
            cross: float32 ``[T, grid, grid]``, one map a word, the word itself first, then ``_rivals``: mean over its
                tokens and, weighted, over ``cross_resolutions``.
            self_attention: float32 ``[r * r, r * r]`` for every r of ``self_resolutions``.
        """
        settings, backbone = self._shared, self._backbone
        prompt = settings.prompt.format(word=word)
        positions = backbone.token_positions(prompt, [word, *self._rivals(word)])
        conditioning = backbone.encode_prompts([prompt])
        latents = backbone.encode_images(self._looked_at(view)[None].to(backbone.device))
        cross = torch.zeros(len(positions), grid, grid)
        self_attention = {r: torch.zeros(r * r, r * r) for r in self_resolutions}
        draws = settings.draws if settings.noise else 1
        passes = len(settings.timestep) * draws
        weights = {r: 1 if settings.cross_weights == "equal" else r for r in self._cross}
        with backbone.capture_attention(cross=self._cross, self_=tuple(self_attention), places=settings.places) as maps:
            for share in settings.timestep:
                step = min(round(share * backbone.num_timesteps), backbone.num_timesteps - 1)
                timesteps = torch.tensor([step], device=backbone.device)
                for _ in range(draws):
                    looked_at = latents
                    if settings.noise:
                        noise = torch.randn(latents.shape, generator=generator).to(latents)
                        looked_at = backbone.add_noise(latents, noise, timesteps)
                    backbone.predict(looked_at, timesteps, conditioning)
                    for resolution, weight in weights.items():
                        tokens = maps.cross(resolution)[0].float().cpu()
                        of_words = torch.stack([tokens[places].mean(dim=0) for places in positions])
                        cross += upsample(of_words, (grid, grid)) * (weight / sum(weights.values()))
                    for resolution, total in self_attention.items():
                        total += maps.self_(resolution)[0].float().cpu()
        return cross / passes, {resolution: total / passes for resolution, total in self_attention.items()}

    def _mask(self, soft: Tensor, level: float, view: View, self_attention: Tensor | None = None) -> Tensor:
        """From a soft map ``[H, W]`` in [0, 1] and the value that is as likely the word's as not, to the mask."""
        settings = self._shared
        image = self._looked_at(view)
        if settings.one_piece:
            joining = None
            if self_attention is not None:
                joining = Joining(self_attention, image, settings.join, settings.join_alike, settings.alike)
            soft = soft * heaviest_part(soft, level, settings.dip, joining)
        if settings.refinement:
            mask = refine(
                soft,
                image,
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


def on_grid(visible: Tensor, grid: int) -> Tensor:
    """Which cells of an attention grid are visible by more than half: bool ``[H, W]`` -> bool ``[grid * grid]``."""
    return F.interpolate(visible.float()[None, None], size=(grid, grid), mode="area").flatten() > 0.5


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear (antialiased when it gets smaller): ``[T, r, r]`` -> ``[T, H, W]``."""
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
