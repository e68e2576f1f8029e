"""One call of a learner that trains: regions, their tokens, the pictures they learn from, and the draws of each step.

A learner subclasses ``Lesson`` and writes its losses; ``training.Trainer`` runs them. ICE and the methods next to it
are made of the same lesson.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from icekit.learning.denoising import (
    coverage,
    draw_shares,
    latent_mask,
    masked_denoising_loss,
    nearest_mask,
    offset_noise,
    share_density,
    uniform_shares,
)
from icekit.learning.rows import finished, parameters
from icekit.learning.settings import LessonSettings
from icekit.learning.training import Task, Trainer
from icekit.model_files import check_finite
from icekit.protocols import (
    Backbone,
    FineTuning,
    Grid,
    InputError,
    Learned,
    Look,
    Prediction,
    Tokens,
    nearest_grids,
)
from icekit.randomness import seeded_generator


@dataclass(frozen=True)
class Pictures:
    """What C concepts are learned from: V pictures of each, plain and mirrored.

    latents: float32 ``[C, V, 2, c, h, w]``. spread: their standard deviation, of the same shape; None where they are
    not drawn. masks: the concept's on the latents' grid, 0 or 1, ``[C, V, 2, h, w]``. attention_masks: the same on the
    attention's grid, in [0, 1], ``[C, V, 2, r, s]``.
    """

    latents: Tensor
    masks: Tensor
    attention_masks: Tensor
    spread: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """The random choices of one step for n places; tensors on the backbone's device.

    shares: float ``[n]``, how noisy. noise: ``[n, c, h, w]``. views: int64 ``[n]``, which picture. flipped: int64
    ``[n]``, 1 where it is mirrored. templates: indices into the templates.
    """

    shares: Tensor
    noise: Tensor
    views: Tensor
    flipped: Tensor
    templates: list[int]

    def __getitem__(self, places: Sequence[int]) -> Draw:
        """The choices of some places."""
        chosen = list(places)
        return replace(
            self,
            shares=self.shares[chosen],
            noise=self.noise[chosen],
            views=self.views[chosen],
            flipped=self.flipped[chosen],
            templates=[self.templates[place] for place in chosen],
        )


class Lesson:
    """One call of a learner: C regions, their tokens' rows and their pictures.

    tokens: all extra tokens by name, rows as parameters. pictures: see ``Pictures``; by default the whole image.
    """

    offset: float = 0.0
    """Standard deviation of the noise that is added to whole channels."""
    prefers_noise: bool = False
    """Whether steps are drawn by ICE's density, which prefers noisy ones; else each share is as likely."""

    def __init__(self, settings: LessonSettings, backbone: Backbone, task: Task, tokens: Tokens) -> None:
        """Look at everything once; tokens: where they start."""
        self.settings, self.backbone, self.task = settings, backbone, task
        self.regions, self.seed = list(task.regions), task.seed
        self.tokens = parameters(tokens, backbone.device)
        self.density = share_density(*settings.timestep_range)
        grids = nearest_grids(backbone.word_grids, [settings.attention_grid])
        self.grid: Grid = grids[0] if grids else backbone.latent_shape[1:]
        self.look = Look(words=(settings.attention_grid,))
        self._positions: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        with torch.no_grad():
            self.pictures = self.take_pictures()

    # --- Pictures ----------------------------------------------------------------------------------------------------

    def take_pictures(self) -> Pictures:
        """The whole image for every concept, latents and masks; a subclass may show something else."""
        image = self.task.image
        latents = self.encode(torch.stack([image, image.flip(-1)]))
        masks = torch.stack([region.mask for region in self.regions]).unsqueeze(1)
        return self.pictures_of(latents.expand(len(self.regions), 1, *latents.shape), masks)

    def pictures_of(
        self,
        latents: Tensor,
        masks: Tensor,
        spread: Tensor | None = None,
        cells: Literal["coverage", "nearest"] = "coverage",
    ) -> Pictures:
        """Latents ``[C, V, 2, c, h, w]`` with the concepts' masks, bool ``[C, V, H, W]``, brought to both grids.

        cells: a mask on a grid: by how much of a cell it covers, or by nearest neighbour.
        """
        both = torch.stack([masks, masks.flip(-1)], dim=2).to(self.backbone.device)
        flat, shape = both.flatten(0, 2), both.shape[:3]
        on_latents, on_attention = (nearest_mask, nearest_mask) if cells == "nearest" else (latent_mask, coverage)
        return Pictures(
            latents,
            on_latents(flat, self.backbone.latent_shape[1:]).unflatten(0, shape),
            on_attention(flat, self.grid).unflatten(0, shape),
            spread,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]`` in [0, 1] -> float32 latents ``[N, c, h, w]``, ``max_batch`` at once."""
        parts = images.to(self.backbone.device).split(self.settings.max_batch)
        latents = torch.cat([self.backbone.encode_images(part).float() for part in parts])
        check_finite(latents, "backbone's autoencoder", "the model is damaged, or its number format too narrow")
        return latents

    # --- A step ------------------------------------------------------------------------------------------------------

    def trainer(self, total: int) -> Trainer:
        """The training loop, standing where the checkpoint stands; the rows are restored from it."""
        return Trainer(self.tokens, self.settings, self.task, total)

    def draw(self, step: int, count: int | None = None, purpose: str = "learn") -> Draw:
        """One step's random choices for so many places, by default one for each concept."""
        count = len(self.regions) if count is None else count
        generator, device = seeded_generator(self.seed, purpose, step), self.backbone.device
        shares = (
            draw_shares(self.density, count, generator)
            if self.prefers_noise
            else uniform_shares(self.settings.timestep_range, count, generator)
        )
        return Draw(
            shares=shares.to(device),
            noise=offset_noise((count, *self.backbone.latent_shape), self.offset, generator).to(device),
            flipped=(torch.rand(count, generator=generator) < self.settings.flip_probability).long().to(device),
            templates=torch.randint(len(self.settings.templates), (count,), generator=generator).tolist(),
            views=torch.randint(self.pictures.latents.shape[1], (count,), generator=generator).to(device),
        )

    def shown(self, concepts: Sequence[int], draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """The pictures that a draw chose for as many concepts: latents ``[n, c, h, w]`` and both kinds of masks."""
        chosen = (torch.tensor(list(concepts), device=draw.flipped.device), draw.views, draw.flipped)
        pictures = self.pictures
        return pictures.latents[chosen], pictures.masks[chosen], pictures.attention_masks[chosen]

    def denoise(
        self,
        latents: Tensor,
        draw: Draw,
        prompts: Sequence[str],
        tokens: Tokens | None = None,
        look: Look | None = None,
    ) -> tuple[Prediction, Tensor]:
        """What the noise predictor says of latents ``[n, c, h, w]`` with a draw's noise, and what it should say."""
        backbone = self.backbone
        noisy = backbone.add_noise(latents, draw.noise, draw.shares)
        conditioning = backbone.encode_prompts(prompts, self.tokens if tokens is None else tokens)
        prediction = backbone.predict(noisy, draw.shares, conditioning, look)
        return prediction, backbone.training_target(latents, draw.noise, draw.shares)

    def masked_loss(self, prediction: Prediction, target: Tensor, masks: Tensor) -> Tensor:
        """L_recon, ``[n]``, inside of masks ``[n, h, w]``, divided by their area if the settings say so."""
        return masked_denoising_loss(prediction.output, target, masks, self.settings.by_area)

    def prompt(self, template: int, phrase: str) -> str:
        """A template with the phrase in it."""
        return self.settings.templates[template].replace("{}", phrase)

    def attention(self, words: Tensor, prompt: str, tokens: Sequence[str]) -> Tensor:
        """The mean map of some tokens in one prompt's maps ``[L, h, w]``, over their positions: ``[h, w]``."""
        key = (prompt, tuple(tokens))
        if key not in self._positions:
            found = self.backbone.token_positions(prompt, tokens, self.tokens)
            self._positions[key] = sorted({position for positions in found for position in positions})
        return words[self._positions[key]].mean(dim=0)

    def chunks(self, places: int | Sequence[int]) -> list[list[int]]:
        """These places, or so many from 0 on, at most ``max_batch`` together."""
        every = list(range(places)) if isinstance(places, int) else list(places)
        size = self.settings.max_batch
        return [every[start : start + size] for start in range(0, len(every), size)]

    def check_fits(self, phrases: Iterable[str], error: str) -> None:
        """Whether each of these phrases of extra tokens fits into each template.

        Raises:
            InputError: ``error``, with the reason.
        """
        for template in self.settings.templates:
            for phrase in phrases:
                names = [word for word in phrase.split() if word in self.tokens]
                try:
                    self.backbone.token_positions(template.replace("{}", phrase), names, self.tokens)
                except InputError as reason:
                    raise InputError(f"{error}: {reason}") from None

    def learned(self, names: Iterable[str] | None = None, tuning: FineTuning | None = None) -> Learned:
        """Hand out these tokens, or all; tuning: the noise predictor, if it was trained."""
        return Learned(finished(self.tokens, names), tuning or FineTuning())
