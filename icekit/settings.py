"""A run's settings: unknown keys are refused, wrong values explained, and they come in layers.

Later layers win: defaults, the backbone's own preset, the one that was chosen, a settings file, ``--set KEY=VALUE``,
command-line options. A preset is a settings file that has a name: ``--preset published``, or ``preset = "published"``
in a file. In a preset the settings of a component are in a table of its name (``[learner.ice]``), for it does not know
which one will be chosen.

A settings file has icekit's own settings as top-level keys, the components' names in the table ``[components]`` and
each component's settings in a table of its own::

    max_concepts = 4
    attributes = ["colour", "material"]

    [components]
    backbone = "sd21"

    [learner]
    steps = 400

An attribute needs no plugin: a table ``[attribute.gloss]`` with ``anchor`` and ``words`` makes one that ``attributes``
can name.

On the command line the same are ``--set max_concepts=4``, ``--set components.backbone=sd21`` (or ``--backbone sd21``)
and ``--set learner.steps=400``. ``"none"`` is None, for a setting that may be: TOML has no word for it.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from icekit.files import read_text
from icekit.paths import user_path
from icekit.protocols import InputError
from icekit.protocols.strict import CHANGES_NO_RESULT, StrictSettings, typed_number
from icekit.wording import is_typed

Role = Literal["backbone", "retriever", "segmentor", "learner"]
ROLES: tuple[Role, ...] = ("backbone", "retriever", "segmentor", "learner")


class Components(StrictSettings):
    """Which plugin does what, by registered name."""

    backbone: str = Field("sd21", description="the pre-trained text-to-image model")
    retriever: str = Field("clip", description="what finds words for the image")
    segmentor: str = Field("xattn", description="what finds a word's place in the image")
    learner: str = Field("ice", description="what learns the tokens")


class AttributeSettings(StrictSettings):
    """An attribute that needs no plugin, a table ``[attribute.NAME]``: see ``protocols.Attribute``."""

    anchor: str = Field(min_length=1, description="the text that stands for the attribute itself")
    words: tuple[str, ...] = Field(min_length=1, description="the words that a learned token is named with")
    aliases: tuple[str, ...] = Field((), description="other spellings of the name")


class ImageSettings(StrictSettings):
    """How the picture is brought into the model's shape."""

    fit: Literal["whole", "square"] = Field(
        "whole",
        description="whole: nothing is cut, the model works in the picture's proportions, on about as many pixels as "
        "it was trained at; square: the middle is cut out in the model's own shape (published). With "
        "backbone.image_size the middle is cut out in that shape",
    )


class Settings(StrictSettings):
    """All settings of a run. The components' own ones are checked against the components' models by ``resolve``."""

    attributes: tuple[str, ...] = Field(("colour", "material"), description="intrinsic attributes to learn tokens for")
    max_concepts: int = Field(10, ge=1, le=10_000, description="stop looking after this many concepts")
    max_rounds: int | None = Field(
        None,
        ge=1,
        description="stop looking after this many words, whether or not they were found in the image; none: no limit",
    )
    min_visible: float = Field(
        0.10, ge=0, lt=1, description="stop looking when this share of the image or less is not yet part of a concept"
    )
    min_area: float = Field(0.01, ge=0, lt=1, description="a region smaller than this share of the image is not taken")
    same_word: Literal["apart", "parts", "once"] = Field(
        "apart",
        description="when a word is several concepts, as two dogs are. apart: the parts of its mask that lie apart, by "
        "a quarter of the smaller one's side or more, each of at least min_area; and the word may come again for "
        "another of its kind. parts: each part of its mask that does not touch another, not even at a corner, and the "
        "word may come again when another was found in between (published). once: never",
    )
    naming: Literal["retrieved", "alone", "described"] = Field(
        "described",
        description="retrieved: a region keeps the word that it was found by (paper); alone: the retriever looks at "
        "each region alone, names it anew, and cuts it at a narrow place if two words fit its parts "
        "better than one fits the whole; described: as alone, and the retriever says how well each word "
        "of each attribute fits, which learners may start from",
    )
    erase: Literal["inpaint", "black", "mean"] = Field(
        "inpaint",
        description="what retrievers and segmentors see in the place of a concept that was found: a continuation of "
        "its surroundings, black, or the mean colour of the rest",
    )
    samples: int = Field(1, ge=0, le=10_000, description="images generated for each concept and each of its attributes")
    words_alone: bool = Field(
        True,
        description="beside each sample, generate one from plain words and the same noise, to show what learning added",
    )
    sample_steps: int | None = Field(
        None, ge=1, le=1000, description="denoising steps of a generated image; none: the backbone's own"
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="classifier-free guidance of generated images: larger follows the prompt more; none: the "
        "backbone's own",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed that every random choice follows from")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="where the models run", json_schema_extra=CHANGES_NO_RESULT
    )
    exporters: tuple[str, ...] = Field(
        ("report",),
        description="exporters that write into the run directory when the run is complete",
        json_schema_extra=CHANGES_NO_RESULT,
    )
    preset: str | None = Field(
        None,
        min_length=1,
        description="name of a preset, a named set of settings; what is given otherwise is put over it",
    )
    attribute: dict[str, AttributeSettings] = Field(
        {},
        description="attributes of one's own, a table [attribute.NAME] each with anchor and words, beside those of "
        "plugins; attributes says by name which ones are learned",
    )
    image: ImageSettings = Field(ImageSettings(), description="how the picture is brought into the model's shape")
    components: Components = Field(Components(), description="which plugin does what")
    backbone: dict[str, Any] = Field({}, description="settings of the backbone")
    retriever: dict[str, Any] = Field({}, description="settings of the retriever")
    segmentor: dict[str, Any] = Field({}, description="settings of the segmentor")
    learner: dict[str, Any] = Field({}, description="settings of the learner")
    exporter: dict[str, dict[str, Any]] = Field(
        {}, description="settings of exporters, a table each: [exporter.NAME]", json_schema_extra=CHANGES_NO_RESULT
    )

    @field_validator("backbone", "retriever", "segmentor", "learner", "exporter", mode="before")
    @classmethod
    def _not_deep(cls, values: Any) -> Any:
        if _is_deep(values):
            raise ValueError(f"values that are nested at most {MAX_DEPTH} deep")
        return values

    def __init__(self, **values: Any) -> None:
        """Settings by name, as in a settings file; ``backbone="tabletop"`` is short for ``components``.

        Raises:
            InputError: an unknown key or a wrong value; the message names the nearest right one.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_explained(Settings, error)) from error

    @model_validator(mode="before")
    @classmethod
    def _names_components(cls, values: Any) -> Any:
        return spread(values) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _says_naming(cls, values: Any) -> Any:
        """Settings files of earlier versions had three flags; which of the three values they mean is for a person."""
        gone = [key for key in ("rename", "divide", "describe") if isinstance(values, Mapping) and key in values]
        if gone:
            keys = " and ".join(repr(key) for key in gone)
            raise ValueError(
                f"there is no setting {keys} any more: set naming to retrieved (a region keeps its first word), "
                "alone (named anew and divided, looking at it alone) or described (and its attributes' words sought)"
            )
        if isinstance(values, Mapping) and (gone := [key for key in ("apart", "reuse") if key in values]):
            raise ValueError(
                f"there is no setting {' and '.join(map(repr, gone))} any more: set same_word to apart (parts of a "
                "word's mask that lie apart are concepts), parts (all parts are, and words come again; published) or "
                "once (a word is one concept)"
            )
        return values

    def name_of(self, role: Role) -> str:
        """The registered name of the component that plays this role."""
        return str(getattr(self.components, role))

    def values_of(self, role: Role) -> dict[str, Any]:
        """That component's settings, as given."""
        return dict(getattr(self, role))

    def given(self) -> dict[str, Any]:
        """What was set by somebody rather than left at its default, nested as in a settings file."""
        return self.model_dump(mode="json", exclude_unset=True)

    def to_toml(self) -> str:
        """The settings as a settings file."""
        return tomli_w.dumps(_spelled_out(self.model_dump(mode="json")))


def of_run_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run as its directory has them, in today's words.

    Before ``same_word`` there were two: ``apart``, by which each part of a mask was a concept, and ``reuse``. Before
    ``image.fit`` each picture was cut.
    """
    today: dict[str, Any] = {"image": {"fit": "square"}, **values}
    if "apart" in today:
        today["same_word"] = "parts" if today["apart"] else "once"
    return {key: value for key, value in today.items() if key not in ("apart", "reuse")}


Model = TypeVar("Model", bound=BaseModel)
NONE = "none"
"""None in a settings file and on the command line, for a setting that may be None."""
MAX_DEPTH = 16
"""How deep a settings file may nest its values: more than any setting needs, less than makes Python give up."""
MAX_PROBLEMS = 3
"""Most wrong settings that a message names."""
MAX_SHOWN = 160
"""Most characters of a wrong value that a message shows."""
BENCH_TABLES = ("metric", "bench")
"""Tables of a preset that are for ``icekit bench`` alone; a run passes them over."""


@dataclass(frozen=True)
class Preset:
    """A named set of settings.

    text: the file. summary: its first line, a comment. values: nested, as in a settings file; besides a run's settings
        it may have the tables ``BENCH_TABLES``. Settings of components are in tables of their names. One with
        ``preset = "other"`` is that one with its own put over it.
    """

    name: str
    text: str
    summary: str
    values: dict[str, Any]

    @classmethod
    def read(cls, name: str, file: Path) -> Preset:
        """A preset from its TOML file.

        Raises:
            InputError: the file cannot be read, one of its own keys is unknown, or it does not say which component a
                setting is for. The components' own keys are not looked at.
        """
        text = _read(file)
        values = _values_of(text, file)
        validate(Settings, {key: value for key, value in values.items() if key not in BENCH_TABLES})
        for role in (*ROLES, "metric", "exporter"):
            table = values.get(role, {})
            for key, value in table.items() if isinstance(table, Mapping) else [("", table)]:
                if not isinstance(value, Mapping):
                    raise InputError(
                        f"preset {name!r} does not say which {role} its setting {f'{role}.{key}'!r} is for: "
                        f"put it under [{role}.NAME]"
                    )
        summary = text.partition("\n")[0].lstrip("# ") if text.startswith("#") else ""
        return cls(name, text, summary, values)


def load_settings(
    config: Path | None = None, assignments: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> Settings:
    """Put the layers together: a settings file, ``KEY=VALUE`` assignments (keys with dots), options (nested, they win).

    Raises:
        InputError: the file cannot be read, an assignment is malformed, or a key or value is wrong.
    """
    values: dict[str, Any] = {}
    if config is not None:
        values = read_settings_file(config)
        try:
            validate(Settings, values)
        except InputError as error:
            raise InputError(f"settings file {config}: {error}") from error
    for assignment in assignments:
        values = merge(values, spread(parse_assignment(assignment)))
    if options:
        validate(Settings, values)  # what an option replaces must be right as well
    return validate(Settings, merge(values, options or {}))


def read_settings_file(path: Path) -> dict[str, Any]:
    """The nested values of a TOML file.

    Raises:
        InputError: no such file, or not TOML.
    """
    return _values_of(_read(path), path)


def _read(path: Path) -> str:
    file = user_path(path, "settings file")
    try:
        return read_text(file)
    except OSError as error:
        raise InputError(f"settings file {path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise InputError(f"settings file {path} is not TOML: {error}") from error


def _values_of(text: str, path: Path) -> dict[str, Any]:
    try:
        return spread(_parse(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"settings file {path} is not TOML: {error}") from error
    except ValueError as error:
        raise InputError(f"settings file {path}: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    """TOML's values. A float remembers how it was typed.

    Raises:
        ValueError: not TOML (``TOMLDecodeError``), nested more than ``MAX_DEPTH`` deep, or with an endless number.
    """
    too_deep = f"a value in it is nested more than {MAX_DEPTH} deep"
    try:
        values = tomllib.loads(text, parse_float=lambda number: typed_number(float(number), number))
    except RecursionError:
        raise ValueError(too_deep) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise ValueError("a number in it has too many digits") from error
    if _is_deep(values):
        raise ValueError(too_deep)
    return values


def _is_deep(values: Any) -> bool:
    """Whether values are nested more than ``MAX_DEPTH`` deep."""
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        within = [one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, Mapping | list)]
        level = [value for values_of_one in within for value in values_of_one]
    return any(isinstance(one, Mapping | list) for one in level)


def spread(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"backbone": "tabletop"}`` -> ``{"components": {"backbone": "tabletop"}}``: a component by its role and name.

    Raises:
        InputError: ``components`` names another one for the same role.
    """
    chosen = {role: values[role] for role in ROLES if isinstance(values.get(role), str)}
    components = values.get("components", {})
    if not chosen or not isinstance(components, Mapping | Components):
        return dict(values)
    given = components.model_dump(exclude_unset=True) if isinstance(components, Components) else components
    for role, name in chosen.items():
        if given.get(role, name) != name:
            raise InputError(f"setting {role!r} is {shown(name)}, and {f'components.{role}'!r} is {shown(given[role])}")
    return {key: one for key, one in values.items() if key not in chosen} | {"components": {**given, **chosen}}


def parse_assignment(assignment: str) -> dict[str, Any]:
    """``"learner.steps=400"`` -> ``{"learner": {"steps": 400}}``. The value is TOML, or else plain text.

    A number remembers how it was typed, for a setting that takes text.

    Raises:
        InputError: no ``=``, an empty key, or a value that is nested too deeply or has too many digits.
    """
    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    text = text.removeprefix("\ufeff").strip()
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise InputError(f"{_assigned(assignment)}: expected KEY=VALUE, as in learner.steps=400")
    value: Any = text
    try:
        parsed = _parse(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    except ValueError as error:
        raise InputError(f"{_assigned(assignment)}: {error}") from error
    if parsed.keys() == {"value"}:
        value = parsed["value"]
    if isinstance(value, int) and not isinstance(value, bool):
        value = typed_number(value, text)
    if not isinstance(value, (bool, int, float, str, list, dict)):  # a folder named like a date is still a folder
        value = text
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    return dict(nested)


def merge(*layers: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries put over one another, the lowest first.

    prefix: put before keys in messages.

    Raises:
        InputError: a table lies over a value that is none, which would pass unnoticed.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                value = merge(below, value, prefix=f"{prefix}{key}.")
            elif isinstance(value, Mapping) and below not in (None, NONE):
                where = _shortened(f"{prefix}{key}")
                raise InputError(
                    f"setting {where!r} cannot be {shown(below)}: it should be a table, as in {where}.KEY=VALUE"
                )
            merged[key] = value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"learner": {"steps": 400}}`` -> ``{"learner.steps": 400}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an error message: ``did you mean 'steps'?``, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(names)}" if names else "there is none"


def validate(model: type[Model], values: Mapping[str, Any], prefix: str = "") -> Model:
    """Build a settings model; ``prefix`` (``"learner."``) is put before keys in messages.

    Raises:
        InputError: an unknown key or a wrong value; the message is one line and names the nearest right one.
    """
    given = {key: None if value == NONE and _may_be_none(model, key) else value for key, value in values.items()}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise InputError(_explained(model, error, prefix)) from error


def _explained(model: type[BaseModel], error: ValidationError, prefix: str = "") -> str:
    said = list(dict.fromkeys(_explain(model, problem, prefix) for problem in error.errors()))
    more = [f"and {len(said) - MAX_PROBLEMS} more"] * (len(said) > MAX_PROBLEMS)
    return "; ".join([*said[:MAX_PROBLEMS], *more])


def _may_be_none(model: type[BaseModel], key: str) -> bool:
    field = model.model_fields.get(key)
    return field is not None and type(None) in get_args(field.annotation)


def _explain(model: type[BaseModel], problem: Any, prefix: str) -> str:
    location = [str(part) for part in problem["loc"]]
    if not location:  # of several settings together
        whose = f"{prefix.removesuffix('.')} settings: " if prefix else ""
        return whose + str(problem["msg"]).removeprefix("Value error, ")
    key = prefix + ".".join(location)
    if problem["type"] == "extra_forbidden":
        holder: Any = model
        for part in location[:-1]:
            named = get_origin(holder) is dict  # a table of tables, by names that people choose
            holder = get_args(holder)[1] if named else getattr(holder.model_fields.get(part), "annotation", None)
        parent = prefix + "".join(f"{part}." for part in location[:-1])
        known = [parent + name for name in getattr(holder, "model_fields", {})]
        return f"unknown setting {_shortened(key)!r}: {nearest(key, known)}"
    if problem["type"] == "missing":
        return f"setting {_shortened(key)!r} is missing"
    message = str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.removeprefix("a valid ").replace("\n", " ")
    if problem["type"] == "model_type":
        message = f"a table, as in {key}.KEY=VALUE"
    return f"setting {_shortened(key)!r} cannot be {shown(problem['input'])}: it should be {message}"


def _assigned(assignment: str) -> str:
    return f"--set {_shortened(assignment)}" if is_typed() else f"setting {shown(assignment)}"


def shown(value: Any) -> str:
    """A wrong value in a message of one line, however long it is."""
    if isinstance(value, int) and value.bit_length() > 1024:  # Python writes none of more than 4300 digits
        return f"a number of some {round(value.bit_length() * math.log10(2))} digits"
    try:
        return _shortened(repr(value))
    except (ValueError, RecursionError):
        return f"this {type(value).__name__}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 20]}... ({len(text)} characters)"


def _spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with None as the word that ``validate`` reads as None."""
    return {
        key: _spelled_out(value) if isinstance(value, Mapping) else NONE if value is None else value
        for key, value in values.items()
    }
