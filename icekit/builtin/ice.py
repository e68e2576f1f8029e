"""ICE's structured concept learning (Cendra and Han, CVPR 2025): new tokens for concepts and intrinsic attributes.

Per concept a category token, an instance token and one token per attribute are learned; the model stays frozen.

    L = L_recon + attention_weight * L_attention + weight * L_triplet, summed over concepts

Phase "object", prompts of "<instance> <category>": category and instance are learned with the object triplet. Phase
"attributes", prompts of "<category> <attribute 1> <attribute 2> ...": attribute tokens start from the learned instance
token and are learned with the intrinsic triplet, the category frozen. Phase "refine", if asked for: a LoRA adapter on
the noise predictor, tokens frozen, with prior preservation. All concepts are learned together, one element of the batch
each, and as if each were alone: losses are summed and gradients clipped by concept. Only refinement needs prior images:
they contain no new token, so that while embeddings alone are trained their gradient is zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from icekit.builtin.denoising import coverage, latent_mask, masked_denoising_loss, offset_noise, timestep_density
from icekit.builtin.lora import lora_adapter
from icekit.builtin.templates import PHOTO_TEMPLATES
from icekit.builtin.triplet import intrinsic_triplet, object_triplet
from icekit.builtin.wasserstein import wasserstein_distance
from icekit.protocols import (
    AttentionMaps,
    Attribute,
    Backbone,
    Checkpoint,
    ComponentSettings,
    InputError,
    Learned,
    Region,
    RunError,
    Step,
    token_names,
)

Losses = dict[str, Tensor]
"""Scalars by name; ``total`` is what is minimised."""

GRADIENT_SCALE = 1024.0
"""Losses are multiplied by this before backpropagation and gradients divided after it: in float16 the denoising loss's
gradients would underflow. A power of two, so that in float32 it changes nothing."""


class IceSettings(ComponentSettings):
    """Settings of ``IceLearner``; the defaults are the paper's."""

    steps: int = Field(800, ge=2, description="learning steps of both phases together; the first half is phase one")
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for the tokens, constant")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient of one concept's tokens")
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    object_triplet_weight: float = Field(1.0, ge=0, description="weight of the object triplet (phase one)")
    intrinsic_triplet_weight: float = Field(5e-2, ge=0, description="weight of the intrinsic triplet (phase two)")
    object_margin: float = Field(0.05, ge=0, description="margin of the object triplet")
    intrinsic_margin: float = Field(0.7, ge=0, description="factor in the margins of the intrinsic triplet")
    noise_offset: float = Field(0.1, ge=0, description="standard deviation of the noise added to whole channels")
    flip_probability: float = Field(0.5, ge=0, le=1, description="how often the image is mirrored left to right")
    by_area: bool = Field(False, description="divide a concept's denoising loss by its mask's share of the image")
    attention_resolution: int | None = Field(
        None, description="side of the attention grid of the attention loss; by default 16 or the model's nearest to it"
    )
    templates: tuple[str, ...] = Field(PHOTO_TEMPLATES, min_length=1, description="prompts, {} where the tokens go")
    max_batch: int = Field(
        4, ge=1, description="concepts learned at once; more are learned in turns, with equal result"
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between two saves of the learning state")
    refine_steps: int = Field(
        0, ge=0, description="steps of fine-tuning the noise predictor after the tokens; paper: 300"
    )
    refine_learning_rate: float = Field(
        1e-4, gt=0, description="AdamW's learning rate of the LoRA adapter (the paper tunes all weights, at 2e-6)"
    )
    refine_rank: int = Field(4, ge=1, description="rank of the LoRA adapter")
    prior_images: int = Field(64, ge=0, description="images generated to preserve the prior when refining; paper: 1000")
    prior_weight: float = Field(1.0, ge=0, description="weight of the prior-preservation loss")

    @field_validator("templates")
    @classmethod
    def _one_place_for_tokens(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r}: must have {{}} exactly once, where the tokens go")
        return templates


class IceLearner:
    """ICE's structured concept learning: a category, an instance and one token an attribute for every object."""

    Settings = IceSettings

    def __init__(self, settings: IceSettings, backbone: Backbone) -> None:
        self.settings = settings
        self.backbone = backbone

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Learn the tokens of all regions: image ``[3, H, W]`` in [0, 1], see ``protocols.Learner``.

        With no attributes all steps are phase one's.

        Raises:
            InputError: an empty mask, more attributes than fit into a prompt, or a saved state of another run.
            RunError: a loss became NaN or infinite.
        """
        if not regions:
            return Learned({})
        for region in regions:
            if not region.mask.any():
                raise InputError(
                    f"the mask of {region.word!r} (concept {region.index}) is empty: nothing can be learned"
                )
        lesson = Lesson(self.settings, self.backbone, image, regions, attributes, seed)
        return lesson.run(checkpoint, on_step)


def step_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """The randomness of one step, from the seed and the step's number alone: a resumed run draws what it would have."""
    digest = hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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


class Lesson:
    """One call of ``IceLearner.learn``: what never changes in it (latents, masks, anchors), its tokens and its phases.

    C concepts, latents ``[c, h, w]``, attention loss on an r x r grid.
    """

    def __init__(
        self,
        settings: IceSettings,
        backbone: Backbone,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        seed: int,
    ) -> None:
        self.settings, self.backbone, self.seed = settings, backbone, seed
        self.regions, self.attributes = regions, attributes
        self.names = [token_names(region, attributes) for region in regions]
        self.resolution = settings.attention_resolution or nearest_resolution(backbone.attention_resolutions)
        self.object_steps = (settings.steps + 1) // 2 if attributes else settings.steps
        self.density = timestep_density(backbone.num_timesteps)
        self._positions: dict[str, Tensor] = {}

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
        self._check_prompts_fit()

    def run(self, checkpoint: Checkpoint, on_step: Callable[[Step], None]) -> Learned:
        """All phases, from where ``checkpoint`` stands."""
        trainer = Trainer(self, checkpoint, on_step)
        trainer.restore(self.rows, "row")

        with self.backbone.capture_attention(cross=[self.resolution], places=("down", "up")) as maps:
            trainer.train(
                "object",
                [{names[kind]: self.rows[names[kind]] for kind in ("category", "instance")} for names in self.names],
                range(1, self.object_steps + 1),
                lambda step: self.object_losses(step, maps),
            )
            if self.attributes:
                if trainer.done == self.object_steps:
                    self._start_attributes_from_instances()
                trainer.train(
                    "attributes",
                    [{names[a.name]: self.rows[names[a.name]] for a in self.attributes} for names in self.names],
                    range(self.object_steps + 1, self.settings.steps + 1),
                    lambda step: self.attribute_losses(step, maps),
                )
        lora = self._refine(trainer) if self.settings.refine_steps else {}
        return Learned({name: row.detach().float().cpu().clone() for name, row in self.rows.items()}, lora)

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
                latents, timesteps, noise = prior[chosen], draw.timesteps[chunk], draw.noise[chunk]
                conditioning = self.backbone.encode_prompts([prior_prompts[i] for i in chosen.tolist()])
                noisy = self.backbone.add_noise(latents, noise, timesteps)
                prediction = self.backbone.predict(noisy, timesteps, conditioning)
                target = self.backbone.training_target(latents, noise, timesteps)
                loss = (prediction.float() - target).square().mean() * (len(chunk) / len(self.regions))
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
        if prompt not in self._positions:
            tokens = [name for name in self.rows if name in prompt]
            positions = sorted({p for found in self.backbone.token_positions(prompt, tokens) for p in found})
            weights = torch.zeros(length)
            weights[positions] = 1 / len(positions)
            self._positions[prompt] = weights.to(self.backbone.device)
        return self._positions[prompt]

    @cached_property
    def _category_pooled(self) -> Tensor:
        """E of the category tokens ``[C, P]``; constant once phase one is over."""
        with torch.no_grad():
            return self.backbone.embed_texts([names["category"] for names in self.names]).float()

    def _start_attributes_from_instances(self) -> None:
        for names in self.names:
            for attribute in self.attributes:
                self.rows[names[attribute.name]].data.copy_(self.rows[names["instance"]].data)

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
        first, count = self.settings.steps + 1, self.settings.refine_steps
        prior, prior_prompts = self._prior(trainer)
        generator = step_generator(self.seed, "lora")
        with lora_adapter(self.backbone.unet, self.settings.refine_rank, generator) as weights:
            trainer.restore(weights, "lora")
            trainer.kept |= {f"lora/{name}": weight for name, weight in weights.items()}
            with self.backbone.capture_attention(cross=[self.resolution], places=("down", "up")) as maps:
                trainer.train(
                    "refine",
                    [weights],
                    range(first, first + count),
                    lambda step: self.refine_losses(step, maps, prior, prior_prompts),
                )
            return {name: weight.detach().float().cpu().clone() for name, weight in weights.items()}

    def _prior(self, trainer: Trainer) -> tuple[Tensor, list[str]]:
        """Latents ``[N, c, h, w]`` and prompts of images of the concepts' plain words, from the untouched model."""
        generator, count = step_generator(self.seed, "prior"), self.settings.prior_images
        templates = torch.randint(len(self.settings.templates), (count,), generator=generator).tolist()
        seeds = torch.randint(2**31, (count,), generator=generator).tolist()
        prompts = [
            self.prompt(template, self.regions[n % len(self.regions)].word) for n, template in enumerate(templates)
        ]
        saved = trainer.saved.get("prior")
        if saved is None:
            latents = [torch.empty(0, *self.backbone.latent_shape, device=self.backbone.device)]
            for start in range(0, count, self.settings.max_batch):
                part = slice(start, start + self.settings.max_batch)
                images = self.backbone.generate(prompts[part], seeds=seeds[part])
                pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
                with torch.no_grad():
                    scaled = (pixels.permute(0, 3, 1, 2).float() / 255).to(self.backbone.device)
                    latents.append(self.backbone.encode_images(scaled).float())
            saved = torch.cat(latents)
        trainer.kept["prior"] = saved
        return saved.to(self.backbone.device), prompts


class Trainer:
    """The loop of a phase: steps, AdamW, clipping, and a state that goes on bit for bit from where it was saved.

    done: steps done so far, over all phases. saved: tensors of the state that was found. kept: tensors to save.
    """

    def __init__(self, lesson: Lesson, checkpoint: Checkpoint, on_step: Callable[[Step], None]) -> None:
        self.settings, self.checkpoint, self.on_step = lesson.settings, checkpoint, on_step
        self.total = lesson.settings.steps + lesson.settings.refine_steps
        self.identity: dict[str, Any] = {
            "tokens": list(lesson.rows),
            "seed": lesson.seed,
            "settings": lesson.settings.model_dump(mode="json", exclude={"checkpoint_every"}),
        }
        self.kept: dict[str, Tensor] = {f"row/{name}": row for name, row in lesson.rows.items()}
        self.saved: Mapping[str, Tensor] = {}
        self.done = 0
        found = checkpoint.load()
        if found is not None:
            self.saved, state = found
            for name, value in self.identity.items():
                if state.get(name) != value:
                    raise InputError(
                        f"the saved learning state is of a run with other {name}: start again (--overwrite)"
                    )
            self.done = int(state["step"])

    def restore(self, parameters: Mapping[str, Tensor], kind: str) -> None:
        """Take these tensors' values from the saved state, where it has them."""
        for name, parameter in parameters.items():
            if f"{kind}/{name}" in self.saved:
                parameter.data.copy_(self.saved[f"{kind}/{name}"])

    def train(
        self,
        phase: str,
        groups: Sequence[Mapping[str, nn.Parameter]],
        steps: range,
        losses_of: Callable[[int], Iterator[Losses]],
    ) -> None:
        """Train the parameters through ``steps``, as far as they are not done yet.

        groups: parameters by name; gradients are clipped group by group. In the phases of tokens a group is one
            concept's, and a loss averaged over concepts is multiplied by their number: each is learned as if alone.
        losses_of: step -> losses, chunk by chunk. They are backpropagated one by one and add up.
        """
        if self.done >= steps[-1]:
            return
        named = {name: parameter for group in groups for name, parameter in group.items()}
        refining = phase == "refine"
        optimizer = torch.optim.AdamW(
            named.values(),
            lr=self.settings.refine_learning_rate if refining else self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        self._restore_optimizer(optimizer, named)
        for parameter in named.values():
            parameter.requires_grad_(True)
        for step in range(self.done + 1, steps.stop):
            optimizer.zero_grad()
            sums: dict[str, float] = {}
            for losses in losses_of(step):
                values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
                self._check_finite(values, phase, step, refining)
                (losses["total"] * (len(groups) * GRADIENT_SCALE)).backward()
                sums = {name: sums.get(name, 0.0) + values.get(name, 0.0) for name in [*values, *sums]}
            for parameter in named.values():
                if parameter.grad is not None:
                    parameter.grad /= GRADIENT_SCALE
            for group in groups:
                nn.utils.clip_grad_norm_(group.values(), self.settings.gradient_clip)
            optimizer.step()
            self.done = step
            self.on_step(Step(step, self.total, phase, sums))
            if step % self.settings.checkpoint_every == 0 or step == steps[-1]:
                self._save(optimizer, named)
        for parameter in named.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _save(self, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        moments = {
            f"adamw.{key}/{name}": value
            for name, parameter in named.items()
            for key, value in optimizer.state[parameter].items()
        }
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in (self.kept | moments).items()}
        self.checkpoint.save(tensors, {**self.identity, "step": self.done})

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in named.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adamw.{key}/{name}" in self.saved:
                    optimizer.state[parameter][key] = self.saved[f"adamw.{key}/{name}"].to(parameter.device).clone()

    def _check_finite(self, values: Mapping[str, float], phase: str, step: int, refining: bool) -> None:
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            setting = "refine_learning_rate" if refining else "learning_rate"
            rate = getattr(self.settings, setting)
            raise RunError(
                f"the {broken[0]} loss became {values[broken[0]]} in step {step} (phase {phase}); "
                f"try a lower learner.{setting} than {rate:g}"
            )
