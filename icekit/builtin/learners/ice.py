"""ICE's structured concept learning (Cendra and Han, CVPR 2025): new tokens for concepts and intrinsic attributes.

Per concept a category token, an instance token and one token per attribute are learned; the model stays frozen.

    L = L_recon + attention_weight * L_attention + weight * L_triplet

Phase "object", prompts of "<instance> <category>": category and instance are learned with the object triplet. Phase
"attributes", prompts of "<category> <attribute 1> <attribute 2> ...": attribute tokens start from the learned instance
token (or from the region's hints, as the instance does then) and are learned with the intrinsic triplet, the category
frozen. Phase "refine", if asked for: the noise predictor itself, by a LoRA adapter or as a whole, with prior
preservation, the tokens frozen unless ``refine_rows`` has those of the attributes go on. By
default all concepts are learned in every step, one element of the batch each, and as if each were alone: losses are
summed, gradients clipped and moments kept by concept. ICE's published code draws one concept a step and trains all
tokens as rows of one parameter (``concepts_per_step``, ``optimizer``); the preset ``published`` has all that it does.
Before all of them there can be a phase "words", in which the denoising loss weighs each attribute's words against one
another; tokens then start from these. And in place of the whole image tokens can learn from close-ups of their concept.
Only refinement needs prior images: they contain no new token, so that while embeddings alone are trained their gradient
is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from icekit.learning.close_ups import close_ups
from icekit.learning.denoising import (
    Shares,
    coverage,
    latent_mask,
    masked_denoising_loss,
    nearest_mask,
    offset_noise,
    timestep_density,
)
from icekit.learning.fine_tuning import Weights
from icekit.learning.hints import hinted_row
from icekit.learning.prior import PriorSettings, kept_prior, prior_loss
from icekit.learning.training import Group, Losses, Task, TaskLearner, Trainer
from icekit.learning.triplet import IntrinsicForm, intrinsic_triplet, object_triplet
from icekit.learning.wasserstein import wasserstein_distance
from icekit.learning.word_posterior import Mixture, WordPosterior, signal_to_noise
from icekit.protocols import (
    AttentionMaps,
    Attribute,
    Backbone,
    InputError,
    Learned,
    PosteriorBackbone,
    Region,
    token_names,
)
from icekit.randomness import seeded_generator

REFINE_LEARNING_RATES: dict[Weights, float] = {"lora": 1e-4, "all": 2e-6}
"""AdamW's learning rate of refinement by what is fine-tuned, where none is set."""
LEAST_HINT = 1e-3
"""A word that the retriever thinks less likely than this is still tried."""


class IceSettings(PriorSettings):
    """Settings of ``IceLearner``; numbers are the paper's by default. "Published" below is what its code does."""

    steps: int = Field(800, ge=2, description="learning steps of both phases together; the first half is phase one")
    word_steps: int = Field(
        0,
        ge=0,
        description="steps before these, in which each attribute's words are weighed by the denoising loss under them; "
        "attribute tokens and the instance then start from the words that win (paper: none)",
    )
    word_draws: int = Field(2, ge=1, description="noises and pictures that all words are tried on in such a step")
    word_rate: float = Field(
        0.25,
        gt=0,
        description="how fast words win: what a loss of one standard deviation adds to their logarithms; the "
        "slower, the more counts what the retriever saw (describe)",
    )
    word_sharpness: float = Field(
        3.0,
        ge=1,
        description="when words were weighed, their logarithms are multiplied by this: the mean of two words' rows "
        "paints neither",
    )
    word_timestep_range: Shares = Field(
        (0.1, 0.85), description="share of the noise schedule that these steps are drawn from, uniformly"
    )
    instance_start: Literal["mean", "sum"] = Field(
        "mean",
        description="where an instance starts whose attributes' words are known, weighed or seen by the retriever: the "
        "mean of the attributes' rows, or their sum, in which each word is as strong as in a phrase",
    )
    close_ups: int = Field(
        0,
        ge=0,
        description="how many crops around each concept, other concepts taken out, its tokens learn from in place of "
        "the whole image: a token cannot become a place then; 0: the whole image (paper)",
    )
    close_up_zoom: tuple[float, float] = Field(
        (1.4, 2.0), description="a crop's side, in sides of the concept's bounding box: drawn between these two"
    )
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
    timestep_range: Shares = Field(
        (0.0, 1.0), description="share of the noise schedule that steps are drawn from; paper: all of it"
    )
    concepts_per_step: Literal["all", "one"] = Field(
        "all",
        description="whose losses a step is of: all concepts', or one's that is drawn, so that all concepts share the "
        "steps (published: one)",
    )
    optimizer: Literal["each", "one"] = Field(
        "each",
        description="each: a concept learns as if it were alone, its gradient clipped by itself, and AdamW starts anew "
        "with phase two; one: all tokens are rows of one parameter, clipped together, moved on by their momentum in "
        "steps that are not theirs, and phase two goes on with phase one's AdamW (published)",
    )
    intrinsic_form: IntrinsicForm = Field(
        "pairs",
        description="pairs: the intrinsic triplet is a mean over all pairs of a concept's tokens; tokens: a sum over "
        "tokens of means over their rivals, the category no rival of an attribute (published)",
    )
    attribute_anchor: str = Field(
        "{}", description="anchor text of an attribute, {} is the attribute's own; paper: 'a {} concept'"
    )
    pooling: Literal["end", "highest"] = Field(
        "end",
        description="where the triplets read a text's embedding: at its end, or at its highest token id, which is a "
        "new token itself and the end of a plain text (published: highest)",
    )
    word_row: Literal["mean", "first"] = Field(
        "mean",
        description="where a token that starts from a word in several pieces starts: their mean, or the first "
        "(published)",
    )
    latents: Literal["mean", "sample"] = Field(
        "mean",
        description="what is denoised: the mean of what the autoencoder makes of the image, or a sample of it, anew in "
        "every step (published)",
    )
    mask_cells: Literal["coverage", "nearest"] = Field(
        "coverage",
        description="a mask on the latent and attention grids: by how much of a cell it covers, or by nearest "
        "neighbour (published)",
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
        0, ge=0, description="steps of fine-tuning the noise predictor after the tokens; published: 300"
    )
    refine_weights: Weights = Field(
        "lora",
        description="what is fine-tuned: a LoRA adapter on the noise predictor's attention, or all of its weights "
        "(published), which a run then keeps as a model of its own",
    )
    refine_learning_rate: float | None = Field(
        None, gt=0, description="AdamW's learning rate of the weights; none: 1e-4 for lora, 2e-6 for all (published)"
    )
    refine_rank: int = Field(4, ge=1, description="rank of the LoRA adapter")
    refine_prompts: Literal["both", "attributes"] = Field(
        "both",
        description="what the weights learn to draw: the prompts of phase one and those of phase two, each as likely, "
        "or phase two's alone, the category with its attributes (published)",
    )
    refine_rows: Literal["none", "attributes"] = Field(
        "none",
        description="what is trained beside the weights, at the same rate: no token, or the attributes', still under "
        "the intrinsic triplet (published)",
    )

    @field_validator("attribute_anchor")
    @classmethod
    def _one_place_for_the_anchor(cls, text: str) -> str:
        if text.count("{}") != 1:
            raise ValueError(f"{text!r}: must have {{}} exactly once, where the attribute's anchor goes")
        return text

    @field_validator("close_up_zoom")
    @classmethod
    def _not_inside_the_concept(cls, zoom: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= zoom[0] <= zoom[1]:
            raise ValueError(f"{list(zoom)}: must be two numbers of 1 or more, the smaller first, such as [1.4, 2.0]")
        return zoom


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
    concepts: the places of those whose losses the step is of. spread: standard Gaussian ``[C, c, h, w]``, by which
    latents deviate from their mean; None where they are the mean. views: int64 ``[C]``, which of a concept's pictures.
    """

    timesteps: Tensor
    noise: Tensor
    flipped: Tensor
    templates: list[int]
    coins: list[bool]
    concepts: list[int]
    views: Tensor
    spread: Tensor | None = None


def tried_token(attribute: str, word: int) -> str:
    """The extra token that stands for a word of an attribute while it is tried."""
    return f"<{attribute}-word-{word}>"


class Lesson:
    """One call of ``IceLearner.learn``: what never changes in it (latents, masks, anchors), its tokens and its phases.

    C concepts, latents ``[c, h, w]``, attention loss on an r x r grid. Each concept has V pictures, the whole image or
    its close-ups, plain and mirrored: ``latents`` and ``latents_spread`` ``[C, V, 2, c, h, w]``, ``latent_masks``
    ``[C, V, 2, h, w]``, ``attention_masks`` ``[C, V, 2, r, r]``.
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

        with torch.no_grad():
            self._take_pictures(image)
            self.word_anchors = self._pooled([region.word for region in regions])  # [C, P]
            if attributes:
                texts = [settings.attribute_anchor.replace("{}", attribute.anchor) for attribute in attributes]
                anchors = self._pooled(texts).expand(len(regions), -1, -1)
                self.slot_anchors = torch.cat([self.word_anchors.unsqueeze(1), anchors], dim=1)  # [C, 1 + A, P]

        self.rows: dict[str, nn.Parameter] = {}
        for region, names in zip(regions, self.names, strict=True):
            row = self._word_row(region.word).to(backbone.device)
            self.rows |= {name: nn.Parameter(row.clone(), requires_grad=False) for name in names.values()}
        backbone.set_tokens(self.rows)
        self.mixtures: dict[str, Mixture] = {}
        self._check_prompts_fit()

    def run(self) -> Learned:
        """All phases, from where the checkpoint stands."""
        settings = self.settings
        trainer = Trainer(self.rows, settings, self.task, self.learned_by + settings.refine_steps)
        if settings.word_steps and self.attributes:
            self._weigh_words(trainer)
        if settings.attribute_rows == "words":
            self.mixtures = self._build_mixtures()
        trainer.keep({name: mixture.logits for name, mixture in self.mixtures.items()}, "logits")
        if trainer.done == self.objects_from:
            self._start_instances_from_hints()
        attributes_from = self.objects_from + self.object_steps
        together = settings.optimizer == "one"
        with self.backbone.capture_attention(cross=[self.resolution], places=("down", "up")) as maps:
            trainer.train(
                "object",
                [group for concept in range(len(self.names)) for group in self._object_groups(concept)],
                range(self.objects_from + 1, attributes_from + 1),
                lambda step: self.object_losses(step, maps),
                self.concepts_in_a_step,
                one_optimizer=together,
            )
            if self.attributes:
                if trainer.done == attributes_from:
                    self._start_attributes()
                trainer.train(
                    "attributes",
                    [group for concept in range(len(self.names)) for group in self._attribute_groups(concept)],
                    range(attributes_from + 1, self.learned_by + 1),
                    lambda step: self.attribute_losses(step, maps),
                    self.concepts_in_a_step,
                    one_optimizer=together,
                )
                self._settle_mixtures()
        return self._refine(trainer) if settings.refine_steps else Learned(self._tokens())

    def _tokens(self) -> dict[str, Tensor]:
        """The tokens' rows as they are now, on the CPU."""
        return {name: row.detach().float().cpu().clone() for name, row in self.rows.items()}

    @property
    def objects_from(self) -> int:
        """The steps before phase one."""
        return self.settings.word_steps if self.attributes else 0

    @property
    def learned_by(self) -> int:
        """The steps until phase two is over."""
        return self.objects_from + self.settings.steps

    @property
    def concepts_in_a_step(self) -> int:
        """How many concepts' losses a step is the mean of."""
        return 1 if self.settings.concepts_per_step == "one" else len(self.regions)

    def concepts_of(self, purpose: str, step: int) -> list[int]:
        """The places of the concepts whose losses a step is of: all, or one that is drawn, each as likely."""
        if self.settings.concepts_per_step == "all":
            return list(range(len(self.regions)))
        generator = seeded_generator(self.seed, f"{purpose}-concept", step)
        return torch.randint(len(self.regions), (1,), generator=generator).tolist()

    def _takes_part(self, concept: int) -> Callable[[int], bool]:
        """Whether a step of phase one or two is one of this concept."""
        return lambda step: concept in self.concepts_of("learn", step)

    def _object_groups(self, concept: int) -> list[Group]:
        """One concept's category and instance."""
        names, takes_part = self.names[concept], self._takes_part(concept)
        category, instance = ({names[kind]: self.rows[names[kind]]} for kind in ("category", "instance"))
        rate, own_rate = self.settings.learning_rate, self.settings.category_learning_rate
        if own_rate is None:
            return [Group(category | instance, rate, takes_part=takes_part)]
        return [
            Group(category, own_rate, "category_learning_rate", takes_part),
            Group(instance, rate, takes_part=takes_part),
        ]

    def _attribute_groups(self, concept: int) -> list[Group]:
        """One concept's attribute tokens: the free rows, and the weights of those that are mixtures of words.

        With one optimiser the instance is still one of its rows, though no prompt has it: it moves on by its momentum
        and the weight decay. The category is taken out: it is frozen.
        """
        names, takes_part = self.names[concept], self._takes_part(concept)
        tokens = [names[attribute.name] for attribute in self.attributes]
        free = {name: self.rows[name] for name in tokens if name not in self.mixtures}
        mixed = {name: self.mixtures[name].logits for name in tokens if name in self.mixtures}
        rate, word_rate = self.settings.learning_rate, self.settings.word_learning_rate
        groups = [
            Group(free, rate, takes_part=takes_part),
            Group(mixed, word_rate, "word_learning_rate", takes_part),
        ]
        if self.settings.optimizer == "one":
            groups.append(Group({names["instance"]: self.rows[names["instance"]]}, rate, takes_part=lambda _: False))
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

    # --- Words weighed by the denoising loss -------------------------------------------------------------------------

    def _weigh_words(self, trainer: Trainer) -> None:
        """Phase "words". The regions' hints are then what it found; those that they had are where it started."""
        known = {one.name: [word for word in one.vocabulary if self.backbone.knows(word)] for one in self.attributes}
        known = {name: words for name, words in known.items() if len(words) > 1}
        rows = {
            name: torch.stack([self._word_row(word) for word in words]).to(self.backbone.device)
            for name, words in known.items()
        }
        posteriors: dict[str, WordPosterior] = {}
        for region, names in zip(self.regions, self.names, strict=True):
            for attribute, words in known.items():
                hints = region.hints.get(attribute) or dict.fromkeys(words, 1.0)
                prior = torch.tensor([max(hints.get(word, 0.0), LEAST_HINT) for word in words])
                posteriors[names[attribute]] = WordPosterior(rows[attribute], prior)
        for kind in ("logits", "squares", "count"):
            trainer.keep({name: getattr(each, kind) for name, each in posteriors.items()}, f"words.{kind}")
        tried = {tried_token(name, n): row for name, words in rows.items() for n, row in enumerate(words)}
        trainer.repeat("words", range(1, self.objects_from + 1), lambda step: self._word_step(step, posteriors, tried))
        self.backbone.set_tokens(self.rows)
        regions, sharpness = [], self.settings.word_sharpness
        for region, names in zip(self.regions, self.names, strict=True):
            found = {
                attribute: dict(zip(words, posteriors[names[attribute]].sharpened(sharpness).tolist(), strict=True))
                for attribute, words in known.items()
            }
            regions.append(replace(region, hints={**region.hints, **found}))
        self.regions = regions

    @torch.no_grad()
    def _word_step(self, step: int, posteriors: dict[str, WordPosterior], tried: dict[str, Tensor]) -> Losses:
        """One step of phase "words": every concept's every attribute. Returns the mean loss of the likeliest words."""
        likeliest = []
        for name, posterior in posteriors.items():
            self.rows[name].data.copy_(posterior.row())
        self.backbone.set_tokens(self.rows | tried)
        for concept, names in enumerate(self.names):
            for attribute in self.attributes:
                if names[attribute.name] not in posteriors:
                    continue
                posterior = posteriors[names[attribute.name]]
                words = posterior.tried()
                generator = seeded_generator(self.seed, f"words-{names[attribute.name]}", step)
                losses = self._losses_of_words(concept, attribute, words, generator)
                likeliest.append(losses[:, int(posterior.logits[words].argmax())].mean())
                posterior.update(words, losses, self.settings.word_rate)
        return {"words": torch.stack(likeliest).mean()}  # by noise level: not to be drawn with the other phases'

    def _losses_of_words(
        self, concept: int, attribute: Attribute, words: list[int], generator: torch.Generator
    ) -> Tensor:
        """The denoising loss under each of n words, in place of the attribute's token: ``[word_draws, n]``.

        Weighed by ``signal_to_noise``: words differ about as much then at every noise level.
        """
        backbone, draws = self.backbone, self.settings.word_draws
        least, most = (share * backbone.num_timesteps for share in self.settings.word_timestep_range)
        timesteps = (least + (most - least) * torch.rand(draws, generator=generator)).long().to(backbone.device)
        noise = torch.randn(draws, *backbone.latent_shape, generator=generator).to(backbone.device)
        view = torch.randint(self.latents.shape[1], (draws,), generator=generator)
        flipped = (torch.rand(draws, generator=generator) < self.settings.flip_probability).long()
        template = int(torch.randint(len(self.settings.templates), (), generator=generator))
        own = self.names[concept][attribute.name]
        prompt = self.prompt(template, self.attribute_tokens(concept))
        prompts = [prompt.replace(own, tried_token(attribute.name, word)) for word in words]
        latents, masks = self.latents[concept, view, flipped], self.latent_masks[concept, view, flipped]
        noisy = backbone.add_noise(latents, noise, timesteps)
        target = backbone.training_target(latents, noise, timesteps)
        pairs = [(draw, word) for draw in range(draws) for word in range(len(words))]
        losses = []
        for start in range(0, len(pairs), self.settings.max_batch):
            part = pairs[start : start + self.settings.max_batch]
            of = [draw for draw, _ in part]
            prediction = backbone.predict(
                noisy[of], timesteps[of], backbone.encode_prompts([prompts[w] for _, w in part])
            )
            losses.append(masked_denoising_loss(prediction, target[of], masks[of], by_area=True))
        return torch.cat(losses).unflatten(0, (draws, -1)) * signal_to_noise(backbone, timesteps)[:, None]

    # --- Starting from words that were weighed or seen -----------------------------------------------------------

    def _hinted_row(self, region: Region, attribute: Attribute) -> Tensor | None:
        return hinted_row(region, attribute, self.backbone, pieces=self.settings.word_row)

    def _start_instances_from_hints(self) -> None:
        """An instance with hints starts as the mean, or the sum, of its attributes' words."""
        for region, names in zip(self.regions, self.names, strict=True):
            hinted = [row for one in self.attributes if (row := self._hinted_row(region, one)) is not None]
            if hinted:
                rows = torch.stack(hinted)
                start = rows.mean(dim=0) if self.settings.instance_start == "mean" else rows.sum(dim=0)
                self.rows[names["instance"]].data.copy_(start)

    # --- The phases' losses, one chunk of concepts after the other -------------------------------------------------

    def object_losses(self, step: int, maps: AttentionMaps) -> Iterator[Losses]:
        """Phase one's losses of one step."""
        draw = self.draw("learn", step)
        for chunk in self.chunks(draw.concepts):
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
        for chunk in self.chunks(draw.concepts):
            prompts = [self.prompt(draw.templates[i], self.attribute_tokens(i)) for i in chunk]
            self._mix()
            losses = self._denoising_losses(draw, chunk, prompts, maps)
            losses["triplet"] = self.intrinsic_triplet(chunk)
            yield self._total(losses, self.settings.intrinsic_triplet_weight, len(chunk))

    def intrinsic_triplet(self, chunk: list[int]) -> Tensor:
        """The intrinsic triplet of some concepts' tokens as they are now, a mean over them."""
        words = [[self.names[i][attribute.name] for attribute in self.attributes] for i in chunk]
        slots = torch.cat([self._category_pooled[chunk].unsqueeze(1), self._embed(words)], dim=1)
        settings = self.settings
        return intrinsic_triplet(self.slot_anchors[chunk], slots, settings.intrinsic_margin, settings.intrinsic_form)

    def refine_losses(
        self, step: int, maps: AttentionMaps, prior: Tensor, prior_prompts: list[str]
    ) -> Iterator[Losses]:
        """Refinement's losses of one step: each concept by one of its prompts, and as many prior images."""
        draw = self.draw("refine", step)
        generator = seeded_generator(self.seed, "prior-step", step)
        rows_too = self.refines_rows
        for chunk in self.chunks(draw.concepts):
            prompts = [self.prompt(draw.templates[i], self.refined_tokens(i, draw.coins[i])) for i in chunk]
            if rows_too:
                self._mix()
            losses = self._denoising_losses(draw, chunk, prompts, maps)
            if rows_too:
                losses["triplet"] = self.intrinsic_triplet(chunk)
            yield self._total(losses, self.settings.intrinsic_triplet_weight, len(chunk))
            if len(prior):
                chosen = torch.randint(len(prior), (len(chunk),), generator=generator)
                prompts = [prior_prompts[i] for i in chosen.tolist()]
                loss = prior_loss(self.backbone, prior[chosen], prompts, draw.timesteps[chunk], draw.noise[chunk])
                loss = loss * (len(chunk) / self.concepts_in_a_step)
                yield {"prior": loss, "total": self.settings.prior_weight * loss}

    @property
    def refines_rows(self) -> bool:
        """Whether refinement trains the attributes' tokens too."""
        return bool(self.attributes) and self.settings.refine_rows == "attributes"

    def refined_tokens(self, concept: int, coin: bool) -> str:
        """What a concept is refined with: phase two's tokens, or, by a coin, phase one's. Without attributes those."""
        phase_two = coin or self.settings.refine_prompts == "attributes"
        return self.attribute_tokens(concept) if self.attributes and phase_two else self.object_tokens(concept)

    def _denoising_losses(self, draw: Draw, chunk: list[int], prompts: list[str], maps: AttentionMaps) -> Losses:
        """L_recon and L_attention, means over the chunk."""
        timesteps, noise = draw.timesteps[chunk], draw.noise[chunk]
        pictures = (torch.tensor(chunk, device=draw.flipped.device), draw.views[chunk], draw.flipped[chunk])
        latents = self.latents[pictures]
        if draw.spread is not None:
            latents = latents + self.latents_spread[pictures] * draw.spread[chunk]
        noisy = self.backbone.add_noise(latents, noise, timesteps)
        prediction = self.backbone.predict(noisy, timesteps, self.backbone.encode_prompts(prompts))
        target = self.backbone.training_target(latents, noise, timesteps)
        reconstruction = masked_denoising_loss(prediction, target, self.latent_masks[pictures], self.settings.by_area)
        cross = maps.cross(self.resolution).float()
        positions = torch.stack([self._concept_positions(prompt, cross.shape[1]) for prompt in prompts])
        attention = torch.einsum("blhw,bl->bhw", cross, positions)
        distance = wasserstein_distance(self.attention_masks[pictures], attention)
        return {"reconstruction": reconstruction.mean(), "attention": distance.mean()}

    def _total(self, losses: Losses, triplet_weight: float, concepts: int) -> Losses:
        """Adds ``total``; all become the share of a chunk of so many concepts in a mean over the step's."""
        total = losses["reconstruction"] + self.settings.attention_weight * losses["attention"]
        if "triplet" in losses:
            total = total + triplet_weight * losses["triplet"]
        share = concepts / self.concepts_in_a_step
        return {name: loss * share for name, loss in (losses | {"total": total}).items()}

    # --- What goes into a step ---------------------------------------------------------------------------------------

    def _take_pictures(self, image: Tensor) -> None:
        """Fill ``latents``, ``latents_spread`` and both kinds of masks."""
        settings, backbone = self.settings, self.backbone
        nearest = settings.mask_cells == "nearest"
        latent_cells, attention_cells = (nearest_mask, nearest_mask) if nearest else (latent_mask, coverage)
        latents: list[Tensor] = []
        spreads: list[Tensor] = []
        latent_masks: list[Tensor] = []
        attention_masks: list[Tensor] = []
        whole = self._encode(torch.stack([image, image.flip(-1)])) if not settings.close_ups else None
        for region in self.regions:
            if whole is None:
                others = torch.zeros_like(region.mask)
                for other in self.regions:
                    others |= other.mask & (other is not region)
                generator = seeded_generator(self.seed, "close-ups", region.index)
                pictures, masks = close_ups(
                    image, region.mask, others, settings.close_ups, settings.close_up_zoom, generator
                )
                both = torch.stack([pictures, pictures.flip(-1)], dim=1).flatten(0, 1)
                parts = [self._encode(part) for part in both.split(settings.max_batch)]
                encoded = (torch.cat([mean for mean, _ in parts]), torch.cat([spread for _, spread in parts]))
            else:
                masks, encoded = region.mask[None], whole
            sides = torch.stack([masks, masks.flip(-1)], dim=1).flatten(0, 1).to(backbone.device)
            for into, values in (
                (latents, encoded[0]),
                (spreads, encoded[1]),
                (latent_masks, latent_cells(sides, backbone.latent_shape[1:])),
                (attention_masks, attention_cells(sides, self.resolution)),
            ):
                into.append(values.unflatten(0, (-1, 2)))
        self.latents, self.latents_spread = torch.stack(latents), torch.stack(spreads)
        self.latent_masks, self.attention_masks = torch.stack(latent_masks), torch.stack(attention_masks)

    def draw(self, purpose: str, step: int) -> Draw:
        """One step's random choices for all concepts, whether or not the step is one of theirs."""
        generator, count, device = seeded_generator(self.seed, purpose, step), len(self.regions), self.backbone.device
        return Draw(
            timesteps=torch.multinomial(self.density, count, replacement=True, generator=generator).to(device),
            noise=offset_noise((count, *self.backbone.latent_shape), self.settings.noise_offset, generator).to(device),
            flipped=(torch.rand(count, generator=generator) < self.settings.flip_probability).long().to(device),
            templates=torch.randint(len(self.settings.templates), (count,), generator=generator).tolist(),
            coins=(torch.rand(count, generator=generator) < 0.5).tolist(),
            concepts=self.concepts_of(purpose, step),
            spread=self._draw_spread(generator),
            views=torch.randint(self.latents.shape[1], (count,), generator=generator).to(device),
        )

    def _draw_spread(self, generator: torch.Generator) -> Tensor | None:
        if self.settings.latents == "mean":
            return None
        shape = (len(self.regions), *self.backbone.latent_shape)
        return torch.randn(shape, generator=generator).to(self.backbone.device)

    def chunks(self, concepts: Sequence[int] | None = None) -> list[list[int]]:
        """The places of these concepts, or of all, at most ``max_batch`` together."""
        places = list(range(len(self.regions)) if concepts is None else concepts)
        size = self.settings.max_batch
        return [places[start : start + size] for start in range(0, len(places), size)]

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
        return self._pooled([word for row in words for word in row]).unflatten(0, (len(words), -1))

    def _pooled(self, texts: list[str]) -> Tensor:
        """E of texts, ``[B, P]``, as the triplets read it."""
        return self.backbone.embed_texts(texts, pool=self.settings.pooling).float()

    def _word_row(self, word: str) -> Tensor:
        """The row ``[D]`` that a token starts from which starts from this word."""
        return self.backbone.word_embedding(word, pieces=self.settings.word_row).detach().float()

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[B, c, h, w]`` of images, and how far samples of them spread: zero where they are not sampled."""
        images = images.to(self.backbone.device)
        if self.settings.latents == "mean":
            latents = self.backbone.encode_images(images).float()
            return latents, torch.zeros_like(latents)
        if not isinstance(self.backbone, PosteriorBackbone):
            raise InputError("learner.latents = 'sample': this backbone has no posterior to draw from; 'mean' works")
        mean, deviation = self.backbone.posterior(images)
        return mean.float(), deviation.float()

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
            return self._pooled([names["category"] for names in self.names])

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

    def _refine(self, trainer: Trainer) -> Learned:
        """Phase three: the noise predictor, and with ``refine_rows`` the attributes' tokens beside it."""
        settings = self.settings
        steps = range(self.learned_by + 1, self.learned_by + settings.refine_steps + 1)
        prior, prior_prompts = kept_prior(self.backbone, settings, self.regions, trainer)
        rate = settings.refine_learning_rate or REFINE_LEARNING_RATES[settings.refine_weights]
        with trainer.fine_tuned(self.backbone.unet, settings.refine_weights, settings.refine_rank) as tuned:
            with self.backbone.capture_attention(cross=[self.resolution], places=("down", "up")) as maps:
                trainer.train(
                    "refine",
                    [Group(tuned.parameters | self._refined_rows(), rate, "refine_learning_rate")],
                    steps,
                    lambda step: self.refine_losses(step, maps, prior, prior_prompts),
                )
            self._settle_mixtures()
            return tuned.learned(self._tokens())

    def _refined_rows(self) -> dict[str, nn.Parameter]:
        """The attributes' tokens by name: their rows, or their words' weights; none where they are not refined."""
        if not self.refines_rows:
            return {}
        names = [concept[attribute.name] for concept in self.names for attribute in self.attributes]
        return {name: self.mixtures[name].logits if name in self.mixtures else self.rows[name] for name in names}
