"""Do images of an attribute's token show the word that the token was named with? A CLIP model reads them.

No truth is needed, so this can be measured on photographs, and no probe that was trained for one world. It says how
well what was learned agrees with how it was named; whether the name is right, it cannot say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from icekit.builtin.metrics.settings import AttributeClipSettings
from icekit.pixels import to_tensor
from icekit.protocols import Backbone, BenchImage, Column, FoundConcept, Outcome, Score


def share_ranked_first(images: Tensor, words: Tensor, own: int) -> float:
    """The share of images to which no word is nearer than their own, by cosine: zero-shot classification.

    Args:
        images: embeddings of at least one image ``[N, D]``, of length one.
        words: embeddings of the words to choose from ``[W, D]``, of length one.
        own: the right one, 0 to W - 1; of equally near ones it is the first.

    Returns:
        A share in [0, 1].

    Source: zero-shot classification, Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision" (2021), section 3.1.
    """
    similarity = images @ words.T
    return float((similarity[:, own] >= similarity.amax(dim=1)).float().mean())


class AttributeClip:
    """Share of an attribute's images in which CLIP ranks the word it was named with first of the attribute's words.

    The images are of "a photo of a <category> <attribute>"; the words are put as "a photo of a red cup", "a photo of a
    blue cup" and so on. Beside it stands the same share for images of plain words, "a photo of a red cup": what this
    model draws when it is told the word, and what this CLIP then reads. By luck it is one in so many as the attribute
    has words.
    """

    Settings = AttributeClipSettings

    columns: Mapping[str, Column] = {
        "clip_{attribute}": Column("images of {attribute} tokens in which CLIP reads the word they were named with"),
        "clip_{attribute}_word": Column("the same of images of that plain word, in place of the token"),
    }
    needs: Collection[str] = ()

    def __init__(self, settings: AttributeClipSettings, backbone: Backbone) -> None:
        self._settings = settings
        self._clip, self._images = settings.loaded(backbone.device), settings.encoder(backbone.device)
        self._words: dict[tuple[str, ...], Tensor] = {}

    def prepare(self, images: Sequence[BenchImage]) -> None:
        """Nothing to prepare."""

    def measure(self, outcome: Outcome) -> Mapping[str, Score]:
        """The means over the concepts found, for every attribute that was learned."""
        scores = {}
        for attribute in outcome.attributes:
            learned, plain = _Share(), _Share()
            for match in outcome.matches:
                if match.found is None or not match.found.words.get(attribute):
                    continue
                noun, word = match.found.region.word, match.found.words[attribute][0]
                words = list(dict.fromkeys([*outcome.vocabularies[attribute], word]))
                for share, prompt in (
                    (learned, _token_prompt(match.found, attribute)),
                    (plain, f"a photo of a {word} {noun}"),
                ):
                    share.add(self._read(outcome, prompt, noun, words, words.index(word)), prompt)
            scores[f"clip_{attribute}"] = learned.score
            scores[f"clip_{attribute}_word"] = plain.score
        return scores

    def _read(self, outcome: Outcome, prompt: str, noun: str, words: Sequence[str], own: int) -> float:
        pictures = [to_tensor(picture) for picture in outcome.generate(prompt)]
        return share_ranked_first(self._images.embed(pictures), self._embedded(noun, words), own)

    def _embedded(self, noun: str, words: Sequence[str]) -> Tensor:
        """Words for a thing ``[W, D]``: the same thing comes again in other rows."""
        key = (noun, *words)
        if key not in self._words:
            phrases = [f"{word} {noun}" for word in words]
            self._words[key] = self._clip.embed_words(phrases, self._settings.templates)
        return self._words[key]


class _Share:
    """The mean of what was added, and the prompts that it is of."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._prompts: list[str] = []

    def add(self, value: float, prompt: str) -> None:
        self._values.append(value)
        self._prompts.append(prompt)

    @property
    def score(self) -> Score:
        return Score(sum(self._values) / len(self._values) if self._values else None, self._prompts)


def _token_prompt(concept: FoundConcept, attribute: str) -> str:
    """As in ``"a photo of a <cup-0> <cup-0-colour>"``; the plain word where the category has no token."""
    thing = concept.tokens.get("category", concept.region.word)
    return f"a photo of a {thing} {concept.tokens[attribute]}"
