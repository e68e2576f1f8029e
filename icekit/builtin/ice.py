"""ICE's structured concept learning (Cendra and Han, CVPR 2025): new tokens for concepts and intrinsic attributes.

Per concept a category token, an instance token and one token per attribute are learned; the model stays frozen.

    L = L_recon + attention_weight * L_attention + weight * L_triplet, summed over concepts

Phase "object", prompts of "<instance> <category>": category and instance are learned with the object triplet. Phase
"attributes", prompts of "<category> <attribute 1> <attribute 2> ...": attribute tokens start from the learned instance
token (or from the region's hints, as the instance does then) and are learned with the intrinsic triplet, the category
frozen. Phase "refine", if asked for: a LoRA adapter on the noise predictor, tokens frozen, with prior preservation. All
concepts are learned together, one element of the batch each, and as if each were alone: losses are summed and gradients
clipped by concept. Only refinement needs prior images: they contain no new token, so that while embeddings alone are
trained their gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from icekit.builtin.denoising import coverage, latent_mask, masked_denoising_loss, offset_noise, timestep_density
from icekit.builtin.prior import kept_prior, prior_loss
from icekit.builtin.training import Group, Losses, Task, TaskLearner, Trainer, TrainingSettings, step_generator
from icekit.builtin.triplet import intrinsic_triplet, object_triplet
from icekit.builtin.wasserstein import wasserstein_distance
from icekit.protocols import AttentionMaps, Attribute, Backbone, InputError, Learned, Region, token_names

LEAST_HINT = 1e-3
"""A word that the retriever thinks less likely than this is still tried."""


class IceSettings(TrainingSettings):
    """Settings of ``IceLearner``; the defaults are the paper's."""

    steps: int = Field(800, ge=2, description="learning steps of both phases together; the first half is phase one")
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for the tokens, constant")
    category_learning_rate: float | None = Field(
        None,
        gt=0,
        description="the category tokens' own; small, and they stay near their words, so that what is particular is "
        "left to the instance; none: as the others (paper)",
    )
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    object_triplet_weight: float = Field(1.0, ge=0, description="weight of the object triplet (phase one)")
    intrinsic_triplet_weight: float = Field(5e-2, ge=0, description="weight of the intrinsic triplet (phase two)")
    object_margin: float = Field(0.05, ge=0, description="margin of the object triplet")
    intrinsic_margin: float = Field(0.7, ge=0, description="factor in the margins of the intrinsic triplet")
    noise_offset: float = Field(0.1, ge=0, description="standard deviation of the noise added to whole channels")
    timestep_range: tuple[float, float] = Field(
        (0.0, 1.0), description="share of the noise schedule that steps are drawn from; paper: all of it"
    )
    attribute_rows: Literal["free", "words"] = Field(
        "free",
        description="free: an attribute token can become any row, and starts from the instance's (paper); words: it is "
        "a weighted mean of the rows of its attribute's vocabulary, and the weights are learned",
    )
    word_learning_rate: float = Field(
        0.2, gt=0, description="AdamW's learning rate of those weights (of their logarithms), constant"
    )
    by_area: bool = Field(False, description="divide a concept's denoising loss by its mask's share of the image")
    attention_resolution: int | None = Field(
        None, description="side of the attention grid of the attention loss; by default 16 or the model's nearest to it"
    )
    refine_steps: int = Field(
        0, ge=0, description="steps of fine-tuning the noise predictor after the tokens; paper: 300"
    )
    refine_learning_rate: float = Field(
        1e-4, gt=0, description="AdamW's learning rate of the LoRA adapter (the paper tunes all weights, at 2e-6)"
    )
    refine_rank: int = Field(4, ge=1, description="rank of the LoRA adapter")
    prior_images: int = Field(64, ge=0, description="images generated to preserve the prior when refining; paper: 1000")
    prior_weight: float = Field(1.0, ge=0, description="weight of the prior-preservation loss")

    @field_validator("timestep_range")
    @classmethod
    def _rising_shares(cls, shares: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= shares[0] < shares[1] <= 1:
            raise ValueError(f"{list(shares)}: must be two rising shares of the schedule, such as [0.4, 0.9]")
        return shares


class IceLearner(TaskLearner[IceSettings]):
    """ICE's structured concept learning: a category, an instance and one token an attribute for every object.

    With no attributes all steps are phase one's. More attributes than fit into a prompt are refused.
    """

    Settings = IceSettings

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``."""
        return Lesson(self.settings, self.backbone, task).run()


def nearest_resolution(resolutions: Sequence[int], wanted: int = 16) -> int:
    """The side of the attention grid nearest to ``wanted`` by ratio; of two as near, the larger."""
    return min(resolutions, key=lambda side: (abs(math.log(side / wanted)), -side))


@dataclass(frozen=True)
class Draw:
    """The random choices of one step, one of each per concept; tensors on the backbone's device.

    timesteps: int64 ``[C]``. noise: ``[C, c, h, w]``. flipped: int64 ``[C]``, 1 where the image is mirrored.
    templates: indices into the templates. coins: bools, which prompt to refine with.
    """

    timesteps: Tensor
    noise: Tensor
    flipped: Tensor
    templates: list[int]
    coins: list[bool]


class Mixture:
    """A row that is a weighted mean of words' rows: softmax(logits) @ rows.

    Such a token can say nothing but what its attribute's words say: it cannot become a copy of the instance.

    rows: float32 ``[W, D]``. logits: a parameter ``[W]``, at first the logarithms of ``weights``, float32 ``[W]``,
    above zero.
    """

    def __init__(self, rows: Tensor, weights: Tensor) -> None:
        self.rows = rows
        self.logits = nn.Parameter(weights.to(rows.device).log(), requires_grad=False)

    def row(self) -> Tensor:
        """``[D]``; gradients flow to the logits."""
        return self.logits.softmax(dim=0) @ self.rows


class Lesson:
    """One call of ``IceLearner.learn``: what never changes in it (latents, masks, anchors), its tokens and its phases.

    C concepts, latents ``[c, h, w]``, attention loss on an r x r grid.
    """

    def __init__(self, settings: IceSettings, backbone: Backbone, task: Task) -> None:
        self.settings, self.backbone, self.task = settings, backbone, task
        image, regions, attributes = task.image, task.regions, task.attributes
        self.seed, self.regions, self.attributes = task.seed, regions, attributes
        self.names = [token_names(region, attributes) for region in regions]
        self.resolution = settings.attention_resolution or nearest_resolution(backbone.attention_resolutions)
        self.object_steps = (settings.steps + 1) // 2 if attributes else settings.steps
        self.density = timestep_density(backbone.num_timesteps, *settings.timestep_range)
        self._positions: dict[tuple[str, int], Tensor] = {}

        masks = torch.stack([region.mask for region in regions]).to(backbone.device)
        sides = [masks, masks.flip(-1)]
        self.latent_masks = torch.stack([latent_mask(side, backbone.latent_shape[1:]) for side in sides])
        self.attention_masks = torch.stack([coverage(side, self.resolution) for side in sides])
        with torch.no_grad():
            self.latents = backbone.encode_images(torch.stack([image, image.flip(-1)]).to(backbone.device)).float()
            self.word_anchors = backbone.embed_texts([region.word for region in regions]).float()  # [C, P]
            if attributes:
                pooled = backbone.embed_texts([attribute.anchor for attribute in attributes]).float()
                anchors = pooled.expand(len(regions), -1, -1)
                self.slot_anchors = torch.cat([self.word_anchors.unsqueeze(1), anchors], dim=1)  # [C, 1 + A, P]

        self.rows: dict[str, nn.Parameter] = {}
        for region, names in zip(regions, self.names, strict=True):
            row = backbone.word_embedding(region.word).detach().to(backbone.device, torch.float32)
            self.rows |= {name: nn.Parameter(row.clone(), requires_grad=False) for name in names.values()}
        backbone.set_tokens(self.rows)
        self.mixtures = self._build_mixtures() if settings.attribute_rows == "words" else {}
        self._start_instances_from_hints()
        self._check_prompts_fit()

    def run(self) -> Learned:
        """All phases, from where the checkpoint stands."""
        settings = self.settings
        trainer = Trainer(self.rows, settings, self.task, settings.steps + settings.refine_steps)
        trainer.keep({name: mixture.logits for name, mixture in self.mixtures.items()}, "logits")
        with self.backbone.capture_attention(cross=[self.resolution], places=("down", "up")) as maps:
            trainer.train(
                "object",
                [group for names in self.names for group in self._object_groups(names)],
                range(1, self.object_steps + 1),
                lambda step: self.object_losses(step, maps),
                loss_scale=len(self.regions),
            )
            if self.attributes:
                if trainer.done == self.object_steps:
                    self._start_attributes()
                trainer.train(
                    "attributes",
                    [group for names in self.names for group in self._attribute_groups(names)],
                    range(self.object_steps + 1, self.settings.steps + 1),
                    lambda step: self.attribute_losses(step, maps),
                    loss_scale=len(self.regions),
                )
                self._settle_mixtures()
        lora = self._refine(trainer) if self.settings.refine_steps else {}
        return Learned({name: row.detach().float().cpu().clone() for name, row in self.rows.items()}, lora)

    def _object_groups(self, names: Mapping[str, str]) -> list[Group]:
        """One concept's category and instance: it learns as if it were alone."""
        category, instance = ({names[kind]: self.rows[names[kind]]} for kind in ("category", "instance"))
        rate, own_rate = self.settings.learning_rate, self.settings.category_learning_rate
        if own_rate is None:
            return [Group(category | instance, rate)]
        return [Group(category, own_rate, "category_learning_rate"), Group(instance, rate)]

    def _attribute_groups(self, names: Mapping[str, str]) -> list[Group]:
        """One concept's attribute tokens: the free rows, and the weights of those that are mixtures of words."""
        tokens = [names[attribute.name] for attribute in self.attributes]
        free = {name: self.rows[name] for name in tokens if name not in self.mixtures}
        mixed = {name: self.mixtures[name].logits for name in tokens if name in self.mixtures}
        rate, word_rate = self.settings.learning_rate, self.settings.word_learning_rate
        groups = [Group(free, rate), Group(mixed, word_rate, "word_learning_rate")]
        return [group for group in groups if group.parameters]

    # --- Attribute tokens that are mixtures of words -----------------------------------------------------------------

    def _build_mixtures(self) -> dict[str, Mixture]:
        """One for each attribute token whose vocabulary has two words or more that the backbone knows."""
        mixtures: dict[str, Mixture] = {}
        for attribute in self.attributes:
            words = [word for word in attribute.vocabulary if self.backbone.knows(word)]
            if len(words) > 1:
                rows = torch.stack([self.backbone.word_embedding(word).float() for word in words])
                for region, names in zip(self.regions, self.names, strict=True):
                    likely = region.hints.get(attribute.name) or dict.fromkeys(words, 1.0)
                    weights = torch.tensor([max(likely.get(word, 0.0), LEAST_HINT) for word in words])
                    mixtures[names[attribute.name]] = Mixture(rows.to(self.backbone.device), weights)
        return mixtures

    def _mix(self) -> None:
        """Hand the backbone the mixtures' rows of now, with their gradients."""
        if self.mixtures:
            self.backbone.set_tokens(self.rows | {name: mixture.row() for name, mixture in self.mixtures.items()})

    def _settle_mixtures(self) -> None:
        """The mixtures' rows become the tokens' own."""
        for name, mixture in self.mixtures.items():
            self.rows[name].data.copy_(mixture.row().detach())
        self.backbone.set_tokens(self.rows)

    # --- Starting from what the retriever saw ------------------------------------------------------------------------

    def _hinted_row(self, region: Region, attribute: Attribute) -> Tensor | None:
        """The mean of the words' rows, each as much as it is likely; None without hints."""
        hints = region.hints.get(attribute.name, {})
        if not hints:
            return None
        rows = torch.stack([self.backbone.word_embedding(word).float() for word in hints])
        return torch.tensor(list(hints.values()), device=rows.device) @ rows / sum(hints.values())

    def _start_instances_from_hints(self) -> None:
        """An instance with hints starts as the mean of its attributes' words."""
        for region, names in zip(self.regions, self.names, strict=True):
            hinted = [row for one in self.attributes if (row := self._hinted_row(region, one)) is not None]
            if hinted:
                self.rows[names["instance"]].data.copy_(torch.stack(hinted).mean(dim=0))

    # --- The phases' losses, one chunk of concepts after the other -------------------------------------------------

    def object_losses(self, step: int, maps: AttentionMaps) -> Iterator[Losses]:
        """Phase one's losses of one step."""
        draw = self.draw("learn", step)
        for chunk in self.chunks():
            prompts = [self.prompt(draw.templates[i], self.object_tokens(i)) for i in chunk]
            words = [[self.names[i]["category"], self.names[i]["instance"]] for i in chunk]
            losses = self._denoising_losses(draw, chunk, prompts, maps)
            pooled = self._embed(words)
            losses["triplet"] = object_triplet(
                self.word_anchors[chunk], pooled[:, 0], pooled[:, 1], self.settings.object_margin
            )
            yield self._total(losses, self.settings.object_triplet_weight, len(chunk))

    def attribute_losses(self, step: int, maps: AttentionMaps) -> Iterator[Losses]:
        """Phase two's losses of one step."""
        draw = self.draw("learn", step)
        for chunk in self.chunks():
            prompts = [self.prompt(draw.templates[i], self.attribute_tokens(i)) for i in chunk]
            words = [[self.names[i][attribute.name] for attribute in self.attributes] for i in chunk]
            self._mix()
            losses = self._denoising_losses(draw, chunk, prompts, maps)
            pooled = self._embed(words)
            slots = torch.cat([self._category_pooled[chunk].unsqueeze(1), pooled], dim=1)
            losses["triplet"] = intrinsic_triplet(self.slot_anchors[chunk], slots, self.settings.intrinsic_margin)
            yield self._total(losses, self.settings.intrinsic_triplet_weight, len(chunk))

    def refine_losses(
        self, step: int, maps: AttentionMaps, prior: Tensor, prior_prompts: list[str]
    ) -> Iterator[Losses]:
        """Refinement's losses of one step: each concept by one of its two prompts, and as many prior images."""
        draw = self.draw("refine", step)
        generator = step_generator(self.seed, "prior-step", step)
        for chunk in self.chunks():
            tokens = [
                self.attribute_tokens(i) if self.attributes and draw.coins[i] else self.object_tokens(i) for i in chunk
            ]
            prompts = [self.prompt(draw.templates[i], each) for i, each in zip(chunk, tokens, strict=True)]
            yield self._total(self._denoising_losses(draw, chunk, prompts, maps), 0.0, len(chunk))
            if len(prior):
                chosen = torch.randint(len(prior), (len(chunk),), generator=generator)
                prompts = [prior_prompts[i] for i in chosen.tolist()]
                loss = prior_loss(self.backbone, prior[chosen], prompts, draw.timesteps[chunk], draw.noise[chunk])
                loss = loss * (len(chunk) / len(self.regions))
                yield {"prior": loss, "total": self.settings.prior_weight * loss}

    def _denoising_losses(self, draw: Draw, chunk: list[int], prompts: list[str], maps: AttentionMaps) -> Losses:
        """L_recon and L_attention, means over the chunk."""
        flipped, timesteps, noise = draw.flipped[chunk], draw.timesteps[chunk], draw.noise[chunk]
        concepts = torch.tensor(chunk, device=flipped.device)
        latents = self.latents[flipped]
        noisy = self.backbone.add_noise(latents, noise, timesteps)
        prediction = self.backbone.predict(noisy, timesteps, self.backbone.encode_prompts(prompts))
        target = self.backbone.training_target(latents, noise, timesteps)
        reconstruction = masked_denoising_loss(
            prediction, target, self.latent_masks[flipped, concepts], self.settings.by_area
        )
        cross = maps.cross(self.resolution).float()
        positions = torch.stack([self._concept_positions(prompt, cross.shape[1]) for prompt in prompts])
        attention = torch.einsum("blhw,bl->bhw", cross, positions)
        distance = wasserstein_distance(self.attention_masks[flipped, concepts], attention)
        return {"reconstruction": reconstruction.mean(), "attention": distance.mean()}

    def _total(self, losses: Losses, triplet_weight: float, concepts: int) -> Losses:
        """Adds ``total``; all of them become the chunk's share of a mean over all concepts."""
        total = losses["reconstruction"] + self.settings.attention_weight * losses["attention"]
        if "triplet" in losses:
            total = total + triplet_weight * losses["triplet"]
        return {name: loss * (concepts / len(self.regions)) for name, loss in (losses | {"total": total}).items()}

    # --- What goes into a step ---------------------------------------------------------------------------------------

    def draw(self, purpose: str, step: int) -> Draw:
        """One step's random choices for all concepts."""
        generator, count, device = step_generator(self.seed, purpose, step), len(self.regions), self.backbone.device
        return Draw(
            timesteps=torch.multinomial(self.density, count, replacement=True, generator=generator).to(device),
            noise=offset_noise((count, *self.backbone.latent_shape), self.settings.noise_offset, generator).to(device),
            flipped=(torch.rand(count, generator=generator) < self.settings.flip_probability).long().to(device),
            templates=torch.randint(len(self.settings.templates), (count,), generator=generator).tolist(),
            coins=(torch.rand(count, generator=generator) < 0.5).tolist(),
        )

    def chunks(self) -> list[list[int]]:
        """The concepts' places, at most ``max_batch`` together."""
        places = list(range(len(self.regions)))
        return [places[start : start + self.settings.max_batch] for start in places[:: self.settings.max_batch]]

    def object_tokens(self, concept: int) -> str:
        """``<instance> <category>``."""
        return f"{self.names[concept]['instance']} {self.names[concept]['category']}"

    def attribute_tokens(self, concept: int, count: int | None = None) -> str:
        """``<category> <attribute 1> ...``, the first ``count`` attributes."""
        names = self.names[concept]
        return " ".join([names["category"], *(names[attribute.name] for attribute in self.attributes[:count])])

    def prompt(self, template: int, tokens: str) -> str:
        """A template with the tokens in it."""
        return self.settings.templates[template].replace("{}", tokens)

    def _embed(self, words: list[list[str]]) -> Tensor:
        """E of as many words for each concept: ``[B, W, P]``."""
        flat = [word for row in words for word in row]
        return self.backbone.embed_texts(flat).float().unflatten(0, (len(words), -1))

    def _concept_positions(self, prompt: str, length: int) -> Tensor:
        """Weights ``[L]`` of the mean over the positions of a prompt's extra tokens."""
        if (prompt, length) not in self._positions:
            tokens = [name for name in self.rows if name in prompt]
            positions = sorted({p for found in self.backbone.token_positions(prompt, tokens) for p in found})
            weights = torch.zeros(length)
            weights[positions] = 1 / len(positions)
            self._positions[prompt, length] = weights.to(self.backbone.device)
        return self._positions[prompt, length]

    @cached_property
    def _category_pooled(self) -> Tensor:
        """E of the category tokens ``[C, P]``; constant once phase one is over."""
        with torch.no_grad():
            return self.backbone.embed_texts([names["category"] for names in self.names]).float()

    def _start_attributes(self) -> None:
        """From what the retriever saw, or else from the learned instance (paper)."""
        for region, names in zip(self.regions, self.names, strict=True):
            for attribute in self.attributes:
                hinted = self._hinted_row(region, attribute)
                start = self.rows[names["instance"]] if hinted is None else hinted
                self.rows[names[attribute.name]].data.copy_(start.data)

    def _check_prompts_fit(self) -> None:
        def fit(count: int) -> bool:
            tokens = [self.object_tokens(i) for i in range(len(self.regions))]
            tokens += [self.attribute_tokens(i, count) for i in range(len(self.regions))]
            try:
                for template in self.settings.templates:
                    for text in tokens:
                        self.backbone.token_positions(template.replace("{}", text), text.split())
            except InputError:
                return False
            return True

        count = len(self.attributes)
        if not fit(count):
            fitting = next((fewer for fewer in range(count - 1, -1, -1) if fit(fewer)), None)
            if fitting is None:
                raise InputError("learner.templates: too long for the text encoder, no concept's tokens fit in")
            raise InputError(
                f"{count} attributes are too many: one prompt must hold a concept's category and all of its attributes,"
                f" and at most {fitting} fit"
            )

    # --- Refinement --------------------------------------------------------------------------------------------------

    def _refine(self, trainer: Trainer) -> dict[str, Tensor]:
        """Phase three: a LoRA adapter, its weights by diffusers' key on the CPU."""
        settings = self.settings
        steps = range(settings.steps + 1, settings.steps + settings.refine_steps + 1)
        prior, prior_prompts = kept_prior(
            self.backbone, self.regions, settings.templates, settings.prior_images, settings.max_batch, trainer
        )
        with trainer.adapter(self.backbone.unet, settings.refine_rank) as weights:
            with self.backbone.capture_attention(cross=[self.resolution], places=("down", "up")) as maps:
                trainer.train(
                    "refine",
                    [Group(weights, settings.refine_learning_rate, "refine_learning_rate")],
                    steps,
                    lambda step: self.refine_losses(step, maps, prior, prior_prompts),
                )
            return {name: weight.detach().float().cpu().clone() for name, weight in weights.items()}
