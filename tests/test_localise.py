"""Stage one's loop: rounds, parts, words that come again, what is erased, and going on after any of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from icekit import Candidate, Region, RunError, Segmentation, View
from icekit.protocols import token_names
from icekit.run.directory import Located, RunDirectory
from icekit.run.locating import locate
from icekit.settings import Settings

IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))


def box(rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


NOWHERE = box(slice(0, 0), slice(0, 0))
LEFT, RIGHT, SPECK = box(slice(8, 18), slice(2, 12)), box(slice(8, 18), slice(20, 30)), box(slice(28, 30), slice(0, 2))
CORNER = box(slice(18, 20), slice(12, 14))
"""It touches ``LEFT`` at a corner."""
FLOOR = box(slice(22, 32), slice(4, 32))


class Scripted:
    """A retriever and a segmentor that do as they are told, and note what they were asked.

    words: said of every view, best first. masks: word -> its mask, or what is erased with it as well.
    """

    def __init__(self, words: Sequence[str], masks: Mapping[str, torch.Tensor | Segmentation]) -> None:
        self.words, self.masks = words, masks
        self.visible: list[float] = []
        self.used: list[list[str]] = []
        self.tried: list[str] = []

    sees = False  # whether a word that is said again says anything

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        self.visible.append(share(view.visible))
        self.used.append(list(used))
        return [Candidate(word, 0.5) for word in self.words if word not in used]

    def segment(self, view: View, word: str, generator: torch.Generator) -> torch.Tensor | Segmentation:
        self.tried.append(word)
        return self.masks.get(word, NOWHERE)

    def locate(self, located: Located | None = None, **settings: Any) -> list[Located]:
        """Stage one after every change; regions keep the word by which they were found, if nothing else is said."""
        changes: list[Located] = []
        chosen = Settings(**{"naming": "retrieved"} | settings)
        last = locate(IMAGE, self, self, chosen, located=located or Located(), on_change=changes.append)
        assert last is changes[-1]
        return changes


def share(mask: torch.Tensor) -> float:
    return round(float(mask.float().mean()), 4)


@pytest.mark.parametrize(
    ("same_word", "expected"),
    [
        ("once", [LEFT | RIGHT | SPECK | CORNER]),
        ("parts", [LEFT | CORNER, RIGHT]),
        ("apart", [LEFT | CORNER, RIGHT]),
    ],
)
def test_parts_of_a_mask_are_regions_if_they_are_large_enough(same_word: str, expected: list[torch.Tensor]) -> None:
    scripted = Scripted(["cup", "ball"], {"cup": LEFT | RIGHT | SPECK | CORNER})
    first, *_, last = scripted.locate(same_word=same_word, min_area=0.025, max_rounds=2)
    assert [region.word for region in last.regions] == ["cup"] * len(expected)
    assert [region.index for region in last.regions] == list(range(len(expected)))
    assert all(torch.equal(region.mask, mask) for region, mask in zip(last.regions, expected, strict=True))
    assert len(first.regions) == len(expected)  # those of a round come together: an interruption loses none
    assert scripted.visible[1] == share(~torch.stack(expected).any(dim=0))  # what is no region was not erased


@pytest.mark.parametrize("same_word", ["parts", "apart"])
def test_parts_are_no_more_than_there_is_room_for_and_keep_one_word_between_them(same_word: str) -> None:
    both = {"cup": LEFT | RIGHT}
    assert len(Scripted(["cup"], both).locate(same_word=same_word, max_concepts=1)[-1].regions) == 1
    [*_, last] = Scripted(["cup", "mug", "pot"], both).locate(same_word=same_word, naming="alone", max_rounds=1)
    assert [region.label for region in last.regions] == ["cup", "cup"]
    names = [token_names(region, ()) for region in last.regions]
    assert [name["category"] for name in names] == ["<cup-0>", "<cup-1>"]


NEAR = box(slice(8, 18), slice(14, 24))
"""Two pixels beside ``LEFT``, whose side is ten: a gap of a fifth."""


@pytest.mark.parametrize(("second", "count"), [(RIGHT, 2), (NEAR, 1)])
def test_only_what_lies_apart_is_another_of_its_kind(second: torch.Tensor, count: int) -> None:
    [*_, last] = Scripted(["cup"], {"cup": LEFT | second}).locate(same_word="apart")
    assert len(last.regions) == count
    assert torch.equal(torch.stack([region.mask for region in last.regions]).any(dim=0), LEFT | second)


class Moving(Scripted):
    """A retriever that sees, and a segmentor that finds one place a word and time. places: in turn."""

    sees = True

    def __init__(self, words: Sequence[str], places: Sequence[torch.Tensor]) -> None:
        super().__init__(words, {})
        self.places = places

    def segment(self, view: View, word: str, generator: torch.Generator) -> torch.Tensor:
        self.tried.append(word)
        return self.places[len(self.tried) - 1] if len(self.tried) <= len(self.places) else NOWHERE


def test_a_word_comes_again_for_another_of_its_kind() -> None:
    scripted = Moving(["cup", "ball"], [LEFT, RIGHT, FLOOR])
    [*_, last] = scripted.locate(same_word="apart", min_visible=0.55)
    assert scripted.tried == ["cup", "cup", "cup"]
    assert [(region.index, region.word) for region in last.regions] == [(0, "cup"), (1, "cup"), (2, "cup")]
    once = Moving(["cup", "ball"], [LEFT, RIGHT, FLOOR])
    assert [region.word for region in once.locate(same_word="once")[-1].regions] == ["cup", "ball"]


def test_a_word_does_not_come_again_for_the_rest_of_the_thing_that_it_was_found_for() -> None:
    scripted = Moving(["cup", "ball"], [LEFT, NEAR, RIGHT])
    [*_, last] = scripted.locate(same_word="apart")
    assert scripted.tried[:3] == ["cup", "cup", "ball"]
    assert [region.word for region in last.regions] == ["cup", "ball"]
    assert last.refused[0] == "cup"  # it led nowhere the second time, and does not come a third


def test_words_that_are_given_are_not_looked_for_again() -> None:
    scripted = Moving(["cup", "ball"], [LEFT, RIGHT])
    scripted.sees = False
    assert [region.word for region in scripted.locate(same_word="apart")[-1].regions] == ["cup", "ball"]


def test_the_two_ends_of_a_thing_behind_another_are_one() -> None:
    """Whether what is before it was found first or last."""
    bar = box(slice(0, 32), slice(12, 20))
    first = Scripted(["post", "dog"], {"post": bar, "dog": LEFT | RIGHT}).locate(same_word="apart")[-1]
    last = Moving(["dog", "post"], [LEFT, RIGHT, NOWHERE, bar])
    last_found = last.locate(same_word="apart")[-1]
    assert last.tried[:4] == ["dog", "dog", "dog", "post"]
    for found in (first, last_found):
        [dog] = [region for region in found.regions if region.word == "dog"]
        assert torch.equal(dog.mask, LEFT | RIGHT)
        assert [region.index for region in found.regions] == [0, 1]


def test_another_of_its_kind_must_be_seen_alone() -> None:
    """A second place that the retriever has no word for is none."""

    class Blind(Moving):
        def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
            return [] if torch.equal(view.visible, RIGHT) else super().retrieve(view, used)

    assert len(Blind(["cup"], [LEFT | RIGHT]).locate(same_word="apart", naming="alone")[-1].regions) == 1
    assert len(Moving(["cup"], [LEFT | RIGHT]).locate(same_word="apart", naming="alone")[-1].regions) == 2


def test_two_of_a_kind_are_not_named_by_words_that_are_only_alike() -> None:
    """A retriever drops words that are like a used one: of two dogs none is a puppy."""

    class Alike(Moving):
        def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
            like = {"dog", "puppy"} if {"dog", "puppy"} & set(used) else set()
            words = ["puppy", "dog", "cat"] if torch.equal(view.visible, RIGHT) else ["dog", "puppy", "cat"]
            return [Candidate(word, 1 / (1 + place)) for place, word in enumerate(words) if word not in like]

    [*_, last] = Alike([], [LEFT, RIGHT]).locate(same_word="apart", naming="alone")
    assert [region.word for region in last.regions] == ["dog", "dog"]


def test_a_word_may_come_again_after_another_one() -> None:
    """As published: whatever the word's place is."""
    never, later = Moving(["cup", "ball"], [LEFT, RIGHT, FLOOR]), Moving(["cup", "ball"], [LEFT, RIGHT, FLOOR])
    assert [region.word for region in never.locate(same_word="once")[-1].regions] == ["cup", "ball"]
    assert never.used == [[], ["cup"], ["cup", "ball"]]
    found = later.locate(same_word="parts", max_rounds=3)[-1]
    assert [region.word for region in found.regions] == ["cup", "ball", "cup"]
    assert later.used == [[], ["cup"], ["ball"]]


def test_a_renamed_region_keeps_its_word_from_coming_again_at_once() -> None:
    """The word before is the one that was looked for, and it may be the region's new name, too."""
    scripted = Scripted(["cup", "ball"], {"cup": LEFT, "ball": RIGHT})
    [*_, last] = scripted.locate(same_word="parts", naming="alone", max_rounds=2)
    assert scripted.tried == ["cup", "ball"]
    assert sorted(region.word for region in last.regions) == ["ball", "cup"]


@pytest.mark.parametrize(("rounds", "tried"), [(1, ["ghost"]), (2, ["ghost", "cup"]), (None, ["ghost", "cup", "ball"])])
def test_a_round_is_a_word_whether_or_not_it_has_a_place(rounds: int | None, tried: list[str]) -> None:
    scripted = Scripted(["ghost", "cup", "ball"], {"cup": LEFT, "ball": RIGHT})
    [*_, last] = scripted.locate(max_rounds=rounds)
    assert scripted.tried == tried
    assert (last.rounds, last.last, last.refused, last.finished) == (len(tried), tried[-1], ("ghost",), True)


def test_the_published_stop_rule_is_a_third_of_the_stated_one() -> None:
    """A picture of which 5 % are left is at its end at 10 %, and goes on to 1/30 of the pixels."""
    most = torch.ones(32, 32, dtype=torch.bool)
    most.view(-1)[:51] = False  # of 1024
    for min_visible, words in ((0.1, ["wall"]), (1 / 30, ["wall", "cup"])):
        scripted = Scripted(["wall", "cup"], {"wall": most, "cup": ~most})
        assert [one.word for one in scripted.locate(min_visible=min_visible)[-1].regions] == words


def test_what_goes_with_a_word_is_erased_and_is_no_region() -> None:
    """Of a word without a place, too; and going on after any word is as if there had been no interruption."""
    words = ["ghost", "cup", "ball"]
    masks = {"ghost": Segmentation(SPECK, SPECK | FLOOR), "cup": Segmentation(LEFT, LEFT), "ball": FLOOR | RIGHT}
    scripted = Scripted(words, masks)
    located = scripted.locate(min_area=0.025)
    assert [region.word for region in located[-1].regions] == ["cup", "ball"]
    assert torch.equal(located[-1].regions[1].mask, RIGHT)  # the floor had gone with the first word
    erased = [NOWHERE, SPECK | FLOOR, SPECK | FLOOR | LEFT, SPECK | FLOOR | LEFT | RIGHT]
    assert scripted.visible == [share(~mask) for mask in erased]
    for number, state in enumerate(located[:-1], start=1):
        rest = Scripted(words, masks)
        [*_, last] = rest.locate(state, min_area=0.025)
        assert rest.visible == scripted.visible[number:]
        assert (last.rounds, last.last, last.refused) == (3, "ball", ("ghost",))
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(last.regions, located[-1].regions, strict=True))


@pytest.mark.parametrize("known", [1, 2])
def test_going_on_from_disk_with_the_published_rules(known: int, tmp_path: Path) -> None:
    masks = {"cup": Segmentation(LEFT | RIGHT | SPECK, LEFT | RIGHT | SPECK), "ball": FLOOR}
    rules: dict[str, Any] = {"same_word": "parts", "max_rounds": 3, "min_area": 0.025}
    whole = Scripted(["cup", "ball"], masks).locate(**rules)
    run = RunDirectory(tmp_path / "run")
    run.save_located(whole[known - 1])
    going_on = Scripted(["cup", "ball"], masks)
    last = going_on.locate(run.load_located(), **rules)[-1]
    assert [(one.index, one.word, share(one.mask)) for one in last.regions] == [
        (one.index, one.word, share(one.mask)) for one in whole[-1].regions
    ]
    assert (last.rounds, last.last) == (whole[-1].rounds, whole[-1].last)


def test_stage_one_is_kept_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    regions = (Region(0, "cup", 0.5, LEFT), Region(1, "cup", 0.25, RIGHT))
    run.save_located(Located(regions, ("ghost",), rounds=3, last="cup", erased=FLOOR))
    found = run.load_located()
    assert (found.refused, found.finished, found.rounds, found.last) == (("ghost",), False, 3, "cup")
    assert found.erased is not None and torch.equal(found.erased, FLOOR)
    assert [(one.word, one.score) for one in found.regions] == [("cup", 0.5), ("cup", 0.25)]
    assert all(torch.equal(one.mask, mask) for one, mask in zip(found.regions, (LEFT, RIGHT), strict=True))
    run.save_located(Located(regions))
    assert run.load_located().erased is None


@pytest.mark.parametrize("wrong", [Segmentation(LEFT, LEFT.float()), Segmentation(LEFT.float(), LEFT), LEFT.float()])
def test_a_wrong_mask_is_refused(wrong: torch.Tensor | Segmentation) -> None:
    with pytest.raises(RunError, match=r"^segmentor 'xattn' returned (a mask|what is erased) of dtype float32: bool"):
        Scripted(["cup"], {"cup": wrong}).locate()


def test_a_score_that_is_no_number_is_refused() -> None:
    class Unsure(Scripted):
        def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
            return [Candidate("cup", float("nan"))]

    with pytest.raises(RunError, match="retriever 'clip' returned nan as the score of the word 'cup': a finite number"):
        Unsure(["cup"], {"cup": LEFT}).locate()
