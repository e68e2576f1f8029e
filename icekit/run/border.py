"""The border between icekit and components: what they return is checked, so that a mistake shows as its maker's own.

Every function takes the component that returned something, (role, name), and raises a ``BreachError``. The message says
what it returned and what is right; ``Plugins.naming`` adds plugin, distribution and version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from icekit.plugins import BreachError
from icekit.protocols import (
    Backbone,
    BenchPicture,
    Candidate,
    Learned,
    Proposal,
    Score,
    Segmentation,
    Step,
    TrueConcept,
    View,
)
from icekit.run.directory import MAX_DIMENSIONS, WEIGHTS_FOLDERS, is_space

Component = tuple[str, str]
"""Role and registered name."""
SHOWN = 60
"""Most characters of what was returned that a message shows."""


def kind_of(value: object) -> str:
    """What somebody returned, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of {_type(value)} {list(value.shape)} on {value.device}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {' and '.join(sorted({type(one).__name__ for one in value}))}"
    if value is None:
        return "None"
    try:
        return f"{type(value).__name__} ({repr(value)[:SHOWN]})"
    except Exception:
        return type(value).__name__


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


@contextmanager
def unchanged(who: Component, **handed: Tensor) -> Iterator[None]:
    """What a component is handed within the block must be the same after it; handed: by what they are called."""
    before = {what: value.clone() for what, value in handed.items()}
    yield
    for what, value in handed.items():
        if value.shape != before[what].shape or not torch.equal(value, before[what]):
            raise BreachError(*who, f"changed the {what} that it was handed: it should change a copy (.clone())")


def view_unchanged(who: Component, view: View) -> AbstractContextManager[None]:
    """The same of a view."""
    parts = {"view's original": view.original, "view's pixels": view.pixels, "view's visible": view.visible}
    return unchanged(who, **parts)


def _check_tensor(who: Component, what: str, value: object, dtype: torch.dtype, shape: Sequence[int]) -> None:
    right = str(dtype).removeprefix("torch.")
    if not isinstance(value, Tensor):
        raise BreachError(*who, f"returned {kind_of(value)} as {what}: a tensor of {right} {list(shape)} is right")
    if value.dtype != dtype:
        raise BreachError(*who, f"returned {what} of dtype {_type(value)}: {right} is right")
    if tuple(value.shape) != tuple(shape):
        raise BreachError(*who, f"returned {what} of shape {list(value.shape)}: {list(shape)} is right")
    if value.device.type != "cpu":
        raise BreachError(*who, f"returned {what} on {value.device}: the CPU is right")


def _check_number(who: Component, what: str, value: object) -> None:
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise BreachError(*who, f"returned {kind_of(value)} as {what}: a float is right")
    if not math.isfinite(value):
        raise BreachError(*who, f"returned {value} as {what}: a finite number is right")


def _check_text(who: Component, what: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise BreachError(*who, f"returned {kind_of(value)} as {what}: text is right, not empty")


def _check_list(who: Component, values: object, kind: type, what: str) -> None:
    if not isinstance(values, list | tuple) or not all(isinstance(one, kind) for one in values):
        raise BreachError(*who, f"returned {kind_of(values)}: {what} is right")


# --- Stage one -------------------------------------------------------------------------------------------------------


def check_mask(who: Component, mask: object, size: Sequence[int], what: str = "a mask") -> None:
    """A mask, bool ``[H, W]`` on the CPU; size: the picture's (height, width)."""
    _check_tensor(who, what, mask, torch.bool, size)


def check_segmented(who: Component, found: object, size: Sequence[int]) -> None:
    """What ``segment`` returned: a mask, or a ``Segmentation``."""
    if isinstance(found, Segmentation):
        check_mask(who, found.mask, size)
        check_mask(who, found.erased, size, "what is erased")
    else:
        check_mask(who, found, size)


def check_proposals(who: Component, proposals: object, size: Sequence[int]) -> None:
    """What ``propose`` returned."""
    _check_list(who, proposals, Proposal, "a list of icekit.Proposal")
    for one in proposals:  # type: ignore[attr-defined]
        check_mask(who, one.mask, size)
        if not bool(one.mask.any()):
            raise BreachError(*who, "returned a mask without a pixel: every proposal is of something in the picture")
        if one.word is not None:
            _check_text(who, "a word", one.word)


def check_candidates(who: Component, candidates: object) -> None:
    """What ``retrieve`` returned."""
    _check_list(who, candidates, Candidate, "a list of icekit.Candidate")
    for one in candidates:  # type: ignore[attr-defined]
        _check_text(who, "a word", one.word)
        _check_number(who, f"the score of the word {one.word[:SHOWN]!r}", one.score)


def check_hints(who: Component, hints: object, words: Collection[str]) -> None:
    """What ``describe`` returned; words: those that it was asked about."""
    if not isinstance(hints, Mapping):
        raise BreachError(*who, f"described with {kind_of(hints)}: a mapping of words to probabilities is right")
    for word, share in hints.items():
        if word not in words:
            raise BreachError(*who, f"described with the word {word!r:.{SHOWN}}, which it was not asked about")
        _check_number(who, f"the probability of {word!r:.{SHOWN}}", share)
        if not 0 <= share <= 1:
            raise BreachError(*who, f"returned {share} as the probability of {word!r:.{SHOWN}}: 0 to 1 is right")


def check_space(who: Component, space: object) -> None:
    """What an ``Embedder`` calls its space."""
    if not is_space(space):
        raise BreachError(*who, f"has {kind_of(space)} as its space: a line of at most 200 characters is right")


def check_vector(who: Component, vector: object, length: int | None) -> None:
    """What ``embed`` returned; length: that of the vectors before."""
    if length is None and isinstance(vector, Tensor):
        length = vector.numel()
    _check_tensor(who, "a vector", vector, torch.float32, (length or 0,))
    if length and length > MAX_DIMENSIONS:
        raise BreachError(*who, f"returned a vector of {length} numbers: {MAX_DIMENSIONS} at most are kept")
    norm = float(vector.norm())  # type: ignore[attr-defined]
    if not abs(norm - 1) < 1e-3:  # not so where it is NaN, either
        raise BreachError(*who, f"returned a vector of length {norm:.4g}: 1 is right")


# --- Stage two -------------------------------------------------------------------------------------------------------


def check_step(who: Component, step: object) -> None:
    """What ``on_step`` was called with; whether the losses are finite is another matter."""
    if not isinstance(step, Step):
        raise BreachError(*who, f"called on_step with {kind_of(step)}: an icekit.Step is right")
    for loss, value in step.losses.items():
        if not isinstance(value, float | int) or isinstance(value, bool):
            raise BreachError(*who, f"called on_step with the loss {loss!r} as {kind_of(value)}: a float is right")


def check_learned(who: Component, learned: object, expected: Sequence[str], rows: Mapping[str, int]) -> None:
    """What ``learn`` returned.

    expected: the tokens. rows: text encoder -> length of a row.
    """
    if not isinstance(learned, Learned):
        raise BreachError(*who, f"returned {kind_of(learned)}: an icekit.Learned is right")
    if not isinstance(learned.tokens, Mapping):
        raise BreachError(*who, f"returned {kind_of(learned.tokens)} as tokens: a dictionary by token is right")
    missing = [token for token in expected if token not in learned.tokens]
    if missing:
        there = len(expected) - len(missing)
        raise BreachError(*who, f"returned {there} of {len(expected)} tokens: {_some(missing)} missing")
    if more := [str(token) for token in learned.tokens if token not in expected]:
        raise BreachError(*who, f"returned more tokens than it was asked for: {_some(more)} too many")
    for token, row in learned.tokens.items():
        if not isinstance(row, Mapping):
            raise BreachError(*who, f"returned {kind_of(row)} as the token {token}: a row by text encoder is right")
        if set(row) != set(rows):
            has, right = (" and ".join(map(repr, sorted(map(str, one)))) or "none" for one in (row, rows))
            raise BreachError(*who, f"returned the token {token} with rows for {has}: {right} is right")
        for encoder, vector in row.items():
            what = f"for the token {token} a row"
            _check_tensor(who, what, vector, torch.float32, (rows[encoder],))
            if not bool(vector.isfinite().all()):
                raise BreachError(*who, f"returned {what} with numbers that are not finite")
            if vector.requires_grad:
                raise BreachError(*who, f"returned {what} with a gradient: .detach() is right")
    for key, weight in {**learned.tuning.lora, **learned.tuning.weights}.items():
        if not isinstance(weight, Tensor):
            raise BreachError(*who, f"returned {kind_of(weight)} as the weight {key}: a tensor is right")
        if weight.dtype.is_floating_point and not bool(torch.isfinite(weight).all()):
            raise BreachError(*who, f"returned the weight {key} with numbers that are not finite")

    if learned.tuning and learned.tuning.folder not in WEIGHTS_FOLDERS:
        folders = " or ".join(WEIGHTS_FOLDERS)
        raise BreachError(*who, f"returned weights for {learned.tuning.folder!r}: {folders} is right")


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(token[:SHOWN] for token in tokens[:3])
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    return f"{shown}{more} {'are' if len(tokens) > 1 else 'is'}"


# --- The backbone ----------------------------------------------------------------------------------------------------


def check_backbone(who: Component, backbone: Any) -> None:
    """What a backbone says of itself, of which files and pictures are made."""
    size, rows = backbone.image_size, backbone.rows
    whole = isinstance(size, tuple | list) and len(size) == 2 and all(_is_count(one) for one in size)
    if not whole:
        raise BreachError(*who, f"has {kind_of(size)} as its image_size: (height, width) in pixels is right")
    if not isinstance(rows, Mapping) or not rows or not all(_is_count(one) for one in rows.values()):
        raise BreachError(*who, f"has {kind_of(rows)} as its rows: text encoder -> length of its rows is right")
    if not isinstance(backbone.identity, str) or not backbone.identity:
        raise BreachError(*who, f"has {kind_of(backbone.identity)} as its identity: text is right")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_points(who: Component, points: object, count: int) -> None:
    """What ``embed_texts`` returned for so many texts."""
    if not isinstance(points, Tensor) or points.ndim != 2 or len(points) != count:
        raise BreachError(*who, f"returned {kind_of(points)} as points of {count} texts: [{count}, P] is right")
    if not bool(points.isfinite().all()):
        raise BreachError(*who, "returned points of texts with numbers that are not finite")


def draw(
    who: Component,
    backbone: Backbone,
    prompts: Sequence[str],
    on_image: Callable[[int, Image.Image], None],
    *,
    skip: Collection[int] = (),
    **options: Any,
) -> list[Image.Image]:
    """``backbone.generate``, every picture checked before ``on_image`` is called with it."""
    height, width = backbone.image_size
    told: set[int] = set()

    def checked(place: int, picture: Image.Image) -> None:
        if place in told or place in skip or place not in range(len(prompts)):
            raise BreachError(*who, f"called on_image for picture {place}, which was not asked for or made before")
        if not isinstance(picture, Image.Image):
            raise BreachError(*who, f"generated {kind_of(picture)}: a PIL image is right")
        if picture.size != (width, height):
            raise BreachError(
                *who, f"generated a picture of {picture.size}: (width, height) {(width, height)} is right"
            )
        told.add(place)
        on_image(place, picture)

    pictures = backbone.generate(prompts, skip=skip, on_image=checked, **options)
    wanted = len(set(range(len(prompts))) - set(skip))
    if len(told) != wanted or not isinstance(pictures, list | tuple) or len(pictures) != wanted:
        raise BreachError(*who, f"generated {len(told)} of {wanted} pictures and returned {kind_of(pictures)}")
    return list(pictures)


# --- The bench -------------------------------------------------------------------------------------------------------


def check_scores(who: Component, scores: object, columns: Collection[str]) -> None:
    """What ``measure`` returned. A value that is not finite is none: ratios of nothing are measured by many."""
    if not isinstance(scores, Mapping):
        raise BreachError(*who, f"returned {kind_of(scores)}: a mapping of columns to icekit.Score is right")
    for column, score in scores.items():
        if column not in columns:
            raise BreachError(*who, f"measured {column!r:.{SHOWN}}, which is none of its columns: {', '.join(columns)}")
        if not isinstance(score, Score):
            raise BreachError(*who, f"returned {kind_of(score)} in the column {column!r}: an icekit.Score is right")
        if score.value is not None and (not isinstance(score.value, float | int) or isinstance(score.value, bool)):
            raise BreachError(
                *who, f"returned {kind_of(score.value)} in the column {column!r}: a float or None is right"
            )
        if isinstance(score.prompts, str) or not all(isinstance(one, str) for one in score.prompts):
            raise BreachError(
                *who, f"returned {kind_of(score.prompts)} as prompts of {column!r}: a list of texts is right"
            )


def check_bench_picture(who: Component, given: object, size: Sequence[int]) -> BenchPicture:
    """One of what ``pictures`` returned; size: the (height, width) of the backbone's pictures."""
    if not isinstance(given, BenchPicture):
        raise BreachError(*who, f"has {kind_of(given)} among its pictures: an icekit.BenchPicture is right")
    _check_text(who, "a picture's name", given.name)
    for number, concept in enumerate(given.concepts):
        where = f"mask {number} of picture {given.name!r}"
        if not isinstance(concept, TrueConcept):
            raise BreachError(*who, f"has {kind_of(concept)} in picture {given.name!r}: an icekit.TrueConcept is right")
        check_mask(who, concept.mask, size, where)
        if not bool(concept.mask.any()):
            raise BreachError(*who, f"returned {where} without a pixel: every concept is somewhere")
        if concept.word is not None:
            _check_text(who, f"the word of {where}", concept.word)
    return given
