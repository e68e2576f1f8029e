"""Stage one: the concepts of an image, a word and a mask each."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from icekit.pixels import erase, isolate
from icekit.protocols import (
    Attribute,
    Candidate,
    Describer,
    Embedder,
    Proposal,
    Proposer,
    Region,
    Retriever,
    Segmentation,
    Segmentor,
    View,
)
from icekit.randomness import seeded_generator
from icekit.run import border
from icekit.run.directory import Located
from icekit.run.division import divisions, things
from icekit.settings import Settings

CANDIDATES_TRIED = 5
"""Words tried on one view before stage one gives up."""
UNFIT, KEPT = -100.0, 1e-6
"""In the assignment of words to regions: the score of a word that the retriever has not found there, and what the word
that a region has already counts more than another of the same score."""
UNNAMED = "object"
"""The word for a mask of the user's own that the retriever cannot name."""


def locate(
    image: Tensor,
    retriever: Retriever,
    segmentor: Segmentor | Proposer,
    settings: Settings,
    *,
    attributes: Sequence[Attribute] = (),
    located: Located = Located(),  # noqa: B008 (it is frozen)
    on_change: Callable[[Located], None] = lambda located: None,
) -> Located:
    """Stage one, from where it stands to its end.

    x_0 = x; c_i = T(x_i); m_i = S(x_i, c_i); x_{i+1} = x_i * (1 - m_i)   (ICE, Cendra and Han, CVPR 2025, stage one)

    A round tries a word. It ends when ``max_concepts`` are found or ``max_rounds`` are over, when ``min_visible`` of
    the image or less is left, when the retriever has no word, or when nothing is erased for any of its first words. The
    masks of a ``Proposer`` are all the regions; where one has no word, the retriever names it, looking at that mask
    alone.

    ``settings.same_word`` says when a word is several concepts. With ``"apart"`` the parts of its mask that lie apart
    are (``division.things``), and a word comes again where the retriever still puts it above all new ones and the
    segmentor finds it apart from where it was; parts that turn out to be one thing behind another concept are joined in
    the end.

    With ``settings.naming`` other than ``"retrieved"`` the retriever looks at each region alone: it is cut in two where
    two words fit better than one, and in the end the words are given to the regions that they fit best.

    Every region's random numbers follow from the seed and its place in the loop, so that going on from any ``located``
    ends as if there had been no interruption.

    Args:
        image: float32 ``[3, H, W]`` in [0, 1].
        retriever: T.
        segmentor: S, or a ``Proposer``.
        settings: the stop rules, the naming, the filling of erased parts and the seed.
        attributes: those that a ``Describer`` is asked about, at the end, if ``settings.naming`` is ``"described"``.
        located: what was found so far.
        on_change: called after every word that something was erased for, and at the end.

    Raises:
        BreachError: the retriever or the segmentor returned what its protocol does not allow, see ``border``.
    """
    return _StageOne(image, retriever, segmentor, settings).to_the_end(located, attributes, on_change)


def embedded(image: Tensor, regions: Sequence[Region], embedder: Embedder, name: str) -> list[Tensor]:
    """Where each region lies in the retriever's space, looked at alone: float32 ``[D]``, of length one.

    image: float32 ``[3, H, W]`` in [0, 1]. name: the retriever's.

    Raises:
        BreachError: it returned what its protocol does not allow.
    """
    who: border.Component = ("retriever", name)
    border.check_space(who, embedder.space)
    vectors: list[Tensor] = []
    for region in regions:
        view = View(image, isolate(image, region.mask), region.mask)
        with border.view_unchanged(who, view):
            vector = embedder.embed(view)
        border.check_vector(who, vector, len(vectors[0]) if vectors else None)
        vectors.append(vector)
    return vectors


class _StageOne:
    """The image, those who look at it, and the rules."""

    def __init__(
        self, image: Tensor, retriever: Retriever, segmentor: Segmentor | Proposer, settings: Settings
    ) -> None:
        self.image = image
        self.retriever = retriever
        self.segmentor = segmentor
        self.settings = settings
        self.looks_alone = settings.naming != "retrieved"

    def to_the_end(
        self, located: Located, attributes: Sequence[Attribute], on_change: Callable[[Located], None]
    ) -> Located:
        if located.finished:
            return located
        if isinstance(self.segmentor, Proposer):
            with border.unchanged(self._segmentor, picture=self.image):
                proposals = self.segmentor.propose(self.image)
            border.check_proposals(self._segmentor, proposals, self.image.shape[1:])
            for proposal in proposals[len(located.regions) : self.settings.max_concepts]:
                best = self._word_of(proposal)
                region = Region(len(located.regions), best.word, best.score, proposal.mask)
                located = dataclasses.replace(located, regions=(*located.regions, region))
                on_change(located)
        else:
            while self._goes_on(located):
                visible = self._visible(located)
                located = self._after_a_word(located, self.segmentor)
                if torch.equal(self._visible(located), visible):
                    break
                on_change(located)
            if self.settings.same_word == "apart":
                located = dataclasses.replace(located, regions=self._joined(located.regions))
            if self.looks_alone and located.regions:
                located = dataclasses.replace(located, regions=self._named_together(located.regions))
        located = dataclasses.replace(located, regions=self._described(located.regions, attributes), finished=True)
        on_change(located)
        return located

    # --- Rounds ------------------------------------------------------------------------------------------------------

    def _goes_on(self, located: Located) -> bool:
        settings = self.settings
        return (
            len(located.regions) < settings.max_concepts
            and (settings.max_rounds is None or located.rounds < settings.max_rounds)
            and float(self._visible(located).float().mean()) > settings.min_visible
        )

    def _visible(self, located: Located) -> Tensor:
        """What is not erased yet: bool ``[H, W]``."""
        visible = torch.ones(self.image.shape[1:], dtype=torch.bool)
        for region in located.regions:
            visible &= ~region.mask
        return visible if located.erased is None else visible & ~located.erased

    def _used(self, located: Located) -> list[str]:
        """The words that are not to come again, or with ``same_word = "apart"`` for another of their kind alone."""
        if self.settings.same_word == "parts":
            return [] if located.last is None else [located.last]
        return [*(region.word for region in located.regions), *located.refused]

    def _again(self, located: Located) -> list[str]:
        """The words found so far that may come again: another of their kind may be there, for all that is known."""
        if self.settings.same_word != "apart":
            return []
        refused = {word.casefold() for word in located.refused}
        return [region.word for region in located.regions if region.word.casefold() not in refused]

    def _after_a_word(self, located: Located, segmentor: Segmentor) -> Located:
        """Try the retriever's words for what is visible, up to the first for which something is erased."""
        visible = self._visible(located)
        view = View(self.image, erase(self.image, visible, self.settings.erase), visible)
        again = self._again(located) if getattr(self.retriever, "sees", True) else []
        candidates = self._words_for(view, self._used(located), again)
        for candidate in candidates[:CANDIDATES_TRIED]:
            if located.rounds == self.settings.max_rounds:
                break
            generator = seeded_generator(self.settings.seed, "segment", len(located.regions), candidate.word)
            with border.view_unchanged(self._segmentor, view):
                found = segmentor.segment(view, candidate.word, generator)
            border.check_segmented(self._segmentor, found, self.image.shape[1:])
            mask = found.mask if isinstance(found, Segmentation) else found
            before = len(located.regions)
            for part in self._parts(mask & visible, candidate.word, located):
                located = self._with_region(located, part, candidate, first=len(located.regions) == before)
            located = dataclasses.replace(located, rounds=located.rounds + 1, last=candidate.word)
            if len(located.regions) == before:
                located = dataclasses.replace(located, refused=(*located.refused, candidate.word))
            if isinstance(found, Segmentation):
                so_far = torch.zeros_like(visible) if located.erased is None else located.erased
                located = dataclasses.replace(located, erased=so_far | found.erased)
            if not torch.equal(self._visible(located), visible):
                break
        return located

    def _parts(self, mask: Tensor, word: str, located: Located) -> list[Tensor]:
        """What of a word's mask are concepts of their own: bool ``[H, W]`` each."""
        if self.settings.same_word == "once":
            return [mask]
        if self.settings.same_word == "parts":  # from the top down
            labels, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
            return [torch.from_numpy(labels == number) for number in range(1, count + 1)]
        hidden, own = torch.zeros_like(mask), torch.zeros_like(mask)
        for region in located.regions:
            place = own if region.word.casefold() == word.casefold() else hidden
            place |= region.mask
        found = things(mask | own, hidden, self.settings.min_area)
        return [thing for thing in found if not bool((thing & own).any())]

    def _joined(self, regions: Sequence[Region]) -> tuple[Region, ...]:
        """The regions, those of one word that are one thing behind another concept as one."""
        kept: list[Region] = []
        for word in dict.fromkeys(region.word for region in regions):
            same = [region for region in regions if region.word == word]
            own = torch.stack([region.mask for region in same]).any(dim=0)
            hidden = torch.zeros_like(own)
            for region in regions:
                if region.word != word:
                    hidden |= region.mask
            for thing in things(own, hidden, self.settings.min_area) if len(same) > 1 else [own]:
                parts = [region for region in same if bool((region.mask & thing).any())]
                mask = torch.stack([part.mask for part in parts]).any(dim=0)
                kept.append(dataclasses.replace(parts[0], mask=mask))
        kept.sort(key=lambda region: region.index)
        return tuple(dataclasses.replace(region, index=index) for index, region in enumerate(kept))

    def _with_region(self, located: Located, mask: Tensor, candidate: Candidate, first: bool) -> Located:
        """With the region of this mask, if it is large enough and there is room for it.

        first: of those that this word was tried for. With ``same_word = "apart"`` a further one, or one of a word that
        was found before, is taken only if the retriever, looking at it alone, has a word for it.
        """
        used = self._used(located)
        again = [word for word in self._again(located) if word.casefold() == candidate.word.casefold()]
        if self.looks_alone:
            mask = self._one_thing(mask, used)
        area = float(mask.float().mean())
        if len(located.regions) == self.settings.max_concepts or area == 0 or area < self.settings.min_area:
            return located
        fitting = self._words_alone(mask, used, again) if self.looks_alone else []
        if self.looks_alone and self.settings.same_word == "apart" and not fitting and (again or not first):
            return located
        named = fitting[0] if fitting else candidate
        region = Region(len(located.regions), named.word, named.score, mask)
        return dataclasses.replace(located, regions=(*located.regions, region))

    @property
    def _segmentor(self) -> border.Component:
        return "segmentor", self.settings.name_of("segmentor")

    @property
    def _retriever(self) -> border.Component:
        return "retriever", self.settings.name_of("retriever")

    # --- Words -------------------------------------------------------------------------------------------------------

    def _words_for(self, view: View, used: Sequence[str], again: Sequence[str] = ()) -> list[Candidate]:
        """The retriever's words for a view, best first, none of them used, nor like one that is.

        again: of the words used those that may come, as themselves: still none that is only like them.
        """
        new = self._asked(view, used)
        if not again:
            return new
        may = {word.casefold() for word in again}
        allowed = may | {one.word.casefold() for one in new}
        found = self._asked(view, [word for word in used if word.casefold() not in may])
        best = [one for one in found if one.word.casefold() in allowed]
        there = {one.word.casefold() for one in best}
        return best + [one for one in new if one.word.casefold() not in there]

    def _asked(self, view: View, used: Sequence[str]) -> list[Candidate]:
        taken = {word.casefold() for word in used}
        with border.view_unchanged(self._retriever, view):
            candidates = self.retriever.retrieve(view, used)
        border.check_candidates(self._retriever, candidates)
        return [one for one in candidates if one.word.casefold() not in taken]

    def _words_alone(self, mask: Tensor, used: Sequence[str] = (), again: Sequence[str] = ()) -> list[Candidate]:
        """Words not used yet for what a mask shows, all else hidden; best first. again: see ``_words_for``."""
        return self._words_for(View(self.image, isolate(self.image, mask), mask), used, again)

    def _word_of(self, proposal: Proposal) -> Candidate:
        if proposal.word is not None:
            return Candidate(proposal.word, 1.0)
        named = self._words_alone(proposal.mask)
        return named[0] if named else Candidate(UNNAMED, 0.0)

    def _one_thing(self, mask: Tensor, used: Sequence[str]) -> Tensor:
        """The mask, or the part of it that a word fits best, if it is two things.

        It is when it can be cut in two parts whose words are different and fit them better, in the mean, than any word
        fits the whole. The other part is left to be found.
        """

        def best(part: Tensor) -> Candidate | None:
            return next(iter(self._words_alone(part, used)), None)

        cuts = divisions(mask)
        if not cuts:
            return mask
        whole = best(mask)
        kept, most = mask, whole.score if whole else -math.inf
        for parts in cuts:
            one, other = best(parts[0]), best(parts[1])
            if one and other and one.word != other.word and (one.score + other.score) / 2 > most:
                kept, most = parts[int(other.score > one.score)], (one.score + other.score) / 2
        return kept

    def _named_together(self, regions: Sequence[Region]) -> tuple[Region, ...]:
        """The regions with the words that fit all of them best: the assignment of the largest total score.

        One by one, the first region may take the word that the next one fits better. Each word is given as often as it
        was found: once, or for each of its kind. A region that the retriever has no word for keeps its own.
        """
        counts = Counter(region.word for region in regions)
        found = [
            {one.word: one.score for one in self._words_alone(region.mask, *self._of_a_kind(region, counts))}
            for region in regions
        ]
        words = list(counts.elements()) + [
            word for word in dict.fromkeys(word for row in found for word in row) if word not in counts
        ]

        def fit(row: int, word: str) -> float:
            kept = word == regions[row].word
            return found[row].get(word, UNFIT) + (KEPT if kept else 0.0)

        table = np.array([[fit(row, word) for word in words] for row in range(len(regions))])
        named = list(regions)
        for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
            word = words[column]
            if word in found[row]:
                named[row] = dataclasses.replace(regions[row], word=word, score=found[row][word])
        return tuple(named)

    def _of_a_kind(self, region: Region, counts: Counter[str]) -> tuple[list[str], list[str]]:
        """The words that are used and that may come again where there are several of a region's kind: its own.

        Words that are only like it would name one of two dogs a puppy.
        """
        of_a_kind = self.settings.same_word == "apart" and counts[region.word] > 1
        return ([region.word], [region.word]) if of_a_kind else ([], [])

    def _described(self, regions: Sequence[Region], attributes: Sequence[Attribute]) -> tuple[Region, ...]:
        """The regions with hints, if the retriever can give some and is to: it looks at each alone."""
        if self.settings.naming != "described" or not isinstance(self.retriever, Describer):
            return tuple(regions)
        described = []
        for region in regions:
            view = View(self.image, isolate(self.image, region.mask), region.mask)
            hints = {one.name: self._hints(self.retriever, view, region.word, one) for one in attributes}
            described.append(dataclasses.replace(region, hints=hints))
        return tuple(described)

    def _hints(self, describer: Describer, view: View, noun: str, attribute: Attribute) -> Mapping[str, float]:
        """Which words of an attribute fit a view."""
        with border.view_unchanged(self._retriever, view):
            hints = describer.describe(view, noun, attribute.vocabulary)
        border.check_hints(self._retriever, hints, attribute.vocabulary)
        return hints
