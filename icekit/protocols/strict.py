"""What every settings model is strict about: numbers are numbers, text is text, and ``~`` is a home directory."""

from __future__ import annotations

import datetime
import errno
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST, SMALLEST = 1e9, 1e-30
"""Bounds of a number that is not zero and has no bound of its own. Models compute in 32 bits, from 1.2e-38 to 3.4e38: a
number's square, and what it is divided by, should stay well within them."""


class TypedInt(int):
    """An integer that remembers how it was typed, for it may be meant as text."""

    typed: str


class TypedFloat(float):
    """A float that remembers how it was typed, for it may be meant as text."""

    typed: str


def typed_number(value: float, text: str) -> float:
    """The number with its text: a ``TypedInt`` or a ``TypedFloat``."""
    number: TypedInt | TypedFloat = TypedInt(value) if isinstance(value, int) else TypedFloat(value)
    number.typed = text
    return number


CHANGES_NO_RESULT: dict[str, Any] = {"changes_no_result": True}
"""For ``Field(..., json_schema_extra=CHANGES_NO_RESULT)``: a setting of where, how fast or how safely work is done,
and not of what comes out. A run or a bench that goes on takes a new value of it."""


def changes_no_result(model: type[BaseModel]) -> frozenset[str]:
    """The settings of this model that say so."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return frozenset(name for name, one in extras.items() if isinstance(one, dict) and one.get("changes_no_result"))


def needs_memory(least: Any) -> dict[str, Any]:
    """For ``Field(..., json_schema_extra=needs_memory(1))``: a setting that memory depends on.

    least: the value with which it needs least; where memory is at an end, a message says so.
    """
    return {"least_memory": least}


def least_memory(model: type[BaseModel]) -> dict[str, Any]:
    """The settings of this model that memory depends on, with the value with which each needs least."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {
        name: one["least_memory"] for name, one in extras.items() if isinstance(one, dict) and "least_memory" in one
    }


@dataclass(frozen=True)
class Stored:
    """Marks a setting that a run's files keep otherwise than it was typed: ``model: Annotated[str, Stored(how)]``.

    how: of a value as JSON has it. It never fails: what cannot be kept so is kept as it is.
    """

    how: Callable[[Any], Any]


def as_stored(settings: BaseModel) -> dict[str, Any]:
    """Settings as files keep them, JSON types."""
    values = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Stored):
                values[name] = mark.how(values[name])
    return values


class StrictSettings(BaseModel):
    """Base of settings models: unknown keys, booleans for numbers and numbers that are not finite are refused.

    So are numbers beyond ``LARGEST``, unless a field says by ``le`` or ``lt`` that it goes further. Where text is
    wanted, what looks like a number, a date or a boolean is text as it was typed. In a path ``~`` is replaced.
    """

    # Built when first used, for starting is quick. What another model refuses is written as it was given until then.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True, ser_json_inf_nan="constants"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        bounds = (getattr(one, key, None) for one in field.metadata for key in ("le", "lt"))
        largest = max((float(one) for one in bounds if one is not None), default=LARGEST)
        return as_meant(value, leaves(field.annotation), max(LARGEST, largest))


def leaves(annotation: Any) -> frozenset[Any]:
    """The types of which an annotation is made: ``tuple[str, ...] | None`` -> str, NoneType; of mappings the values'.

    A literal is ``Literal``, whichever it is.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None:
        return frozenset([annotation])
    if origin is Literal:
        return frozenset([Literal])
    if origin is Annotated or (isinstance(origin, type) and issubclass(origin, Mapping)):
        arguments = arguments[:1] if origin is Annotated else arguments[1:]
    return frozenset().union(*(leaves(one) for one in arguments if not isinstance(one, list | EllipsisType)))


def as_meant(value: Any, kinds: frozenset[Any], largest: float = LARGEST) -> Any:
    """A value of a settings file or command line as a setting that is made of these types takes it.

    Raises:
        ValueError: a boolean where a number is wanted, a number that is not finite, too large or too small, no such
            user's home, an empty path, text that no file can hold.
    """
    if Any in kinds:
        return value
    if isinstance(value, Mapping):
        return {key: as_meant(one, kinds, largest) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_meant(one, kinds, largest) for one in value]
    _check_text(value)
    if kinds - {NoneType} and kinds <= {str, Path, NoneType}:
        value = _as_text(value)
        if Path in kinds and value == "":
            raise ValueError("a path, not empty text")
        if Path in kinds and isinstance(value, str | Path):
            try:
                found = at_home(value)
                check_findable(found)
            except ValueError as error:
                raise ValueError(f"a path of this machine: {error}") from error
            return found if str(value).startswith("~") else value
        return value
    if kinds & {int, float}:
        return _as_number(value, kinds, largest)
    return value


def _check_text(value: Any) -> None:
    """Refuse what cannot be in a settings file or a path."""
    text = str(value) if isinstance(value, str | Path) else ""
    if "\0" in text:
        raise ValueError("text without NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text in UTF-8: give a file with such a name another one") from None


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return getattr(value, "typed", None) or str(value)
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def check_findable(path: Path) -> None:
    """Whether a file can be looked for by this name, whether or not it is there.

    Raises:
        ValueError: it cannot; the message is the system's.
    """
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.EINVAL):
            raise ValueError((error.strerror or str(error)).lower()) from error


def at_home(path: str | Path) -> Path:
    """A path as typed, with ``~`` and ``~name`` replaced by a home directory.

    Raises:
        ValueError: there is no such user.
    """
    plain = Path(path)
    if not str(path).startswith("~"):
        # "./~x" is a folder here; without its "./" it would be somebody's home the next time.
        return Path(os.path.abspath(plain)) if str(plain).startswith("~") else plain
    try:
        return plain.expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no such user, {plain.parts[0]} is no user's home directory here") from error


def _as_number(value: Any, kinds: frozenset[Any], largest: float) -> Any:
    if isinstance(value, bool) and bool not in kinds:
        raise ValueError("a number, not true or false")
    number = value
    if isinstance(value, str) and str not in kinds:
        try:
            number = float(value)
        except ValueError:
            return value
    if isinstance(number, int):
        if abs(number) > largest:
            raise ValueError(f"a number of at most {largest:g}")
        return value if isinstance(value, bool) else int(number)
    if isinstance(number, float):
        if not math.isfinite(number) or abs(number) > largest:
            raise ValueError(f"a finite number, at most {largest:g}")
        if 0 < abs(number) < SMALLEST:
            raise ValueError(f"0, or a number of at least {SMALLEST:g}")
        return float(number) if isinstance(value, float) else value
    return value
