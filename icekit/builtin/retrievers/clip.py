"""The retriever of stage one: CLIP compares what is still visible with every word of a vocabulary.

ICE (Cendra and Han, CVPR 2025) decomposes CLIP's image embedding sparsely and re-ranks with a second CLIP (``splice``);
here the words are ranked by one CLIP alone, against words for the background, which end the loop when they win.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from icekit.builtin.retrievers.settings import ClipSettings
from icekit.cache import digest_of
from icekit.clip import ClipModel
from icekit.protocols import Backbone, Candidate, InputError, View
from icekit.waiting import told
from icekit.words import read_vocabulary

VIEWS_KEPT = 64
"""Views whose embeddings are kept: a region is looked at for its word, for each attribute, and for its vector."""


class ClipRetriever:
    """Ranks words by the cosine similarity of CLIP's embeddings of image and prompt (Radford et al., 2021).

    Raises:
        InputError: no such model, weights, folder or vocabulary file, or a vocabulary without a usable word.
        RunError: the weights cannot be fetched.
    """

    Settings = ClipSettings

    def __init__(self, settings: ClipSettings, backbone: Backbone) -> None:
        self.settings = settings
        check_templates("templates", settings.templates)
        background = [word.lower() for word in settings.background]
        self._stop_words = frozenset(word.lower() for word in settings.stop_words)
        words = read_vocabulary(settings.vocabulary)
        asked = told(words, "asking the backbone which words it knows")
        known = [word for word in asked if backbone.knows(word) and word not in background]
        if not known:
            raise InputError(
                f"retriever.vocabulary: the backbone knows none of its {len(words)} words"
                f" (they begin {', '.join(words[:3])})"
            )
        self._clip = ClipModel(settings.model, settings.pretrained, backbone.device)
        self._words, self._background = known, background
        self._knows = backbone.knows
        self._seen: OrderedDict[str, Tensor] = OrderedDict()
        self._plain: dict[str, Tensor] = {}
        self._prompted = self._clip.embed_words(known + background, settings.templates)

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        """Words that describe the view better than any word for the background, best first, at most ``top``.

        Words equal to one in ``used``, or as similar as ``max_similarity``, are not among them, nor are
        ``stop_words``. Scores are cosine similarities of image and prompt, in [-1, 1].
        """
        return self._unused(self._ranked(view), used, self.settings.top)

    def describe(self, view: View, noun: str, words: Sequence[str]) -> dict[str, float]:
        """Softmax over the prompts of "<word> <noun>", at CLIP's own temperature; see ``protocols.Describer``."""
        known = [word for word in words if self._knows(word)]
        if not known:
            return {}
        texts = self._clip.embed_words([f"{word} {noun}" for word in known], self.settings.templates)
        likely = (self._clip.sharpness * (texts @ self._embed_view(view, self._clip))).softmax(dim=0)
        return dict(zip(known, likely.tolist(), strict=True))

    def _ranked(self, view: View) -> list[Candidate]:
        """The words that outdo the background, best first."""
        return self._above_background((self._prompted @ self._embed_view(view, self._clip)).tolist())

    def _above_background(self, scores: Sequence[float], floor: float = -1.0) -> list[Candidate]:
        """Words with a score above those of all words for the background, ``min_score`` and ``floor``; best first.

        Stop-words were scored with the others, and are left out now.
        """
        floor = max(floor, self.settings.min_score, *scores[len(self._words) :])
        ranked = sorted(zip(self._words, scores, strict=False), key=lambda pair: -pair[1])
        return [Candidate(word, score) for word, score in ranked if score > floor and word not in self._stop_words]

    def _unused(self, ranked: Sequence[Candidate], used: Sequence[str], count: int) -> list[Candidate]:
        """The first ``count`` that are neither one of the words used nor too similar to one."""
        found: list[Candidate] = []
        for candidate in ranked:
            if len(found) == count:
                break
            word = candidate.word
            if not any(word.casefold() == one.casefold() or self._too_similar(word, one) for one in used):
                found.append(candidate)
        return found

    def similarity(self, one: str, other: str) -> float:
        """Cosine similarity of CLIP's text embeddings of two words, without a template, in [-1, 1]."""
        return float(self._text(one) @ self._text(other))

    def _too_similar(self, one: str, other: str) -> bool:
        return self.similarity(one, other) >= self.settings.max_similarity

    def _text(self, word: str) -> Tensor:
        """A plain word's embedding ``[D]``, computed when first asked for: few words come into question."""
        if word not in self._plain:
            self._plain[word] = self._clip.embed_texts([word])[0]
        return self._plain[word]

    def _embed_view(self, view: View, model: ClipModel) -> Tensor:
        """``[D]``; of the views that it was asked about last it is computed once."""
        key = digest_of([str(id(model)), view.pixels, view.visible])
        if key not in self._seen:
            self._seen[key] = model.embed_view(view, self.settings.crop_below if self.settings.crop else 0.0)
            if len(self._seen) > VIEWS_KEPT:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key].clone()

    # --- Vectors that a run keeps: ``protocols.Embedder`` ------------------------------------------------------------

    @property
    def space(self) -> str:
        """CLIP's own, by its weights."""
        return self._clip.space

    def embed(self, view: View) -> Tensor:
        """CLIP's embedding of what is visible, as words are compared with: ``[D]``."""
        return self._embed_view(view, self._clip)

    @staticmethod
    def text_encoder(settings: ClipSettings, device: torch.device) -> ClipTexts:
        """The same CLIP for texts, from this machine."""
        return ClipTexts(settings, device)


class ClipTexts:
    """Texts in CLIP's space, each put into the retriever's prompts. See ``protocols.TextEncoder``.

    Raises:
        InputError: the model is not on this machine.
        RunError: it cannot be loaded.
    """

    def __init__(self, settings: ClipSettings, device: torch.device) -> None:
        check_templates("templates", settings.templates)
        self._clip = ClipModel(settings.model, settings.pretrained, device, local_files_only=True)
        self._templates = settings.templates
        self.space = self._clip.space

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts -> ``[N, D]``."""
        return self._clip.embed_words(texts, self._templates)


def check_templates(setting: str, templates: Sequence[str]) -> None:
    """Whether each prompt of this setting has one place for the word.

    Raises:
        InputError: one has none, or several.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"retriever.{setting}: {template!r} has no single {{}} for the word")
