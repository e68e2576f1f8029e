"""What every settings model is strict about: numbers are numbers, text is text, and ``~`` is a home directory."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = (2 - 2**-23) * 2.0**127
"""The largest number of 32 bits, in which models compute."""


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


class StrictSettings(BaseModel):
    """Base of settings models: unknown keys, booleans for numbers and numbers that are not finite are refused.

    Where text is wanted, what looks like a number, a date or a boolean is text as it was typed. In a path ``~`` is
    replaced.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        return as_meant(value, leaves(cls.model_fields[str(info.field_name)].annotation))


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


def as_meant(value: Any, kinds: frozenset[Any]) -> Any:
    """A value of a settings file or command line as a setting that is made of these types takes it.

    Raises:
        ValueError: a boolean where a number is wanted, a number that is not finite or too large, no such user's home.
    """
    if Any in kinds:
        return value
    if isinstance(value, Mapping):
        return {key: as_meant(one, kinds) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_meant(one, kinds) for one in value]
    if kinds - {NoneType} and kinds <= {str, Path, NoneType}:
        value = _as_text(value)
        if Path in kinds and str(value).startswith("~"):
            try:
                return at_home(value)
            except ValueError as error:
                raise ValueError(f"a path of this machine: {error}") from error
        return value
    if kinds & {int, float}:
        return _as_number(value, kinds)
    return value


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return getattr(value, "typed", None) or str(value)
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def at_home(path: str | Path) -> Path:
    """A path as typed, with ``~`` and ``~name`` replaced by a home directory.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no such user, {Path(path).parts[0]} is no user's home directory here") from error


def _as_number(value: Any, kinds: frozenset[Any]) -> Any:
    if isinstance(value, bool) and bool not in kinds:
        raise ValueError("a number, not true or false")
    number = value
    if isinstance(value, str) and str not in kinds:
        try:
            number = float(value)
        except ValueError:
            return value
    if isinstance(number, int):
        if number.bit_length() > 64:
            raise ValueError("a number of at most 64 bits")
        return value if isinstance(value, bool) else int(number)
    if isinstance(number, float):
        if not math.isfinite(number) or abs(number) > LARGEST:
            raise ValueError(f"a finite number, at most {LARGEST:.1e}")
        return float(number) if isinstance(value, float) else value
    return value
