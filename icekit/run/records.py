"""What runs and benches keep on disk, as models: whatever is read back is held against these first.

A directory may be damaged, or be somebody else's who wants it to be read wrongly. Types are exact, numbers are finite,
places lie inside the directory. Keys that are not known are a later version's, and passed over.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from icekit.protocols.errors import printable
from icekit.protocols.strict import LARGEST

MAX_SIDE = 65_536
"""Longest side of a run's picture, pixels."""
MAX_NAME = 1_000
"""Most characters of a label, a token and the like."""
MAX_COUNT = 2**53
"""Largest whole number: what every reader of JSON takes."""
_SHOWN = 80


def _without_controls(text: str) -> str:
    if any(unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in text):
        raise ValueError("text without control characters")
    return text


def _without_surrogates(text: str) -> str:
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise ValueError("text")
    return text


def _token(text: str) -> str:
    if not re.fullmatch(r"<[^<>\s]+>", text):
        raise ValueError("a token, as in <cup-0>")
    return text


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError("a file inside the directory")
    return name


Text = Annotated[str, AfterValidator(_without_surrogates)]
Name = Annotated[str, Field(max_length=MAX_NAME), AfterValidator(_without_controls)]
Token = Annotated[Name, AfterValidator(_token)]
Inside = Annotated[Name, AfterValidator(_inside)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Seconds = Annotated[float, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class Record(BaseModel):
    """Base of what is on disk."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Header(Record):
    """What every manifest begins with."""

    schema_version: StrictInt
    icekit_version: Name


class OriginRecord(Record):
    """A component, an attribute or an exporter of a run, and the plugin that brought it: see ``plugins.Origin``."""

    kind: Name
    name: Name
    plugin: Text
    distribution: Text
    version: Text


class ImageRecord(Record):
    """The picture of a run. source: as typed, which may be a name that is no UTF-8."""

    source: str
    sha256: Name
    width: Side
    height: Side


class BackboneRecord(Record):
    """What tokens mean something to: see ``protocols.Backbone``."""

    identity: Text
    rows: dict[Name, Side] = Field(min_length=1)
    pipeline_class: Name | None = None
    pipeline_source: Text | None = None
    pipeline_encoders: dict[Name, list[Name]] = {}
    pipeline_loads_tokens: bool = True
    pipeline_takes_space: bool = False
    pipeline_without: list[Name] = []


class ConceptRecord(Record):
    """One concept of a manifest."""

    index: Count
    label: Name
    score: Number
    mask: Inside
    original_mask: Inside | None = None
    area: float = Field(ge=0, le=1)
    tokens: dict[Name, Token] = Field(min_length=1)
    words: dict[Name, list[Text]]
    described: dict[Name, list[Text]] = {}
    words_alone: dict[Name, Text] = {}


class EvaluationsRecord(Record):
    """How often the noise predictor was evaluated for something: see ``counting.Evaluations``."""

    forward: Count
    backward: Count


class CountsRecord(Record):
    """``checkpoint/evaluations.json``: evaluations by what they were for."""

    evaluations: dict[Name, EvaluationsRecord]


class ImportedRecord(Record):
    """A file that another program made, and how many rows it has: see ``importing``."""

    file: Text
    sha256: Name
    rows: Count


class Manifest(Header):
    """``manifest.json``: what a complete run found and made. imported: a file a concept, where it learned nothing.

    warnings: what was said about it that a reader of it should know.
    """

    image: ImageRecord
    imported: list[ImportedRecord] = []
    presets: list[Name] | None = None
    components: dict[Name, Name] = {}
    backbone: BackboneRecord | None = None
    attributes: list[Name] = []
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    concepts: list[ConceptRecord]
    learning_steps: Count | None = None
    plugins: list[OriginRecord] = []
    timings: dict[Name, Seconds] = {}
    evaluations: dict[Name, EvaluationsRecord] = {}
    warnings: list[Text] = []

    @model_validator(mode="after")
    def _tells_concepts_apart(self) -> Manifest:
        if self.backbone is None and self.schema_version > 1:
            raise ValueError("backbone is missing")
        for what, values in (
            ("index", [str(concept.index) for concept in self.concepts]),
            ("token", self.tokens),
        ):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"several concepts have the {what} {twice[0]}")
        return self

    @property
    def tokens(self) -> list[str]:
        """Those of all concepts."""
        return [token for concept in self.concepts for token in concept.tokens.values()]


class ExportRecord(Record):
    """The files that an exporter wrote of a run.

    run: where that run is; None for the one whose directory they are in.
    """

    exporter: Name
    run: str | None = None
    files: list[Inside]

    def is_of(self, other: ExportRecord) -> bool:
        """Whether both are of one exporter and one run."""
        return (self.exporter, self.run) == (other.exporter, other.run)


class ExportsRecord(Record):
    """``.icekit.exports.json``: what exporters wrote into a folder."""

    exports: list[ExportRecord]


class Begun(Record):
    """``checkpoint/run.json``. ready: whether the files that a run begins with are all there."""

    ready: bool


class Started(Record):
    """What a run began with: the source image's sha256, the complete settings (nested, JSON types), the schema version
    of its directory, and the plugins.
    """

    sha256: Name
    source: str
    settings: dict[str, Any]
    schema_version: StrictInt
    plugins: list[OriginRecord] = []


class LocatedRegion(Record):
    """One region of ``checkpoint/regions.json``."""

    index: Count
    word: Text
    score: Number
    mask: Inside
    hints: dict[Name, dict[Text, Number]] = {}


class LocatedRecord(Record):
    """``checkpoint/regions.json``: stage one so far. erased: a mask as PNG in base64."""

    regions: list[LocatedRegion]
    refused: list[Text]
    finished: bool
    rounds: Count | None = None
    last: Text | None = None
    erased: str | None = None

    @model_validator(mode="after")
    def _counts_regions(self) -> LocatedRecord:
        if [region.index for region in self.regions] != list(range(len(self.regions))):
            raise ValueError("regions are not numbered 0, 1, 2, ...")
        return self


class Timings(Record):
    """``checkpoint/timings.json``: seconds by stage."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Seconds]


class StepRecord(Record):
    """A line of ``log.jsonl``. Losses stand under ``losses``, or beside ``step``."""

    KNOWN: ClassVar[tuple[str, ...]] = ("step", "total", "phase", "losses")

    step: Count
    phase: Text | None = None
    losses: dict[str, Any] | None = None


class BenchRecord(Record):
    """``bench.json``: what is measured, and with what settings."""

    icekit_version: Name
    settings: dict[str, Any]


class ScoreRecord(Record):
    """One column's value of one image, and the pictures behind it."""

    value: Number | None
    prompts: list[Text] = []
    strips: list[Inside] = []

    @model_validator(mode="after")
    def _has_a_strip_for_each_prompt(self) -> ScoreRecord:
        if len(self.prompts) != len(self.strips):
            raise ValueError(f"{len(self.prompts)} prompts and {len(self.strips)} strips, where each has one")
        return self


class ValuesRecord(Record):
    """A file of ``values/``: what was measured of one image with one combination."""

    metrics: dict[Name, dict[Name, ScoreRecord]]
    error: Text | None = None
    seconds: dict[Name, Seconds | None] | None = None


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, in one line: ``concepts.0.score: should be a finite number, and is 'x'``."""
    problem = error.errors(include_url=False)[0]
    where = printable(".".join(str(part) for part in problem["loc"]), 200)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{where} is missing"
    if not where:
        return printable(message)
    message = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"{where}: should be {printable(message, 200)}, and is {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a JSON object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 1024:
        return "a number of many digits"
    return printable("null" if value is None else repr(value), _SHOWN)
