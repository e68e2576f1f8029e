"""The retriever that needs no model: the user's own words."""

from __future__ import annotations

from collections.abc import Sequence

from icekit.builtin.retrievers.settings import WordsSettings
from icekit.protocols import Backbone, Candidate, InputError, View


class WordsRetriever:
    """The user's own words, in their order, each given once, with score 1.

    Raises:
        InputError: no words, or one that the backbone does not know.
    """

    Settings = WordsSettings

    sees = False

    def __init__(self, settings: WordsSettings, backbone: Backbone) -> None:
        words = [word.strip() for word in settings.words if word.strip()]
        if not words:
            raise InputError("retriever 'words' has no words: give some, as in --set retriever.words=cup,ball")
        for word in words:
            if not backbone.knows(word):
                raise InputError(f"retriever.words: the backbone does not know the word {word!r}")
        first: dict[str, str] = {}
        for word in words:
            first.setdefault(word.casefold(), word)
        self._words = list(first.values())

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        """The words that were not used yet; the view does not matter."""
        gone = {word.casefold() for word in used}
        return [Candidate(word, 1.0) for word in self._words if word.casefold() not in gone]
