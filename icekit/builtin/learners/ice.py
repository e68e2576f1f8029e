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

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from icekit.builtin.learners.settings import IceSettings
from icekit.learning.crops import close_ups
from icekit.learning.denoising import masked_denoising_loss, uniform_shares
from icekit.learning.hints import hinted_token
from icekit.learning.lesson import Draw, Lesson, Pictures
from icekit.learning.prior import kept_prior, prior_loss
from icekit.learning.rows import assign, flat, weighted_sum
from icekit.learning.training import Group, Losses, Task, TaskLearner, Trainer
from icekit.learning.triplet import intrinsic_triplet, object_triplet
from icekit.learning.wasserstein import wasserstein_distance
from icekit.learning.word_posterior import Mixture, WordPosterior, signal_to_noise
from icekit.protocols import (
    Attribute,
    Backbone,
    Capability,
    InputError,
    Learned,
    PosteriorBackbone,
    Region,
    Tokens,
    Trained,
    token_names,
)
from icekit.randomness import seeded_generator

log = logging.getLogger(__name__)

REFINE_LEARNING_RATES: dict[Trained, float] = {"lora": 1e-4, "all": 2e-6}
"""AdamW's learning rate of refinement by what is fine-tuned, where none is set."""
LEAST_HINT = 1e-3
"""A word that the retriever thinks less likely than this is still tried."""


class IceLearner(TaskLearner[IceSettings]):
    """ICE's structured concept learning: a category, an instance and one token an attribute for every object.

    With no attributes all steps are phase one's. More attributes than fit into a prompt are refused.
    """

    Settings = IceSettings

    @staticmethod
    def needs_with(settings: IceSettings) -> list[Capability]:
        """What the backbone must be able to do."""
        needs: list[Capability] = ["attention"]
        if settings.refine_steps:
            needs.append("fine_tuning")
        if settings.latents == "sample":
            needs.append("posterior")
        return needs

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``."""
        if advice := getattr(self.backbone, "advice_on_rows", ""):
            log.warning("%s", advice)
        return IceLesson(self.settings, self.backbone, task).run()


@dataclass(frozen=True)
class Choices:
    """What a step draws beside its ``Draw``, one for each concept.

    concepts: the places of those whose losses the step is of. coins: which prompt to refine with. spread: standard
    Gaussian ``[C, c, h, w]``, by which latents deviate from their mean; None where they are the mean.
    """

    concepts: list[int]
    coins: list[bool]
    spread: Tensor | None


def tried_token(attribute: str, word: int) -> str:
    """The extra token that stands for a word of an attribute while it is tried."""
    return f"<{attribute}-word-{word}>"


class IceLesson(Lesson):
    """One call of ``IceLearner.learn``: its anchors, its tokens and its phases. C concepts, A attributes.

    word_anchors: E of the regions' words, ``[C, P]``. slot_anchors: with those of the attributes, ``[C, 1 + A, P]``.
    mixtures: attribute tokens that are weighted means of words.
    """

    settings: IceSettings
    prefers_noise = True

    def __init__(self, settings: IceSettings, backbone: Backbone, task: Task) -> None:
        self.offset = settings.noise_offset
        self.attributes = task.attributes
        self.names = [token_names(region, task.attributes) for region in task.regions]
        words = [backbone.word_rows(region.word, settings.word_row) for region in task.regions]
        tokens = {name: word for names, word in zip(self.names, words, strict=True) for name in names.values()}
        super().__init__(settings, backbone, task, tokens)
        self.object_steps = (settings.steps + 1) // 2 if self.attributes else settings.steps
        self.mixtures: dict[str, Mixture] = {}
        with torch.no_grad():
            self.word_anchors = self._embed([region.word for region in self.regions])
            if self.attributes:
                texts = [settings.attribute_anchor.replace("{}", attribute.anchor) for attribute in self.attributes]
                anchors = self._embed(texts).expand(len(self.regions), -1, -1)
                self.slot_anchors = torch.cat([self.word_anchors.unsqueeze(1), anchors], dim=1)
        self._check_prompts_fit()

    def run(self) -> Learned:
        """All phases, from where the checkpoint stands."""
        settings = self.settings
        trainer = self.trainer(self.learned_by + settings.refine_steps)
        if settings.word_steps and self.attributes:
            self._weigh_words(trainer)
        if settings.attribute_rows == "words":
            self.mixtures = self._build_mixtures()
        trainer.keep({name: mixture.logits for name, mixture in self.mixtures.items()}, "logits")
        if trainer.done == self.objects_from:
            self._start_instances_from_hints()
        attributes_from = self.objects_from + self.object_steps
        together = settings.optimizer == "one"
        trainer.train(
            "object",
            [group for concept in range(len(self.names)) for group in self._object_groups(concept)],
            range(self.objects_from + 1, attributes_from + 1),
            self.object_losses,
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
                self.attribute_losses,
                self.concepts_in_a_step,
                one_optimizer=together,
            )
            self._settle_mixtures()
        return self._refine(trainer) if settings.refine_steps else self.learned()

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

    @property
    def keeps_length(self) -> bool:
        """Whether the direction of a row alone is learned."""
        return self.settings.row_norm == "keep"

    def _object_groups(self, concept: int) -> list[Group]:
        """One concept's category and instance."""
        names, takes_part = self.names[concept], self._takes_part(concept)
        category, instance = (flat(self.tokens, [names[kind]]) for kind in ("category", "instance"))
        rate, own_rate = self.settings.learning_rate, self.settings.category_learning_rate
        if own_rate is None:
            return [Group(category | instance, rate, takes_part=takes_part, keeps_length=self.keeps_length)]
        return [
            Group(category, own_rate, "category_learning_rate", takes_part, self.keeps_length),
            Group(instance, rate, takes_part=takes_part, keeps_length=self.keeps_length),
        ]

    def _attribute_groups(self, concept: int) -> list[Group]:
        """One concept's attribute tokens: the free rows, and the weights of those that are mixtures of words.

        With one optimiser the instance is still one of its rows, though no prompt has it: it moves on by its momentum
        and the weight decay. The category is taken out: it is frozen.
        """
        names, takes_part = self.names[concept], self._takes_part(concept)
        tokens = [names[attribute.name] for attribute in self.attributes]
        free = flat(self.tokens, [name for name in tokens if name not in self.mixtures])
        mixed = {name: self.mixtures[name].logits for name in tokens if name in self.mixtures}
        rate, word_rate = self.settings.learning_rate, self.settings.word_learning_rate
        groups = [
            Group(free, rate, takes_part=takes_part, keeps_length=self.keeps_length),
            Group(mixed, word_rate, "word_learning_rate", takes_part),
        ]
        if self.settings.optimizer == "one":
            instance = flat(self.tokens, [names["instance"]])
            groups.append(Group(instance, rate, takes_part=lambda _: False, keeps_length=self.keeps_length))
        return [group for group in groups if group.parameters]

    # --- Attribute tokens that are mixtures of words -----------------------------------------------------------------

    def _known_words(self, attribute: Attribute) -> list[str]:
        """The words of its vocabulary that the backbone knows."""
        return [word for word in attribute.vocabulary if self.backbone.knows(word)]

    def _rows_of(self, words: list[str]) -> dict[str, Tensor]:
        """Words' rows by text encoder, ``[W, D]``."""
        tokens = [self.backbone.word_rows(word, self.settings.word_row) for word in words]
        return {
            encoder: torch.stack([token[encoder].float() for token in tokens]).to(self.backbone.device)
            for encoder in self.backbone.rows
        }

    def _prior_of(self, region: Region, attribute: str, words: list[str]) -> Tensor:
        """How likely the retriever thinks each word: ``[W]``, above zero; all alike where it was not asked."""
        hints = region.hints.get(attribute) or dict.fromkeys(words, 1.0)
        return torch.tensor([max(hints.get(word, 0.0), LEAST_HINT) for word in words])

    def _build_mixtures(self) -> dict[str, Mixture]:
        """One for each attribute token whose vocabulary has two words or more that the backbone knows."""
        mixtures: dict[str, Mixture] = {}
        for attribute in self.attributes:
            if len(words := self._known_words(attribute)) > 1:
                rows = self._rows_of(words)
                for region, names in zip(self.regions, self.names, strict=True):
                    prior = self._prior_of(region, attribute.name, words)
                    mixtures[names[attribute.name]] = Mixture(rows, prior)
        return mixtures

    @property
    def tokens_now(self) -> Tokens:
        """All tokens, those that are mixtures as their weights have them now, with their gradients."""
        return {**self.tokens, **{name: mixture.token() for name, mixture in self.mixtures.items()}}

    def _settle_mixtures(self) -> None:
        """The mixtures' rows become the tokens' own."""
        for name, mixture in self.mixtures.items():
            assign(self.tokens[name], mixture.token())

    # --- Words weighed by the denoising loss -------------------------------------------------------------------------

    def _weigh_words(self, trainer: Trainer) -> None:
        """Phase "words". The regions' hints are then what it found; those that they had are where it started."""
        known = {one.name: self._known_words(one) for one in self.attributes}
        known = {name: words for name, words in known.items() if len(words) > 1}
        rows = {name: self._rows_of(words) for name, words in known.items()}
        posteriors: dict[str, WordPosterior] = {}
        for region, names in zip(self.regions, self.names, strict=True):
            for attribute, words in known.items():
                prior = self._prior_of(region, attribute, words) ** self.settings.word_trust
                posteriors[names[attribute]] = WordPosterior(rows[attribute], prior)
        for kind in ("logits", "squares", "count"):
            trainer.keep({name: getattr(each, kind) for name, each in posteriors.items()}, f"words.{kind}")
        tried = {
            tried_token(name, n): {encoder: of[n] for encoder, of in rows[name].items()}
            for name, words in known.items()
            for n in range(len(words))
        }
        trainer.repeat("words", range(1, self.objects_from + 1), lambda step: self._word_step(step, posteriors, tried))
        sharpness = self.settings.word_sharpness
        for place, names in enumerate(self.names):
            found = {
                attribute: dict(zip(words, posteriors[names[attribute]].sharpened(sharpness).tolist(), strict=True))
                for attribute, words in known.items()
            }
            region = self.regions[place]
            self.regions[place] = replace(region, hints={**region.hints, **found})

    @torch.no_grad()
    def _word_step(self, step: int, posteriors: dict[str, WordPosterior], tried: Tokens) -> Losses:
        """One step of phase "words": every concept's every attribute. Returns the mean loss of the likeliest words."""
        likeliest = []
        for name, posterior in posteriors.items():
            assign(self.tokens[name], posterior.token())
        tokens = {**self.tokens, **tried}
        for concept, names in enumerate(self.names):
            for attribute in self.attributes:
                if names[attribute.name] not in posteriors:
                    continue
                posterior = posteriors[names[attribute.name]]
                words = posterior.tried()
                generator = seeded_generator(self.seed, f"words-{names[attribute.name]}", step)
                losses = self._losses_of_words(concept, attribute, words, tokens, generator)
                likeliest.append(losses[:, int(posterior.logits[words].argmax())].mean())
                posterior.update(words, losses, self.settings.word_rate)
        return {"words": torch.stack(likeliest).mean()}  # by noise level: not to be drawn with the other phases'

    def _losses_of_words(
        self, concept: int, attribute: Attribute, words: list[int], tokens: Tokens, generator: torch.Generator
    ) -> Tensor:
        """The denoising loss under each of n words, in place of the attribute's token: ``[word_draws, n]``.

        Weighed by ``signal_to_noise``: words differ about as much then at every noise level.
        """
        backbone, draws, pictures = self.backbone, self.settings.word_draws, self.pictures
        shares = uniform_shares(self.settings.word_timestep_range, draws, generator).to(backbone.device)
        noise = torch.randn(draws, *backbone.latent_shape, generator=generator).to(backbone.device)
        view = torch.randint(pictures.latents.shape[1], (draws,), generator=generator)
        flipped = (torch.rand(draws, generator=generator) < self.settings.flip_probability).long()
        template = int(torch.randint(len(self.settings.templates), (), generator=generator))
        own = self.names[concept][attribute.name]
        prompt = self.prompt(template, self.attribute_tokens(concept))
        conditioning = backbone.encode_prompts(
            [prompt.replace(own, tried_token(attribute.name, word)) for word in words], tokens
        )
        latents, masks = pictures.latents[concept, view, flipped], pictures.masks[concept, view, flipped]
        noisy = backbone.add_noise(latents, noise, shares)
        target = backbone.training_target(latents, noise, shares)
        losses = []
        for part in self.chunks(draws * len(words)):
            of, under = [pair // len(words) for pair in part], [pair % len(words) for pair in part]
            prediction = backbone.predict(noisy[of], shares[of], conditioning[under]).output
            losses.append(masked_denoising_loss(prediction, target[of], masks[of], by_area=True))
        return torch.cat(losses).unflatten(0, (draws, -1)) * signal_to_noise(backbone, shares)[:, None]

    # --- Starting from words that were weighed or seen ---------------------------------------------------------------

    def _hinted(self, region: Region, attribute: Attribute) -> dict[str, Tensor] | None:
        return hinted_token(region, attribute, self.backbone, pieces=self.settings.word_row)

    def _start_instances_from_hints(self) -> None:
        """An instance with hints starts as the mean, or the sum, of its attributes' words."""
        for region, names in zip(self.regions, self.names, strict=True):
            hinted = [token for one in self.attributes if (token := self._hinted(region, one)) is not None]
            if hinted:
                weight = 1 / len(hinted) if self.settings.instance_start == "mean" else 1.0
                assign(self.tokens[names["instance"]], weighted_sum(hinted, [weight] * len(hinted)))

    def _start_attributes(self) -> None:
        """From what was weighed or seen, or else from the learned instance (paper)."""
        for region, names in zip(self.regions, self.names, strict=True):
            for attribute in self.attributes:
                hinted = self._hinted(region, attribute)
                assign(self.tokens[names[attribute.name]], self.tokens[names["instance"]] if hinted is None else hinted)

    # --- The phases' losses, one chunk of concepts after the other ---------------------------------------------------

    def object_losses(self, step: int) -> Iterator[Losses]:
        """Phase one's losses of one step."""
        draw, choices = self.draw(step), self.choices("learn", step)
        for chunk in self.chunks(choices.concepts):
            losses = self._denoising_losses(draw, choices, chunk, [self.object_tokens(place) for place in chunk])
            words = [self.names[place][kind] for place in chunk for kind in ("category", "instance")]
            pooled = self._embed(words).unflatten(0, (len(chunk), -1))
            losses["triplet"] = object_triplet(
                self.word_anchors[chunk], pooled[:, 0], pooled[:, 1], self.settings.object_margin
            )
            yield self._total(losses, self.settings.object_triplet_weight, len(chunk))

    def attribute_losses(self, step: int) -> Iterator[Losses]:
        """Phase two's losses of one step."""
        draw, choices, tokens = self.draw(step), self.choices("learn", step), self.tokens_now
        for chunk in self.chunks(choices.concepts):
            phrases = [self.attribute_tokens(place) for place in chunk]
            losses = self._denoising_losses(draw, choices, chunk, phrases, tokens)
            losses["triplet"] = self.intrinsic_triplet(chunk, tokens)
            yield self._total(losses, self.settings.intrinsic_triplet_weight, len(chunk))
            tokens = self.tokens_now  # the mixtures' graph is gone with the backward pass

    def intrinsic_triplet(self, chunk: list[int], tokens: Tokens | None = None) -> Tensor:
        """The intrinsic triplet of some concepts' tokens as they are now, a mean over them."""
        words = [self.names[place][attribute.name] for place in chunk for attribute in self.attributes]
        pooled = self._embed(words, tokens).unflatten(0, (len(chunk), -1))
        slots = torch.cat([self._category_pooled[chunk].unsqueeze(1), pooled], dim=1)
        settings = self.settings
        return intrinsic_triplet(self.slot_anchors[chunk], slots, settings.intrinsic_margin, settings.intrinsic_form)

    def refine_losses(self, step: int, prior: Tensor, prior_prompts: list[str]) -> Iterator[Losses]:
        """Refinement's losses of one step: each concept by one of its prompts, and as many prior images."""
        draw, choices = self.draw(step, purpose="refine"), self.choices("refine", step)
        generator = seeded_generator(self.seed, "prior-step", step)
        for chunk in self.chunks(choices.concepts):
            tokens = self.tokens_now if self.refines_rows else self.tokens
            phrases = [self.refined_tokens(place, choices.coins[place]) for place in chunk]
            losses = self._denoising_losses(draw, choices, chunk, phrases, tokens)
            if self.refines_rows:
                losses["triplet"] = self.intrinsic_triplet(chunk, tokens)
            yield self._total(losses, self.settings.intrinsic_triplet_weight, len(chunk))
            if len(prior):
                chosen = torch.randint(len(prior), (len(chunk),), generator=generator)
                prompts = [prior_prompts[place] for place in chosen.tolist()]
                own = draw[chunk]
                loss = prior_loss(self.backbone, prior[chosen], prompts, own.shares, own.noise)
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

    def _denoising_losses(
        self, draw: Draw, choices: Choices, chunk: list[int], phrases: list[str], tokens: Tokens | None = None
    ) -> Losses:
        """L_recon and L_attention, means over the chunk; the map of a phrase is the mean over its tokens' positions."""
        own = draw[chunk]
        latents, masks, attention_masks = self.shown(chunk, own)
        if choices.spread is not None and self.pictures.spread is not None:
            pictures = (torch.tensor(chunk, device=own.views.device), own.views, own.flipped)
            latents = latents + self.pictures.spread[pictures] * choices.spread[chunk]
        prompts = [self.prompt(template, phrase) for template, phrase in zip(own.templates, phrases, strict=True)]
        prediction, target = self.denoise(latents, own, prompts, tokens, self.look)
        words = prediction.attention.words[0].float()
        attention = torch.stack(
            [
                self.attention(maps, prompt, phrase.split())
                for maps, prompt, phrase in zip(words, prompts, phrases, strict=True)
            ]
        )
        return {
            "reconstruction": self.masked_loss(prediction, target, masks).mean(),
            "attention": wasserstein_distance(attention_masks, attention).mean(),
        }

    def _total(self, losses: Losses, triplet_weight: float, concepts: int) -> Losses:
        """Adds ``total``; all become the share of a chunk of so many concepts in a mean over the step's."""
        total = losses["reconstruction"] + self.settings.attention_weight * losses["attention"]
        if "triplet" in losses:
            total = total + triplet_weight * losses["triplet"]
        share = concepts / self.concepts_in_a_step
        return {name: loss * share for name, loss in (losses | {"total": total}).items()}

    # --- What goes into a step ---------------------------------------------------------------------------------------

    def take_pictures(self) -> Pictures:
        """The whole image, or each concept's close-ups; the autoencoder's spread where latents are drawn."""
        settings, image = self.settings, self.task.image
        if not settings.close_ups:
            latents, spread = self._encode_with_spread(torch.stack([image, image.flip(-1)]))
            shape = (len(self.regions), 1, *latents.shape)
            masks = torch.stack([region.mask for region in self.regions]).unsqueeze(1)
            return self.pictures_of(
                latents.expand(shape), masks, None if spread is None else spread.expand(shape), settings.mask_cells
            )
        encoded, masks_of = [], []
        for region in self.regions:
            others = torch.zeros_like(region.mask)
            for other in self.regions:
                others |= other.mask & (other is not region)
            generator = seeded_generator(self.seed, "close-ups", region.index)
            pictures, masks = close_ups(
                image, region.mask, others, settings.close_ups, settings.close_up_zoom, generator
            )
            encoded.append(self._encode_with_spread(torch.stack([pictures, pictures.flip(-1)], dim=1).flatten(0, 1)))
            masks_of.append(masks)
        latents = torch.stack([mean.unflatten(0, (-1, 2)) for mean, _ in encoded])
        spreads = [spread.unflatten(0, (-1, 2)) for _, spread in encoded if spread is not None]
        return self.pictures_of(
            latents, torch.stack(masks_of), torch.stack(spreads) if spreads else None, settings.mask_cells
        )

    def _encode_with_spread(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents ``[N, c, h, w]`` of images, and how far samples of them spread; None where they are not sampled."""
        if self.settings.latents == "mean":
            return self.encode(images), None
        if not isinstance(self.backbone, PosteriorBackbone):
            raise InputError("learner.latents = 'sample': this backbone has no posterior to draw from; 'mean' works")
        parts = images.to(self.backbone.device).split(self.settings.max_batch)
        means, spreads = zip(*(self.backbone.posterior(part) for part in parts), strict=True)
        return torch.cat(means).float(), torch.cat(spreads).float()

    def choices(self, purpose: str, step: int) -> Choices:
        """What a step draws beside its ``Draw``, for all concepts, whether or not the step is one of theirs."""
        generator, count = seeded_generator(self.seed, f"{purpose}-choices", step), len(self.regions)
        spread = None
        if self.settings.latents == "sample":
            shape = (count, *self.backbone.latent_shape)
            spread = torch.randn(shape, generator=generator).to(self.backbone.device)
        coins = (torch.rand(count, generator=generator) < 0.5).tolist()
        return Choices(self.concepts_of(purpose, step), coins, spread)

    def object_tokens(self, concept: int) -> str:
        """``<instance> <category>``."""
        return f"{self.names[concept]['instance']} {self.names[concept]['category']}"

    def attribute_tokens(self, concept: int, count: int | None = None) -> str:
        """``<category> <attribute 1> ...``, the first ``count`` attributes."""
        names = self.names[concept]
        return " ".join([names["category"], *(names[attribute.name] for attribute in self.attributes[:count])])

    def _embed(self, texts: list[str], tokens: Tokens | None = None) -> Tensor:
        """E of texts, ``[B, P]``, as the triplets read it."""
        pool = None if self.settings.pooling == "end" else self.settings.pooling
        return self.backbone.embed_texts(texts, self.tokens if tokens is None else tokens, pool).float()

    @cached_property
    def _category_pooled(self) -> Tensor:
        """E of the category tokens ``[C, P]``; constant once phase one is over."""
        with torch.no_grad():
            return self._embed([names["category"] for names in self.names])

    def _check_prompts_fit(self) -> None:
        concepts = range(len(self.names))

        def fit(count: int) -> bool:
            phrases = [tokens for i in concepts for tokens in (self.object_tokens(i), self.attribute_tokens(i, count))]
            try:
                self.check_fits(phrases, "too long")
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
        with trainer.fine_tuned(self.backbone, settings.refine_weights, settings.refine_rank) as tuned:
            trainer.train(
                "refine",
                [Group(tuned.parameters | self._refined_rows(), rate, "refine_learning_rate")],
                steps,
                lambda step: self.refine_losses(step, prior, prior_prompts),
            )
            self._settle_mixtures()
            return self.learned(tuning=tuned.kept())

    def _refined_rows(self) -> dict[str, nn.Parameter]:
        """The attributes' tokens by name: their rows, or their words' weights; none where they are not refined."""
        if not self.refines_rows:
            return {}
        names = [concept[attribute.name] for concept in self.names for attribute in self.attributes]
        free = flat(self.tokens, [name for name in names if name not in self.mixtures])
        return free | {name: self.mixtures[name].logits for name in names if name in self.mixtures}
