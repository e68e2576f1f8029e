"""The grammar of a composition's prompt: references to concepts among plain words, their weights, and alternatives.

``{a}`` is the concept bound to ``a``, ``{a.colour}`` its colour token, ``{a - colour}`` the concept without it, and
``{a.colour:1.3}`` more of it. ``{{`` and ``}}`` are braces. In a sweep ``{a|b}`` and ``[red|{a.colour}]`` are
alternatives. Nothing here knows a model: what a reference stands for are names of tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from icekit.protocols import InputError, is_instance
from icekit.settings import nearest
from icekit.wording import option

MAX_WEIGHT = 3.0
"""More of a token than three times what it was learned to be is noise on every model."""
NAME = re.compile(r"[A-Za-z]\w*")
"""What can stand for a concept."""


@dataclass(frozen=True)
class Reference:
    """What stands in braces.

    typed: all of it, without the braces. place: of its brace in the prompt, from 0. name: the concept's.
    part: the one token that is meant, or None. without: the tokens that are left out. weight: see ``weighted_row``.
    """

    typed: str
    place: int
    name: str
    part: str | None = None
    without: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Alternative:
    """One of several. label: as typed, without the braces of a lone reference."""

    label: str
    pieces: tuple[str | Reference, ...]


@dataclass(frozen=True)
class Choice:
    """Alternatives, of which every picture of a sweep has one."""

    alternatives: tuple[Alternative, ...]


Piece = str | Reference | Choice


@dataclass(frozen=True)
class Weighted:
    """A token that is used with a weight: the concept's name, the token's part and the weight."""

    name: str
    part: str
    weight: float


@dataclass(frozen=True)
class Expanded:
    """A prompt with tokens in the place of its references.

    text: it. weighted: the tokens in it that have a weight other than 1, by the names that they have there.
    """

    text: str
    weighted: dict[str, Weighted]


def parse(prompt: str, *, sweep: bool = False) -> tuple[Piece, ...]:
    """Read a prompt.

    Args:
        prompt: as typed.
        sweep: whether it may have alternatives; without, square brackets are plain text.

    Raises:
        InputError: the prompt is empty, or a brace or what is in it is wrong: says where, and what would be right.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: give words, or placeholders as in 'a photo of {a}'")
    return tuple(_Reader(prompt, sweep).pieces())


def choices(pieces: Sequence[Piece]) -> list[Choice]:
    """The alternations of a prompt, in its order."""
    return [piece for piece in pieces if isinstance(piece, Choice)]


def choose(pieces: Sequence[Piece], chosen: Sequence[int]) -> list[str | Reference]:
    """A prompt with one alternative in the place of each alternation.

    chosen: the place of the alternative, one for each of ``choices(pieces)``.
    """
    left = iter(chosen)
    flat: list[str | Reference] = []
    for piece in pieces:
        flat += piece.alternatives[next(left)].pieces if isinstance(piece, Choice) else [piece]
    return flat


def expand(prompt: str, pieces: Sequence[str | Reference], tokens: Mapping[str, Mapping[str, str]]) -> Expanded:
    """Put tokens in the place of references.

    ``{a}`` is the instance and the category. The instance is all that makes an object this one, its colour too, so of
    ``{a - colour}`` it is no part: that is the category and the other attributes, in the order in which they were
    learned. ``{a - instance}`` and ``{a - category}`` are the other half of ``{a}``.

    Args:
        prompt: as typed, for messages.
        pieces: of it.
        tokens: the concept's name -> part -> token, ``<...>``.

    Raises:
        InputError: an unknown name or part, nothing is left of a concept, or the prompt comes to nothing.
    """
    text, weighted = "", {}
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        own, words = tokens.get(piece.name, {}), []
        for part in _parts(prompt, piece, tokens):
            token = own[part]
            if piece.weight != 1:
                token = f"{token[:-1]}:{str(piece.weight).removesuffix('.0')}>"
                weighted[token] = Weighted(piece.name, part, piece.weight)
            words.append(token)
        text += " ".join(words)
    if not text.strip():
        raise InputError("the prompt is empty: give words, or placeholders as in 'a photo of {a}'")
    return Expanded(text, weighted)


def weighted_row(row: Tensor, plain: Tensor, weight: float) -> Tensor:
    """A token's row with a weight: ``plain + weight (row - plain)``, on the line from its plain word through itself.

    0 is the plain word, 1 the row itself, bit for bit, and above 1 what was learned is overdone. It needs no more than
    rows, and so it means the same on every model; weights of other programs scale what a text encoder gives out.

    Args:
        row: the token's, float32 ``[dim]``.
        plain: that of the word in its place, float32 ``[dim]``.
        weight: 0 to ``MAX_WEIGHT``, no unit.

    Returns:
        float32 ``[dim]``.
    """
    return row if weight == 1 else plain + weight * (row - plain)


def plain_word(part: str, label: str) -> str:
    """The word in whose place a token of a concept stands: the attribute's name, or what the concept is called.

    part: ``"category"``, ``"instance"`` or an attribute's name. label: the concept's, words joined by ``-``.
    """
    return (label if part == "category" or is_instance(part) else part).replace("-", " ").replace("_", " ")


def _parts(prompt: str, reference: Reference, tokens: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The parts of a concept that a reference stands for, in the order of the prompt."""
    where = f"prompt {prompt!r} has {{{reference.typed}}} at character {reference.place + 1}, but"
    if reference.name not in tokens:
        raise InputError(f"{where} no concept {reference.name!r}: {nearest(reference.name, tokens)}")
    own = tokens[reference.name]
    for part in (*reference.without, *([reference.part] if reference.part is not None else [])):
        if part not in own:
            raise InputError(f"{where} {reference.name} has no token {part!r}: {nearest(part, own)}")
    if reference.part is not None:
        return [reference.part]
    whole = [part for part in own if is_instance(part)] + [part for part in own if part == "category"]
    attributes = [part for part in own if part not in whole]
    if any(part in attributes for part in reference.without):
        whole = [part for part in ("category",) if part in own] + attributes
    left = [part for part in whole if part not in reference.without]
    if not left and reference.without:
        raise InputError(f"{where} that leaves nothing of {reference.name}: leave less out")
    if not left:
        example = next(iter(own), "colour")
        raise InputError(
            f"{where} {reference.name} has neither an instance nor a category: name one of its tokens, as in "
            f"{{{reference.name}.{example}}}"
        )
    return left


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same, with bits of plain text that follow one another as one."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text


class _Reader:
    """Reads one prompt from left to right. at: the place of the next character."""

    def __init__(self, prompt: str, sweep: bool) -> None:
        self.prompt, self.sweep = prompt, sweep
        self.at = 0

    def pieces(self) -> Iterator[Piece]:
        """All of it."""
        return _joined(self._pieces(len(self.prompt), inside=False))

    def _pieces(self, end: int, inside: bool) -> Iterator[Piece]:
        """What is before ``end``, plain text in bits. inside: whether that is an alternative."""
        while self.at < end:
            here, pair = self.prompt[self.at], self.prompt[self.at : self.at + 2]
            if pair in ("{{", "}}"):
                self.at += 2
                yield here
            elif here == "{":
                yield self._braces(inside)
            elif here == "}":
                raise self._error(self.at, "has a '}' that closes nothing: '}}' is a brace in plain text")
            elif here == "[" and self.sweep and (close := self._bracket()) is not None:
                if inside:
                    raise self._error(self.at, "has alternatives within alternatives: write them out, side by side")
                yield self._brackets(close)
            else:
                self.at += 1
                yield here

    def _braces(self, inside: bool) -> Reference | Choice:
        begin = self.at
        close = self.prompt.find("}", begin)
        if close < 0 or "{" in self.prompt[begin + 1 : close]:
            raise self._error(begin, "has a '{' that is not closed: write {a}, or '{{' for a brace in plain text")
        typed = self.prompt[begin + 1 : close]
        self.at = close + 1
        several = typed.split("|")
        if len(several) == 1:
            return self._reference(typed, begin)
        if not self.sweep:
            raise self._error(begin, f"has alternatives, {{{typed}}}: only a sweep ({option('sweep')}) takes them")
        if inside:
            raise self._error(begin, "has alternatives within alternatives: write them out, side by side")
        references = [self._reference(one, begin) for one in several]
        return Choice(tuple(Alternative(one.typed, (one,)) for one in references))

    def _bracket(self) -> int | None:
        """Where the bracket that is open here is closed, if there are alternatives in it."""
        close = self.prompt.find("]", self.at)
        inner = re.sub(r"\{[^{}]*\}", "", self.prompt[self.at : close]) if close >= 0 else ""
        return close if "|" in inner else None

    def _brackets(self, close: int) -> Choice:
        self.at += 1
        alternatives = []
        while self.at <= close:
            end = self._next_bar(close)
            label = self.prompt[self.at : end].strip()
            pieces = [piece for piece in _joined(self._pieces(end, inside=True)) if not isinstance(piece, Choice)]
            if len(pieces) == 1 and isinstance(pieces[0], Reference):
                label = pieces[0].typed
            alternatives.append(Alternative(label, tuple(pieces)))
            self.at = end + 1
        return Choice(tuple(alternatives))

    def _next_bar(self, close: int) -> int:
        """Where this alternative ends: at a ``|`` outside of braces, or at the bracket's end."""
        depth = 0
        for place in range(self.at, close):
            depth += {"{": 1, "}": -1}.get(self.prompt[place], 0)
            if self.prompt[place] == "|" and depth <= 0:
                return place
        return close

    def _reference(self, typed: str, place: int) -> Reference:
        """What stands between braces, or between bars in them."""
        typed = typed.strip()
        body, colon, number = typed.rpartition(":")
        weight = 1.0
        if colon:
            weight = self._weight(typed, number, place)
        else:
            body = typed
        first, *without = (one.strip() for one in re.split(r"\s-\s", body))
        name, dot, part = (one.strip() for one in first.partition("."))
        if not NAME.fullmatch(name):
            raise self._error(place, f"has {{{typed}}}, but {self._why_no_name(name)}")
        if without and dot:
            raise self._error(
                place, f"has {{{typed}}}, which takes a token from a token: {{{name} - {without[0]}}} is the concept "
                "without it"
            )  # fmt: skip
        return Reference(typed, place, name, part if dot else None, tuple(dict.fromkeys(without)), weight)

    def _why_no_name(self, name: str) -> str:
        head, minus, rest = name.partition("-")
        if minus and NAME.fullmatch(head.strip()) and rest.strip():
            return f"a minus has spaces around it: {{{head.strip()} - {rest.strip()}}}"
        return f"no concept {name!r} can be: write {{a}}, {{a.colour}}, {{a - colour}} or {{a.colour:1.3}}"

    def _weight(self, typed: str, number: str, place: int) -> float:
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not 0 <= weight <= MAX_WEIGHT:
            raise self._error(
                place, f"has {{{typed}}}, where {number.strip()!r} is no weight: write a number from 0 to "
                f"{MAX_WEIGHT:g}, as in {{a.colour:1.3}}"
            )  # fmt: skip
        return weight

    def _error(self, place: int, problem: str) -> InputError:
        """A complaint that says where."""
        return InputError(f"prompt {self.prompt!r} {problem} (at character {place + 1})")
