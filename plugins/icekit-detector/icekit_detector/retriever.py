"""A retriever that asks Grounding DINO which words of a vocabulary it finds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from icekit.protocols import Backbone, Candidate, InputError, View
from icekit.waiting import told
from icekit.words import read_vocabulary
from icekit_detector.grounding import GroundingDino, visible_shares
from icekit_detector.settings import GroundingDinoSettings

REMEMBERED = 256
"""Views whose words are kept: stage one looks at a region more than once, and each look is many passes."""


class GroundingDinoRetriever:
    """The words of a vocabulary that Grounding DINO finds a box for (Liu et al., ECCV 2024).

    Raises:
        InputError: no such model or vocabulary file, a model that is of another class, damaged or has files missing, or
            a vocabulary without a usable word.
        RunError: the model gives NaN or infinity.
    """

    Settings = GroundingDinoSettings

    def __init__(self, settings: GroundingDinoSettings, backbone: Backbone) -> None:
        self.settings = settings
        words = read_vocabulary(settings.vocabulary)
        known = [word for word in told(words, "asking the backbone which words it knows") if backbone.knows(word)]
        if not known:
            raise InputError(
                f"retriever.vocabulary: the backbone knows none of its {len(words)} words"
                f" (they begin {', '.join(words[:3])})"
            )
        self._detector = GroundingDino(settings.model, "retriever.model", settings.template, backbone.device)
        try:
            self._prompts = self._detector.prompts(known, settings.words_at_once)
        except InputError as error:
            raise InputError(f"retriever.vocabulary: {error}") from error
        self._seen: dict[bytes, list[Candidate]] = {}

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        """The words that the detector finds in what is visible, best first, at most ``top``; none of those used.

        A word's score is that of its best box, in [0, 1]. What a used word stands for is erased, so that words which
        mean the same are not found there again.
        """
        gone = {word.casefold() for word in used}
        return [one for one in self._found(view) if one.word.casefold() not in gone][: self.settings.top]

    def _found(self, view: View) -> list[Candidate]:
        """All words above the threshold, best first."""
        if not bool(view.visible.any()):
            return []
        key = _digest(view.pixels, view.visible)
        if key not in self._seen:
            if len(self._seen) == REMEMBERED:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = self._look(view)
        return self._seen[key]

    def _look(self, view: View) -> list[Candidate]:
        found: list[Candidate] = []
        for prompt in told(self._prompts, "Grounding DINO looks for the vocabulary's words, passes"):
            detected = self._detector.detect(view.pixels, prompt)
            shares = visible_shares(detected.boxes, view.visible)
            counts = (shares > 0) & (shares >= self.settings.visible_share)
            best = detected.scores.where(counts, detected.scores.new_zeros(())).amax(dim=1).tolist()
            found += [Candidate(word, score) for word, score in zip(prompt.words, best, strict=True)]
        return sorted((one for one in found if one.score > self.settings.threshold), key=lambda one: -one.score)


def _digest(*tensors: Tensor) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()
