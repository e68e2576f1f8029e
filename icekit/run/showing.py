"""What was learned, shown: where each token looks, images generated with it, and the same of plain words alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from icekit.attention.looking import look_at
from icekit.protocols import Attribute, Backbone, Learned, Look, Region, Tokens, object_tokens, token_names
from icekit.randomness import derived_seed, seeded_generator
from icekit.run.border import draw
from icekit.settings import Settings

ATTENTION_SHARE, ATTENTION_DRAWS = 0.15, 4
"""Where attention maps are looked at, as a share of the noise schedule, and the draws of the noise that are averaged.
The share is the published segmentor's: with more noise a token looks at what is not there yet."""
ATTENTION_CELLS = 16
"""Cells along the shorter side of the attention map that is shown, or the model's nearest to it."""


@dataclass(frozen=True)
class Sample:
    """An image to generate.

    index: its concept's. part: ``"object"`` or an attribute. number: its running number, from 0.
    words_alone: whether the prompt has plain words in place of the learned tokens.
    """

    index: int
    part: str
    number: int
    prompt: str
    words_alone: bool = False


@dataclass(frozen=True)
class Shown:
    """What ``show`` made.

    attention: (concept's index, part) -> where its token looks, float32 ``[h, w]`` with weights of at least 0.
    samples: those that were not to be skipped.
    """

    attention: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    samples: dict[Sample, Image.Image] = field(default_factory=dict)


def show(
    image: Tensor,
    regions: Sequence[Region],
    learned: Learned,
    backbone: Backbone,
    settings: Settings,
    *,
    attributes: Sequence[Attribute] = (),
    skip: Collection[Sample] = (),
    attention: bool = True,
    on_attention: Callable[[int, str, Tensor], None] = lambda index, part, weights: None,
    on_sample: Callable[[Sample, Image.Image], None] = lambda sample, image: None,
) -> Shown:
    """Show where each token looks, and generate ``planned_samples``.

    Samples of the words alone are of the same noise as their counterparts, and of the model as it was before any
    learning.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        regions: what stage one found.
        learned: what stage two made of them.
        backbone: that of the learner.
        settings: the number of samples, how they are made, and the seed.
        attributes: those that were asked for.
        skip: samples that are there already; the others are the same images with and without them.
        attention: whether it is to be shown where tokens look.
        on_attention: called with the concept's index, the part and its map.
        on_sample: called after every sample.
    """
    shown = Shown()
    for region in regions if attention else ():
        generator = seeded_generator(settings.seed, "attention", region.index)
        names = learned_tokens(region, attributes, learned.tokens)
        for part, weights in attention_maps(backbone, image, names, learned.tokens, generator).items():
            shown.attention[region.index, part] = weights
            on_attention(region.index, part, weights)
    samples = planned_samples(regions, learned.tokens, settings, attributes)
    if learned.tuning:
        batches = [[one for one in samples if not one.words_alone], [one for one in samples if one.words_alone]]
    else:
        batches = [samples]  # one model makes them all
    for batch in batches:
        there = {place for place, sample in enumerate(batch) if sample in skip}
        if len(there) == len(batch):
            continue

        def keep(place: int, picture: Image.Image, batch: Sequence[Sample] = batch) -> None:
            shown.samples[batch[place]] = picture
            on_sample(batch[place], picture)

        draw(
            ("backbone", settings.name_of("backbone")),
            backbone,
            [sample.prompt for sample in batch],
            keep,
            seeds=[derived_seed(settings.seed, "sample", one.index, one.part, one.number) for one in batch],
            tokens=learned.tokens,
            steps=settings.sample_steps,
            guidance_scale=settings.guidance_scale,
            tuning=None if batch[0].words_alone else learned.tuning,
            skip=there,
        )
    return shown


def learned_tokens(region: Region, attributes: Sequence[Attribute], tokens: Tokens) -> dict[str, str]:
    """A concept's tokens by part, as far as they were learned."""
    return {part: token for part, token in token_names(region, attributes).items() if token in tokens}


# --- Attention -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(
    backbone: Backbone, image: Tensor, names: Mapping[str, str], tokens: Tokens, generator: torch.Generator
) -> dict[str, Tensor]:
    """Where each of a concept's tokens looks: the attention on the noised image, mean over draws of the noise.

    The grid is the one that ICE's attention loss uses, 16 x 16, or the model's nearest to it.

    Args:
        backbone: the model.
        image: float32 ``[3, H, W]`` in [0, 1].
        names: part -> token.
        tokens: the rows of these, and maybe of others.
        generator: makes the noise.

    Returns:
        Part -> float32 ``[h, w]`` on the CPU, at least 0; none where the model has no attention to look at.
    """
    if not backbone.word_grids:
        return {}
    attributes = attribute_parts(names)
    prompts = {concept_prompt(names): [part for part in names if part not in attributes]}
    if attributes:
        prompts[_attributes_prompt(names)] = attributes
    maps: dict[str, Tensor] = {}
    for prompt, parts in prompts.items():
        positions = backbone.token_positions(prompt, [names[part] for part in parts], tokens)
        attention = look_at(
            backbone,
            image,
            prompt,
            Look(words=(ATTENTION_CELLS,)),
            shares=(ATTENTION_SHARE,),
            draws=ATTENTION_DRAWS,
            generator=generator,
            tokens=tokens,
        )
        for part, places in zip(parts, positions, strict=True):
            maps[part] = attention.words[0][places].mean(dim=0)
    return {part: maps[part] for part in names}


# --- Samples ---------------------------------------------------------------------------------------------------------


def planned_samples(
    regions: Sequence[Region], tokens: Tokens, settings: Settings, attributes: Sequence[Attribute]
) -> list[Sample]:
    """The samples of a run: ``settings.samples`` of each concept and each of its attributes, then the words alone.

    An attribute's token is shown on its concept's category, in the order in which both were learned, or on its word
    where no category was learned.
    """
    samples = []
    for region in regions:
        names = learned_tokens(region, attributes, tokens)
        thing = names.get("category", region.word)
        prompts = {"object": concept_prompt(names)}
        prompts |= {part: f"a photo of a {thing} {names[part]}" for part in attribute_parts(names)}
        samples += [
            Sample(region.index, part, number, prompt)
            for part, prompt in prompts.items()
            for number in range(settings.samples)
        ]
    if not settings.words_alone:
        return samples
    phrases = {region.index: words_alone(region, attributes) for region in regions}
    return samples + [replace(one, prompt=_photo_of(phrases[one.index][one.part]), words_alone=True) for one in samples]


def prompts_of(region: Region, tokens: Tokens, settings: Settings, attributes: Sequence[Attribute]) -> list[str]:
    """All prompts with which a concept is shown, each once; tokens: those that its learner learns."""
    prompts = [sample.prompt for sample in planned_samples([region], tokens, settings, attributes)]
    names = learned_tokens(region, attributes, tokens)
    return list(dict.fromkeys([*prompts, concept_prompt(names), _attributes_prompt(names)]))


def _attributes_prompt(names: Mapping[str, str]) -> str:
    """What tells where a concept's attributes are looked for; names: part -> token."""
    category = [names["category"]] if "category" in names else []
    return " ".join(["a photo of a", *category, *(names[part] for part in attribute_parts(names))])


def concept_prompt(names: Mapping[str, str]) -> str:
    """What a concept's samples are prompted with; names: part -> token."""
    return f"a photo of a {object_tokens(names)}"


def attribute_parts(names: Mapping[str, str]) -> list[str]:
    """The attributes that a concept has tokens for; names: part -> token."""
    return [part for part in names if part not in ("category", "instance")]


def words_alone(region: Region, attributes: Sequence[Attribute]) -> dict[str, str]:
    """What plain words say of a concept, without any learning: ``"object"`` or attribute -> phrase.

    A retriever that describes says which word of each attribute fits: ``{"object": "white stone bottle", "colour":
    "white bottle", "material": "stone bottle"}``. Where none did there is the concept's own word alone.
    """
    best = {name: likeliest(words, 1) for name, words in region.hints.items()}
    phrases = {one.name: " ".join([*best.get(one.name, []), region.word]) for one in attributes}
    said = [word for one in attributes for word in best.get(one.name, [])]
    return {"object": " ".join([*said, region.word])} | phrases


def likeliest(words: Mapping[str, float], count: int) -> list[str]:
    """The likeliest of a region's hints for one attribute, best first."""
    return sorted(words, key=lambda word: -words[word])[:count]


def _photo_of(phrase: str) -> str:
    return f"a photo of {'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"
