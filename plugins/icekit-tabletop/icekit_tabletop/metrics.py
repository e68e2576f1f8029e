"""What only the tabletop can measure: whether a learned token makes the colour, the material, the shape it stands for.

Generated images are read by the probe, a classifier that was trained on renders alone and shares nothing with the
models that made them. An object that was not found (IoU 0 with every mask, or no mask left for it) counts as wrong;
leakage leaves it out, for it has no tokens that could leak. A learner that has no token for an attribute, or none for
the category, gets no value where one is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icekit.protocols import Backbone, BenchImage, Column, FoundConcept, Match, Outcome, Score
from icekit_tabletop.probe import shipped_probe
from icekit_tabletop.settings import MetricSettings
from icekit_tabletop.train.settings import IMAGE_SIZE
from icekit_tabletop.world import COLOURS, MATERIALS, SHAPES

READABLE: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "material": tuple(MATERIALS),
}
"""What the probe reads from a picture, and the words it reads."""


class _TabletopMetric:
    """What the metrics of this module share."""

    Settings = MetricSettings

    columns: Mapping[str, Column] = {}
    needs: Collection[str] = ("masks", "words", "colour", "material")

    def __init__(self, settings: MetricSettings, backbone: Backbone) -> None:
        pass

    def prepare(self, images: Sequence[BenchImage]) -> None:
        """Nothing to prepare."""


class AttributeWords(_TabletopMetric):
    """Share of objects whose attribute token was named with the true word, by attribute."""

    columns: Mapping[str, Column] = {
        "words_colour": Column("colour tokens named with the true word"),
        "words_material": Column("material tokens named with the true word"),
        "words_texture": Column("texture tokens named with the true word"),
    }

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """The first word of every attribute that was learned."""
        scores = {}
        for attribute in ("colour", "material", "texture"):
            if attribute in outcome.attributes:
                right = [
                    float(list(match.found.words.get(attribute, ()))[:1] == [true_word(match, attribute)])
                    if match.found
                    else 0.0
                    for match in outcome.matches
                ]
                scores[f"words_{attribute}"] = Score(_mean(right))
        return scores


class AttributeImages(_TabletopMetric):
    """Share of an attribute's images, "a photo of a <category> <attribute>", in which the probe reads the true one."""

    columns: Mapping[str, Column] = {
        "images_colour": Column("images of colour tokens that show the true colour"),
        "images_material": Column("images of material tokens that show the true material"),
    }

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """Every attribute that was learned and can be read."""
        scores = {}
        for attribute in ("colour", "material"):
            if attribute in outcome.attributes:
                values, prompts = [], []
                for match in outcome.matches:
                    if match.found is None:
                        values.append(0.0)
                        continue
                    thing = match.found.tokens.get("category", match.found.region.word)
                    prompts.append(f"a photo of a {thing} {match.found.tokens[attribute]}")
                    seen = read(outcome.generate(prompts[-1]))
                    values.append(share_right(seen[attribute], attribute, true_word(match, attribute)))
                scores[f"images_{attribute}"] = Score(_mean(values), prompts)
        return scores


class Transfer(_TabletopMetric):
    """An object's colour token on another thing, "a photo of a cup <colour>": does the colour come, the cup stay?

    The other thing is a shape of the tabletop that the object is not, drawn from the image's name.
    """

    columns: Mapping[str, Column] = {
        "transfer_colour": Column("another thing with the colour token shows its colour"),
        "transfer_shape": Column("another thing with the colour token keeps its own shape"),
    }

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """Two shares, over all images of all objects."""
        colours, shapes, prompts = [], [], []
        for number, match in enumerate(outcome.matches):
            if "colour" not in outcome.attributes:
                return {}
            if match.found is None:
                colours.append(0.0)
                shapes.append(0.0)
                continue
            other = other_shape(outcome.image.name, number, _word(match))
            prompts.append(transfer_prompt(other, match.found.tokens["colour"]))
            seen = read(outcome.generate(prompts[-1]))
            colours.append(share_right(seen["colour"], "colour", true_word(match, "colour")))
            shapes.append(share_right(seen["shape"], "shape", other))
        return {
            "transfer_colour": Score(_mean(colours), prompts),
            "transfer_shape": Score(_mean(shapes), prompts),
        }


class Leakage(_TabletopMetric):
    """What a token changes that is not its business: 0 is ideal, 1 the worst.

    Two prompts that differ in one word are compared: one has the learned token, the other the true plain word in its
    place, "a photo of a cup <colour>" and "a photo of a cup red". Their images start from the same noise, and for each
    set the mean of the probe's probabilities over an attribute that the word does not speak of is taken: the materials
    for the colour token, the colours for the category token ("a photo of a <category>", "a photo of a bowl"). The
    number is the total variation distance of the two, half the sum of absolute differences: how much probability moved
    to other words. A token that is as pure as its word gives 0 whatever material the model likes its red things to be
    of, for that is in both; a colour token that brings its object's metal along moves probability to metal, and the
    number by as much. A token that does nothing leaks little, too, and is found out by ``transfer_colour``.
    """

    columns: Mapping[str, Column] = {
        "leak_colour_material": Column("what the colour token changes of the material", higher_is_better=False),
        "leak_category_colour": Column("what the category token changes of the colour", higher_is_better=False),
    }

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """Means over the objects found."""
        materials, colours = [], []
        material_prompts: list[str] = []
        colour_prompts: list[str] = []
        for number, match in enumerate(outcome.matches):
            if match.found is None:
                continue
            if "colour" in outcome.attributes:
                other = other_shape(outcome.image.name, number, _word(match))
                pair = (
                    transfer_prompt(other, match.found.tokens["colour"]),
                    transfer_prompt(other, true_word(match, "colour")),
                )
                materials.append(self._distance(outcome, pair, "material"))
                material_prompts += pair
            if "category" in outcome.parts:
                pair = (f"a photo of a {match.found.tokens['category']}", f"a photo of a {_word(match)}")
                colours.append(self._distance(outcome, pair, "colour"))
                colour_prompts += pair
        return {
            "leak_colour_material": Score(_mean(materials), material_prompts),
            "leak_category_colour": Score(_mean(colours), colour_prompts),
        }

    def _distance(self, outcome: Outcome, pair: tuple[str, str], attribute: str) -> float:
        learned, plain = (read(outcome.generate(prompt))[attribute].mean(dim=0) for prompt in pair)
        return total_variation(learned, plain)


class Recompose(_TabletopMetric):
    """All of a concept's tokens together, "a photo of a <category> <colour> <material>": is it the object again?"""

    columns: Mapping[str, Column] = {
        "recompose": Column("images of all tokens together with shape, colour and material right at once"),
        "recompose_parts": Column("images of all tokens together, share of shape, colour and material that is right"),
    }

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """The shape and every attribute that was learned and can be read; nothing without an attribute or category."""
        wholes, parts, prompts = [], [], []
        judged = [name for name in READABLE if name == "shape" or name in outcome.attributes]
        if len(judged) == 1 or "category" not in outcome.parts:
            return {}
        for match in outcome.matches:
            if match.found is None:
                wholes.append(0.0)
                parts.append(0.0)
                continue
            prompts.append(recompose_prompt(match.found, outcome.attributes))
            seen = read(outcome.generate(prompts[-1]))
            right = torch.stack([is_right(seen[name], name, _truth(match, name)) for name in judged])
            wholes.append(float(right.all(dim=0).float().mean()))
            parts.append(float(right.float().mean()))
        return {"recompose": Score(_mean(wholes), prompts), "recompose_parts": Score(_mean(parts), prompts)}


def transfer_prompt(thing: str, colour: str) -> str:
    """A plain word for a thing with a colour's word or token, in the order in which attributes are learned."""
    return f"a photo of a {thing} {colour}"


def recompose_prompt(concept: FoundConcept, attributes: Sequence[str]) -> str:
    """The category with all attributes, as ICE's second phase says them."""
    return " ".join(["a photo of a", concept.tokens["category"], *(concept.tokens[name] for name in attributes)])


def other_shape(image: str, number: int, shape: str) -> str:
    """A shape that is not this one, from the image's name and the object's number in it."""
    others = [other for other in SHAPES if other != shape]
    return others[int.from_bytes(hashlib.sha256(f"{image} {number}".encode()).digest()[:4], "big") % len(others)]


@torch.no_grad()
def read(pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What the probe sees in pictures of one object: shape, colour and material -> probabilities [N, W]."""
    pixels = [
        np.asarray(picture.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))
        for picture in pictures
    ]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return {name: logits.softmax(dim=1) for name, logits in zip(READABLE, shipped_probe()(images), strict=False)}


def is_right(probabilities: Tensor, name: str, word: str) -> Tensor:
    """Whether the likeliest word is this one: bool [N], for probabilities [N, W] over the words of ``name``."""
    return probabilities.argmax(dim=1) == READABLE[name].index(word)


def share_right(probabilities: Tensor, name: str, word: str) -> float:
    """The share of pictures in which the likeliest word is this one."""
    return float(is_right(probabilities, name, word).float().mean())


def total_variation(p: Tensor, q: Tensor) -> float:
    """1/2 sum_i |p_i - q_i| of two distributions [W], in [0, 1]."""
    return float((p - q).abs().sum() / 2)


def true_word(match: Match, attribute: str) -> str:
    """An object's true word for an attribute."""
    assert match.true is not None, "a metric that needs attributes is only asked where they are known"
    return match.true.attributes[attribute]


def _word(match: Match) -> str:
    assert match.true is not None and match.true.word is not None
    return match.true.word


def _truth(match: Match, name: str) -> str:
    return _word(match) if name == "shape" else true_word(match, name)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
