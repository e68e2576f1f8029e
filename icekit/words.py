"""Words that users give: lists in settings, vocabularies in files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

from pydantic import BeforeValidator

from icekit.files import read_text
from icekit.paths import setting_path
from icekit.protocols import InputError

MAX_WORDS, MAX_WORD = 200_000, 300
"""Most words of a vocabulary, and most characters of one: models read about 77 pieces of words."""


def one_or_more(value: Any) -> Any:
    """``"a {}"`` -> ``["a {}"]``: a setting that takes a list takes a single value, too."""
    return [value] if isinstance(value, str) else value


def split_commas(value: Any) -> Any:
    """``"cup, ball"`` -> ``["cup", "ball"]``, so that ``--set retriever.words=cup,ball`` needs no brackets."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def one_place(text: str, what: str) -> str:
    """The text, if ``{}`` is in it once: that is where something goes.

    Raises:
        ValueError: it is not; what: what goes there.
    """
    if text.count("{}") != 1:
        raise ValueError(f"{text!r}: must have {{}} exactly once, where {what}")
    return text


WordList = Annotated[tuple[str, ...], BeforeValidator(split_commas)]


def read_vocabulary(vocabulary: str | Sequence[str] | None) -> list[str]:
    """The words of a list, of a text file (one a line, ``#`` begins a comment), or icekit's own; each once.

    Raises:
        InputError: no such file, not text, or no word in it.
    """
    if vocabulary is None:
        lines = files("icekit").joinpath("vocabulary", "things.txt").read_text(encoding="utf-8").splitlines()
    elif isinstance(vocabulary, str):
        file = setting_path(vocabulary, "retriever.vocabulary")
        try:
            lines = read_text(file).splitlines()
        except FileNotFoundError as error:
            raise InputError(f"retriever.vocabulary: no such file: {vocabulary}") from error
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(
                f"retriever.vocabulary: {vocabulary} is not a text file with one word a line: {why}"
            ) from error
    else:
        lines = list(vocabulary)
    words = list(dict.fromkeys(word for line in lines if (word := line.partition("#")[0].strip().lower())))
    if len(words) > MAX_WORDS:
        source = vocabulary if isinstance(vocabulary, str) else "the list"
        raise InputError(
            f"retriever.vocabulary: {source} has {len(words)} words, and can have {MAX_WORDS}: each is compared with "
            "every view of the image"
        )
    long = next((word for word in words if len(word) > MAX_WORD), None)
    if long is not None:
        raise InputError(f"retriever.vocabulary: {long[:40]!r}... has {len(long)} characters: give one word a line")
    if not words:
        source = vocabulary if isinstance(vocabulary, str) else "the list"
        raise InputError(f"retriever.vocabulary: no word in {source}: it needs one or more, one a line")
    return words
