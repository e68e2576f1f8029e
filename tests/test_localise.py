"""Stage one's loop: rounds, parts, words that come again, what is erased, and going on after any of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from icekit import Candidate, Region, RunError, Segmentation, View
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
    ("apart", "expected"), [(False, [LEFT | RIGHT | SPECK | CORNER]), (True, [LEFT | CORNER, RIGHT])]
)
def test_each_connected_part_is_a_region_if_it_is_large_enough(apart: bool, expected: list[torch.Tensor]) -> None:
    scripted = Scripted(["cup", "ball"], {"cup": LEFT | RIGHT | SPECK | CORNER})
    first, *_, last = scripted.locate(apart=apart, min_area=0.025)
    assert [region.word for region in last.regions] == ["cup"] * len(expected)
    assert [region.index for region in last.regions] == list(range(len(expected)))
    assert all(torch.equal(region.mask, mask) for region, mask in zip(last.regions, expected, strict=True))
    assert len(first.regions) == len(expected)  # those of a round come together: an interruption loses none
    assert scripted.visible[1] == share(~torch.stack(expected).any(dim=0))  # what is no region was not erased


def test_parts_are_no_more_than_there_is_room_for_and_are_named_alone() -> None:
    both = {"cup": LEFT | RIGHT}
    assert len(Scripted(["cup"], both).locate(apart=True, max_concepts=1)[-1].regions) == 1
    [*_, last] = Scripted(["cup", "mug", "pot"], both).locate(apart=True, naming="alone")
    assert len({region.word for region in last.regions}) == 2


def test_a_word_may_come_again_after_another_one() -> None:
    class Moving(Scripted):
        """Three cups and balls by turns."""

        def segment(self, view: View, word: str, generator: torch.Generator) -> torch.Tensor:
            self.tried.append(word)
            return [LEFT, RIGHT, FLOOR][len(self.tried) - 1]

    never, later = Moving(["cup", "ball"], {}), Moving(["cup", "ball"], {})
    assert [region.word for region in never.locate(reuse="never")[-1].regions] == ["cup", "ball"]
    assert never.used == [[], ["cup"], ["cup", "ball"]]
    assert [region.word for region in later.locate(reuse="later", max_rounds=3)[-1].regions] == ["cup", "ball", "cup"]
    assert later.used == [[], ["cup"], ["ball"]]


def test_a_renamed_region_keeps_its_word_from_coming_again_at_once() -> None:
    """The word before is the one that was looked for, and it may be the region's new name, too."""
    scripted = Scripted(["cup", "ball"], {"cup": LEFT, "ball": RIGHT})
    [*_, last] = scripted.locate(reuse="later", naming="alone", max_rounds=2)
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
    rules: dict[str, Any] = {"apart": True, "reuse": "later", "max_rounds": 3, "min_area": 0.025}
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
