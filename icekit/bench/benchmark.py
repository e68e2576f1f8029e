"""The bench: a data set, some combinations of components, some metrics -> a table.

Every combination runs on every image and is measured there; two more, ``floor`` and ``ceiling``, put luck and the
truth in place of what was found and learned. Rows with a name and settings of their own may stand in the same table.
What is done is on disk at once, and a bench that goes on after any interruption ends with the same numbers.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from icekit import plugins
from icekit.bench import page, results
from icekit.bench.directory import BenchDirectory, to_mask_picture, to_picture
from icekit.bench.measuring import Cell, measured_by
from icekit.bench.outcome import PLAIN, MeasuredOutcome, found_concepts
from icekit.bench.published import Published, read_published
from icekit.bench.results import CEILING, FLOOR
from icekit.bench.rows import Row, read_rows, stage_one_key, stage_one_name
from icekit.hookspecs import hookimpl
from icekit.paths import user_path
from icekit.pixels import to_tensor
from icekit.plugins import Plugins
from icekit.protocols import (
    Attribute,
    Backbone,
    BenchImage,
    BenchPicture,
    Column,
    Dataset,
    Executor,
    ExecutorSettings,
    InputError,
    Metric,
    Region,
    RunError,
    Step,
    parts_of,
)
from icekit.protocols.measuring import columns_of
from icekit.protocols.strict import CHANGES_NO_RESULT, StrictSettings, as_stored, changes_no_result
from icekit.randomness import seeded_generator
from icekit.run import border, images
from icekit.run.atomic import CannotWrite, write_image_atomically
from icekit.run.directory import Located, RunDirectory
from icekit.run.exporting import ExportError
from icekit.run.extraction import Extraction
from icekit.run.locating import UNNAMED, locate
from icekit.run.machine import OutOfMemory, enough_memory
from icekit.run.models import build_component, check_picture, load_backbone, reproducible, resolve_device
from icekit.run.naming import check_words
from icekit.run.orchestrator import extract
from icekit.run.ownership import refuse_if_busy
from icekit.run.reading import DamagedError
from icekit.run.records import OriginRecord
from icekit.settings import BENCH_TABLES, NONE, ROLES, Role, Settings, merge, nearest, shown, validate
from icekit.waiting import Ticker

log = logging.getLogger(__name__)

OWN_TABLES = ("dataset", "rows", *BENCH_TABLES)
"""Tables of a bench's settings that are no run's."""
MAX_NAME_BYTES = 200
"""Of a picture's name: files and folders are called so."""
FLOOR_AREA = 0.1
"""Share of the image that a random mask covers where the true one is not known."""


class BenchSettings(StrictSettings):
    """Settings of the bench itself: ``--set bench.images=4``."""

    images: int = Field(8, ge=1, le=10_000, description="images generated for each prompt that a metric asks for")
    against: str | None = Field(
        None,
        description="a row that every other is held against, image by image: by how much it is better, and the "
        "interval of that; two rows' own intervals overlap long after their difference is sure",
        json_schema_extra=CHANGES_NO_RESULT,
    )


@dataclass(frozen=True)
class Combination:
    """A row of the table: the components and complete settings of its runs.

    stage_one: the name under which its regions are kept; combinations with the same one share them.
    overrides: what a named row sets for itself, nested; None for a combination of components alone.
    """

    name: str
    stage_one: str
    settings: Settings
    overrides: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Progress:
    """How far a bench is: the image and the combination that were just measured, and why the run failed if it did."""

    done: int
    total: int
    image: str
    combination: str
    error: str | None = None


def bench(
    dataset: str,
    out: str | Path,
    *,
    count: int | None = None,
    seed: int = 0,
    components: Mapping[str, Sequence[str]] | None = None,
    metrics: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    executor: str | None = None,
    executor_settings: Mapping[str, Any] | None = None,
    command: str = "",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    installed: Plugins | None = None,
) -> dict[str, Any]:
    """Measure combinations of components on a data set.

    Args:
        dataset: its registered name.
        out: the bench directory.
        count: number of images; the data set's own if None.
        seed: which images, where there is a choice, and every other random choice.
        components: role -> names, all combinations of which are measured (one backbone).
        metrics: names; those of the data set if there are none.
        settings: nested, as in a settings file; tables ``dataset``, ``metric``, ``bench`` and ``rows`` besides a run's
            own. A setting of a role holds for all its components that have it; ``{"learner": {"ice": {"steps": 400}}}``
            is for one of them. ``rows``: name -> settings of that row's own, over all others; where there are some,
            only those learners are combined that ``components`` names.
        resume: go on with the bench in ``out``, if there is one.
        overwrite: replace the bench in ``out``.
        executor: the registered name of what measures, an image of a combination at a time; None: this process, one
            after another.
        executor_settings: its own, as ``{"workers": 2}``.
        command: what was typed, for the record.
        on_progress: called after every image of every combination.
        installed: the plugins to use; those of this Python environment if None.

    Returns:
        What is in ``results.json``: see ``results.summarise``.

    Raises:
        InputError: a name, a setting or ``out`` is wrong.
        RunError: a model cannot be had.
    """
    home = BenchDirectory(user_path(out, "out"))
    if str(home.path).encode("utf-8", "replace").decode() != str(home.path):
        raise InputError(f"{home.path}: a bench keeps its folder's name among its settings: give one in UTF-8")
    refuse_if_busy(home.path)
    home.check_usable(resume=resume, overwrite=overwrite)
    found = installed or plugins.installed()
    workers = None if executor is None else _workers(found, executor, executor_settings or {})
    with home.writing(), reproducible():
        home.check_usable(resume=resume, overwrite=overwrite, writing=True)  # another process may have been here
        directory = home
        if (resume and home.next.holds_bench) or (overwrite and home.holds_bench):
            directory = home.next  # the old bench stays until the new one is complete
            directory.check_usable(resume=resume, overwrite=overwrite)
        question = Question(dataset, count, seed, components or {}, metrics, settings or {})
        work = Bench(found, question, directory)
        home.clear_leftovers()
        directory.clear_leftovers()
        work.begin(resume=resume)
        with enough_memory("measure", found, lambda: work.plain):
            made = work.to_the_end(command, on_progress, workers)
        if directory is not home:
            home.replace()
        else:
            home.discard_next()
        return made


def _workers(found: Plugins, name: str, values: Mapping[str, Any]) -> tuple[str, Executor, int]:
    """An executor, its name, and with how many threads each of its workers computes."""
    own = found.component_settings("executor", name, values)
    assert isinstance(own, ExecutorSettings), "checked at registration"
    one = ("executor", name)
    with found.naming("load", [one], by=one):
        return name, found.component("executor", name)(own), own.threads


@dataclass(frozen=True)
class Question:
    """What a bench is asked to measure: the arguments of ``bench`` of these names."""

    dataset: str
    count: int | None
    seed: int
    components: Mapping[str, Sequence[str]]
    metrics: Sequence[str]
    settings: Mapping[str, Any]


class Bench:
    """One bench on its way: settings first, then models, then image by image."""

    def __init__(self, found: Plugins, question: Question, directory: BenchDirectory) -> None:
        self.plugins, self.question, self.directory = found, question, directory
        self.dataset_name, self.seed = dataset, seed = question.dataset, question.seed
        count, components = question.count, question.components
        metrics, settings = question.metrics, question.settings
        given = {key: value for key, value in settings.items() if key not in OWN_TABLES}
        given |= {"components": _table("components", given["components"])} if "components" in given else {}
        own_values = {key: _table(key, settings.get(key, {})) for key in OWN_TABLES}
        self.dataset_settings = found.component_settings("dataset", dataset, own_values["dataset"])
        with self._naming("dataset", dataset, "load"):
            self.dataset: Dataset = found.component("dataset", dataset)(self.dataset_settings)
            self.published: Published | None = read_published(getattr(self.dataset, "published", None), dataset)

        self.given, self.typed = merge(given, {"seed": seed}), components
        self.rows = read_rows(own_values["rows"], (FLOOR, CEILING, PLAIN))
        self.first = self._components({})
        self.combined = {role: _once(components.get(role) or [self.first[role]]) for role in ROLES}
        if len(self.combined["backbone"]) > 1:
            raise InputError("a bench has one backbone: give --backbone once, and a second bench for another")
        of_rows = [self._of_row(row) for row in self.rows]
        self.names = {role: _once([*self.combined[role], *(chosen[role] for chosen in of_rows)]) for role in ROLES}
        for role in ROLES:
            for name in self.names[role]:
                found.component(role, name)
        for key, given_name in _table("components", self.given.get("components", {})).items():
            if key in ROLES:
                found.component(key, str(given_name))  # also one that --learner and the like put another in place of
        for one in metrics:
            found.component("metric", one)
        self._check_role_keys()

        presets = [preset.values for preset in found.presets_of(self._chosen({}), dataset)]
        layers = [*(values.get("bench", {}) for values in presets), own_values["bench"]]
        self.bench = validate(BenchSettings, merge(*layers), prefix="bench.")
        self.plain = self._resolved(self.first)
        self.combinations = self._combinations()
        names = [one.name for one in self.combinations]
        if self.bench.against is not None and self.bench.against not in names:
            raise InputError(f"bench.against = {self.bench.against!r} is no row: {nearest(self.bench.against, names)}")
        # A region's hints are there for those rows that want them.
        described_last = sorted(self.combinations, key=lambda one: one.settings.naming == "described")
        self.locating = {one.stage_one: one.settings for one in described_last}

        self.backbone: Backbone = load_backbone(found, self.plain, resolve_device(self.plain.device))
        self.device = str(self.backbone.device)
        check_words(self.plain.name_of("backbone"), self.backbone, self._own_attributes())
        size = self.backbone.image_size
        with self._naming("dataset", dataset, "load"):
            pictures = list(self.dataset.pictures(count, seed, size))
            self.images = [self._image(one, size) for one in pictures]
        _check_names([image.name for image in self.images], dataset)
        self.known = known_truth(self.images)
        self.metric_names = self._choose_metrics(metrics)
        self.metric_settings = self._metric_values(
            [values.get("metric", {}) for values in presets], own_values["metric"]
        )
        self.metrics: dict[str, Metric] = {}

    def _naming(self, role: str, name: str, stage: str) -> AbstractContextManager[None]:
        """What this component raises is called its own: see ``Plugins.naming``."""
        return self.plugins.naming(stage, [(role, name), *self.components()], by=(role, name))

    def components(self) -> list[tuple[str, str]]:
        """Those of all rows, (role, name) each."""
        return [(role, name) for role, names in getattr(self, "names", {}).items() for name in names]

    def _image(self, given: BenchPicture, size: tuple[int, int]) -> BenchImage:
        """A picture as runs see it; see that it and its masks can be used.

        Raises:
            InputError: a segmentor's files are of another picture.
            RunError: the data set breaks its contract.
        """
        border.check_bench_picture(("dataset", self.dataset_name), given, size)
        source = images.load_image(given.picture)
        for settings in self.locating.values():
            check_picture(self.plugins, settings, source.source, source.picture.size)
        return BenchImage(given.name, to_tensor(source.fitted(size)), given.concepts)

    # --- Settings ----------------------------------------------------------------------------------------------------

    def _chosen(self, overrides: Mapping[str, Any]) -> Settings:
        """The preset and the components that were asked for, a row's own above those of all."""
        asked = {role: names[0] for role, names in self.typed.items() if names}
        components = self.given.get("components", {}) | asked | overrides.get("components", {})
        preset = overrides.get("preset", self.given.get("preset", NONE))
        return validate(Settings, {"preset": preset, "components": components})

    def _components(self, overrides: Mapping[str, Any]) -> dict[Role, str]:
        """Components by role: those that were asked for, or else the presets', or else the defaults."""
        return self.plugins.chosen(self._chosen(overrides), self.dataset_name).model_dump()  # type: ignore[return-value]

    def _of_row(self, row: Row) -> dict[Role, str]:
        """A row's components, all of which there are. Raises InputError, and names the row."""
        try:
            chosen = self._components(row.overrides)
            for role, name in chosen.items():
                self.plugins.component(role, name)
        except InputError as error:
            raise InputError(f"row {row.name!r}: {error}") from None
        return chosen

    def _resolved(self, chosen: Mapping[Role, str], overrides: Mapping[str, Any] | None = None) -> Settings:
        """Complete settings of a run with these components, and of a row's own."""
        own = overrides or {}
        values: dict[str, Any] = {"samples": 0}
        for layer in (self.given, own):
            values = merge(values, {key: value for key, value in layer.items() if key not in ROLES})
        values["components"] = dict(chosen)
        for role in ROLES:
            values[role] = self._role_values(role, chosen[role], own)
        return self.plugins.resolve(validate(Settings, values), self.dataset_name)

    def _role_values(self, role: Role, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """What was given for a component, with others or for it alone; a row's own above."""
        fields = self._fields(role, name)
        values: dict[str, Any] = {}
        shared = {key: value for key, value in self.given.get(role, {}).items() if key in (*fields, name)}
        for table in (shared, overrides.get(role, {})):
            named = table.get(name) if name not in fields else None
            if named is not None:
                _table(f"{role}.{name}", named)
            values |= {key: value for key, value in table.items() if key != name or named is None}
            values |= named if isinstance(named, Mapping) else {}
        return values

    def _fields(self, role: str, name: str) -> Collection[str]:
        fields: Collection[str] = self.plugins.component(role, name).Settings.model_fields  # type: ignore[attr-defined]
        return fields

    def _check_role_keys(self) -> None:
        for role in ROLES:
            _check_keys(role, self.given.get(role, {}), {name: self._fields(role, name) for name in self.names[role]})

    def _combinations(self) -> list[Combination]:
        """Every combination asked for and every named row, with complete settings."""
        made: list[Combination] = []
        learners = self.combined["learner"] if self.typed.get("learner") or not self.rows else []
        for retriever in self.combined["retriever"]:
            for segmentor in self.combined["segmentor"]:
                for learner in learners:
                    chosen: dict[Role, str] = self.first | {
                        "retriever": retriever,
                        "segmentor": segmentor,
                        "learner": learner,
                    }
                    name = f"{segmentor}-{learner}"
                    if len(self.combined["retriever"]) > 1:
                        name = f"{retriever}-{name}"
                    made.append(Combination(name, "", self._resolved(chosen)))
        for row in self.rows:
            if row.name in [one.name for one in made]:
                raise InputError(f"row {row.name!r} cannot have this name: a combination of components is called so")
            try:
                settings = self._resolved(self._components(row.overrides), row.overrides)
            except InputError as error:
                raise InputError(f"row {row.name!r}: {error}") from None
            made.append(Combination(row.name, "", settings, row.overrides))
        return [replace(one, stage_one=self._stage_one(one, made)) for one in made]

    def _stage_one(self, combination: Combination, everyone: Sequence[Combination]) -> str:
        """The name of a combination's stage one, which it shares with those that find the same."""
        settings = combination.settings
        sharing = [one.settings for one in everyone if stage_one_key(one.settings) == stage_one_key(settings)]
        if any(one.naming == "described" for one in sharing):
            settings = settings.model_copy(update={"naming": "described"})
        chosen = self.first | {role: settings.name_of(role) for role in ("retriever", "segmentor")}
        return stage_one_name(settings, self._resolved(chosen))

    def _choose_metrics(self, asked: Sequence[str]) -> list[str]:
        """The metrics asked for, or those of the data set that its truth allows."""
        chosen = []
        with self._naming("dataset", self.dataset_name, "load"):
            usual = list(self.dataset.metrics)
        for name in _once(asked or usual):
            lacking = sorted(set(self.plugins.component("metric", name).needs) - self.known)  # type: ignore[attr-defined]
            if lacking and asked:
                raise InputError(
                    f"metric {name!r} needs true {' and '.join(lacking)}, and data set {self.dataset_name!r} has none"
                )
            if not lacking:
                chosen.append(name)
        if not chosen:
            raise InputError(
                f"data set {self.dataset_name!r} has no truth for any metric: give some, as in --metric sim_i"
            )
        return chosen

    def _metric_values(self, presets: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> dict[str, Any]:
        """Each metric's settings.

        presets: tables of theirs by metric, the lowest first. own: what was given, for all metrics that have it, or in
            a table of a metric's name for that one alone.
        """
        fields = {name: self._fields("metric", name) for name in self.metric_names}
        _check_keys("metric", own, fields)
        made = {}
        for name, known in fields.items():
            mine = merge(*(values.get(name, {}) for values in presets))
            mine |= {key: value for key, value in own.items() if key in known}
            if name not in known and isinstance(own.get(name), Mapping):
                mine |= own[name]
            made[name] = self.plugins.component_settings("metric", name, mine)
        return made

    def _record(self) -> dict[str, Any]:
        """What the numbers depend on, for ``bench.json``."""
        shared = self.plain.model_dump(mode="json", exclude={*ROLES, "components", "device"})
        settings: dict[str, Any] = {
            "dataset": {"name": self.dataset_name, **as_stored(self.dataset_settings)},
            "bench": self.bench.model_dump(mode="json"),
            "run": shared | {"backbone": self.names["backbone"][0]},
            "backbone": self.plugins.stored(self.plain).values_of("backbone"),
            "metric": {name: as_stored(one) for name, one in self.metric_settings.items()},
        }
        combined = [one for one in self.combinations if one.overrides is None]
        for role in ("retriever", "segmentor", "learner"):
            settings[role] = {
                one.settings.name_of(role): self.plugins.stored(one.settings).values_of(role) for one in combined
            }
        settings["rows"] = {
            one.name: self.plugins.stored(one.settings).model_dump(mode="json", exclude={"backbone", "device"})
            for one in self.combinations
            if one.overrides is not None
        }
        return {"icekit_version": plugins.own_version(), "settings": results.portable(settings)}

    def _may_change(self) -> set[str]:
        """The settings in the record, by key, that change no number: see ``strict.CHANGES_NO_RESULT``."""
        keys = {f"run.{key}" for key in changes_no_result(Settings)}
        keys |= {f"bench.{key}" for key in changes_no_result(BenchSettings)}
        keys |= {
            f"metric.{name}.{key}" for name, one in self.metric_settings.items() for key in changes_no_result(type(one))
        }
        keys |= {f"dataset.{key}" for key in changes_no_result(type(self.dataset_settings))}
        for one in self.combinations:
            for key in self.plugins.changes_no_result(one.settings):
                role, _, own = key.partition(".")
                keys |= {key, f"{role}.{one.settings.name_of(role)}.{own}"} if role in ROLES else {key}
                keys.add(f"rows.{one.name}.{key}")
        return keys

    # --- On its way --------------------------------------------------------------------------------------------------

    def build_metrics(self) -> None:
        """Build the metrics; see that their columns differ."""
        for name in self.metric_names:
            with self._naming("metric", name, "load"):
                self.metrics[name] = self.plugins.component("metric", name)(self.metric_settings[name], self.backbone)
                for column, what in self.metrics[name].columns.items():
                    if not isinstance(what, Column):
                        raise RunError(f"metric {name!r}: its column {column!r} is {what!r} and no icekit Column")
        self.columns = {name: columns_of(one.columns, self._attributes()) for name, one in self.metrics.items()}
        _check_columns(self.columns)

    def prepare(self) -> None:
        """Let the metrics see the pictures, once before anything is measured."""
        for name, metric in self.metrics.items():
            with self._naming("metric", name, "prepare"):
                metric.prepare(self.images)

    def begin(self, *, resume: bool) -> None:
        """Build the metrics, take the directory, write the data into it."""
        self.build_metrics()
        self.directory.begin(self._record(), resume=resume, may_change=self._may_change())
        for image in self.images:
            folder = self.directory.data(image.name)
            write_image_atomically(self.directory.claim(folder / "image.png"), to_picture(image.pixels))
            for number, concept in enumerate(image.concepts):
                label = Region(number, concept.word or UNNAMED, 1.0, concept.mask).label
                file = self.directory.claim(folder / "masks" / f"{number}-{label}.png")
                write_image_atomically(file, to_mask_picture(concept.mask))

    @property
    def rows_of_table(self) -> list[str]:
        """Their names, in order."""
        return [one.name for one in self.combinations] + [FLOOR] + ([CEILING] if "words" in self.known else [])

    def cells(self) -> list[Cell]:
        """All that is measured, image by image."""
        return [Cell(row, image.name) for image in self.images for row in self.rows_of_table]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """What is measured of one image of one row: run and measured as far as it is missing."""
        image = next(one for one in self.images if one.name == cell.image)
        if cell.row == FLOOR:
            return self._measure(self._floor(image), image)
        if cell.row == CEILING:
            return self._measure(self._ceiling(image), image)
        return self._measure(next(one for one in self.combinations if one.name == cell.row), image)

    def _measured(
        self, workers: tuple[str, Executor, int] | None
    ) -> Generator[tuple[Cell, dict[str, Any]], None, None]:
        """Every cell with its values: those that are there first, where workers measure the others."""
        if workers is None:
            self.prepare()
            for cell in self.cells():
                yield cell, self.measure(cell)
            return
        missing = []
        for cell in sorted(self.cells(), key=lambda one: self.rows_of_table.index(one.row)):
            kept = self.directory.load_values(cell.row, cell.image)
            if set(self.metric_names) <= set(kept["metrics"]):
                yield cell, kept
            else:
                missing.append(cell)  # row by row: workers seldom wait for one another's stage one
        self._let_go()
        name, executor, threads = workers
        with self.plugins.naming("measure", [("executor", name)]):
            yield from measured_by(self, executor, threads, missing)

    def _let_go(self) -> None:
        """Free the memory of models that others are to load."""
        self.metrics = {}
        del self.backbone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def to_the_end(
        self, command: str, on_progress: Callable[[Progress], None], workers: tuple[str, Executor, int] | None
    ) -> dict[str, Any]:
        """Run and measure everything that is missing; write the results."""
        begun = time.monotonic()
        values: dict[str, dict[str, Any]] = {row: {} for row in self.rows_of_table}
        total = len(self.cells())
        with contextlib.closing(self._measured(workers)) as measured:
            for done, (cell, one) in enumerate(measured, 1):
                values[cell.row][cell.image] = one
                on_progress(Progress(done, total, cell.image, cell.row, one.get("error")))
        images = [image.name for image in self.images]
        made = results.summarise(
            values={row: {image: own[image] for image in images} for row, own in values.items()},
            columns=self.columns,
            images=images,
            components={one.name: one.settings.components.model_dump() for one in self.combinations},
            overrides={one.name: one.overrides for one in self.combinations if one.overrides is not None},
            seed=self.seed,
            against=self.bench.against,
            published=self.published,
            record=self._record()
            | {
                "command": command,
                "dataset": self.dataset_name,
                "n": len(images),
                "seed": self.seed,
                "versions": self._versions(),
                "device": self.device,
                "seconds": round(time.monotonic() - begun, 1),
            },
        )
        self.directory.save_results(made, results.to_csv(made), page.render_page(self.directory, made))
        return made

    def origins(self) -> list[OriginRecord]:
        """Where the components of all rows, the data set and the metrics come from."""
        kinds = [*((role, name) for role in ROLES for name in self.names[role]), ("dataset", self.dataset_name)]
        kinds += [("metric", name) for name in self.metric_names]
        known = [(kind, name, self.plugins.offered(kind)[name].origin) for kind, name in kinds]
        return [OriginRecord(kind=kind, name=name, **vars(origin)) for kind, name, origin in known]

    def _versions(self) -> dict[str, str]:
        return {"python": platform.python_version(), "torch": version("torch")} | {
            origin.distribution: origin.version for origin in self.origins()
        }

    # --- One image of one combination --------------------------------------------------------------------------------

    def _measure(self, combination: Combination, image: BenchImage) -> dict[str, Any]:
        kept = self.directory.load_values(combination.name, image.name)
        missing = [name for name in self.metrics if name not in kept["metrics"]]
        if not missing:
            return kept
        located = self._locate(combination, image)
        run: Extraction | None = None
        error: str | None = "no concept found"
        if located.regions:
            run, error = self._extract(combination, image, located)
        outcome = MeasuredOutcome(
            image=image,
            found=found_concepts(run, located.regions) if run else [],
            settings=combination.settings,
            backbone=self.backbone,
            directory=self.directory,
            combination=combination.name,
            run=run,
            count=self.bench.images,
            parts=parts_of(
                self.plugins.component("learner", combination.settings.name_of("learner")),
                combination.settings.attributes,
            ),
            words={one.name: one.vocabulary for one in self.plugins.attributes(combination.settings)},
        )
        kept |= {"error": None if run else error}
        if run:
            seconds = self.directory.located(combination.stage_one, image.name).load_timings()
            kept["seconds"] = {key: {**run.record.timings, **seconds}.get(key) for key in ("localise_s", "learn_s")}
        for name in missing:
            with self._naming("metric", name, "measure"):
                scores = self.metrics[name].measure(outcome)
                border.check_scores(("metric", name), scores, self.columns[name])
            kept["metrics"][name] = {
                column: {
                    "value": score.value if score.value is not None and math.isfinite(score.value) else None,
                    "prompts": list(score.prompts),
                    "strips": [str(outcome.strip(one).relative_to(self.directory.path)) for one in score.prompts],
                }
                for column, score in scores.items()
            }
            self.directory.save_values(combination.name, image.name, kept)
        return kept

    def _locate(self, combination: Combination, image: BenchImage) -> Located:
        """Stage one, once for all combinations that share it; hints are for those that describe."""
        located = self._located(combination, image)
        if combination.settings.naming == "described":
            return located
        return replace(located, regions=tuple(replace(region, hints={}) for region in located.regions))

    def _located(self, combination: Combination, image: BenchImage) -> Located:
        place = self.directory.located(combination.stage_one, image.name)
        located = self._load_located(place, image)
        if located.finished:
            return located
        self.directory.claim(place.path)
        with self.directory.locating(place):
            located = self._load_located(place, image)  # another worker may have made it meanwhile
            return located if located.finished else self._look(combination, image, place, located)

    def _load_located(self, place: RunDirectory, image: BenchImage) -> Located:
        with self._mended_by_deleting(place.path):
            return place.load_located((image.pixels.shape[2], image.pixels.shape[1]))

    def _look(self, combination: Combination, image: BenchImage, place: RunDirectory, located: Located) -> Located:
        """Stage one, from where it got to."""
        begun = time.monotonic()
        if combination.name in (FLOOR, CEILING):
            located = Located(tuple(self._random_regions(image) if combination.name == FLOOR else true_regions(image)))
            located = Located(located.regions, finished=True)
            place.save_located(located)
            return located
        settings = self.locating[combination.stage_one]
        retriever, segmentor = (
            build_component(self.plugins, settings, role, self.backbone) for role in ("retriever", "segmentor")
        )
        earlier = place.load_timings().get("localise_s", 0.0)

        def keep(located: Located) -> None:
            place.save_timings({"localise_s": round(earlier + time.monotonic() - begun, 3)})
            place.save_located(located)

        chosen = [(role, settings.name_of(role)) for role in ROLES]
        with self.plugins.naming("localise", chosen):
            located = locate(
                image.pixels,
                retriever,
                segmentor,
                settings,
                attributes=self.plugins.attributes(settings),
                located=located,
                on_change=keep,
            )
        return located

    @contextlib.contextmanager
    def _mended_by_deleting(self, folder: Path) -> Iterator[None]:
        """What is damaged in this folder of the bench is made again where it is missing: say so."""
        try:
            yield
        except DamagedError as error:
            raise DamagedError(error.problem, f"delete {folder}, and --resume makes it anew") from error

    def _extract(
        self, combination: Combination, image: BenchImage, located: Located
    ) -> tuple[Extraction | None, str | None]:
        """Stage two. A run that fails is a result, too: (None, why)."""
        folder = self.directory.run(combination.name, image.name)
        with self._mended_by_deleting(folder):
            if RunDirectory(folder).is_complete:
                return Extraction.open(folder), None
        self.directory.claim(folder)
        file = self.directory.data(image.name) / "image.png"
        source = replace(images.load_image(file), source=str(self._in_the_end(file)))
        try:
            return (
                extract(
                    source,
                    folder,
                    combination.settings,
                    resume=True,
                    installed=self.plugins,
                    backbone=self.backbone,
                    located=located,
                    observers=[_Steps(f"{image.name}: {combination.name}: learning step")],
                ),
                None,
            )
        except ExportError as error:  # which changes nothing of what is measured
            log.warning("%s", error)
            return error.extraction, None
        except (CannotWrite, OutOfMemory):
            raise  # that is the machine's, and no result
        except RunError as error:
            return None, str(error)

    # --- The ends of the scale ---------------------------------------------------------------------------------------

    def _floor(self, image: BenchImage) -> Combination:
        """Random masks, as many and as large as the true ones, words drawn from the data set's, random tokens."""
        return self._end(FLOOR, image, self._random_regions(image), "random", {})

    def _ceiling(self, image: BenchImage) -> Combination:
        """The true masks, and the true words' embeddings as tokens."""
        regions = true_regions(image)
        words = []
        for concept in image.concepts:
            known = {name: word for name, word in concept.attributes.items() if name in self._attributes()}
            look = " ".join(concept.attributes.values())
            words.append({"instance": look or concept.word, **known})
        return self._end(CEILING, image, regions, "words", {"words": words})

    def _attributes(self) -> list[str]:
        """Those of all rows."""
        return _once([name for one in self.combinations for name in one.settings.attributes])

    def _own_attributes(self) -> list[Attribute]:
        """Those of all rows.

        Raises:
            InputError: two rows have different ones of one name.
        """
        made: dict[str, Attribute] = {}
        for combination in self.combinations:
            for one in self.plugins.attributes(combination.settings):
                if made.setdefault(one.name, one) != one:
                    raise InputError(
                        f"row {combination.name!r} has another attribute {one.name!r} than others: name it otherwise"
                    )
        return list(made.values())

    def _end(
        self, name: str, image: BenchImage, regions: Sequence[Region], learner: str, learner_settings: Mapping[str, Any]
    ) -> Combination:
        files = self._in_the_end(self.directory.located(name, image.name).path / "masks")
        words = [region.word for region in regions]
        base = self.plain.model_dump(mode="json", exclude={"retriever", "segmentor", "learner"})
        values = merge(
            base,
            {
                "attributes": self._attributes(),
                "attribute": merge(*(one.settings.model_dump(mode="json")["attribute"] for one in self.combinations)),
                "components": {"retriever": "words", "segmentor": "masks", "learner": learner},
                "max_concepts": max(1, len(regions)),
                "retriever": {"words": words},
                "segmentor": {"files": [str(files)], "words": words},
                "learner": dict(learner_settings),
            },
        )
        return Combination(name, name, self.plugins.resolve(validate(Settings, values), self.dataset_name))

    def _in_the_end(self, path: Path) -> Path:
        """Where a file of the bench will be when this is complete: for the record, as it is read where it is now."""
        return self.directory.home / path.relative_to(self.directory.path)

    def _random_regions(self, image: BenchImage) -> list[Region]:
        vocabulary = sorted({one.word for other in self.images for one in other.concepts if one.word}) or [UNNAMED]
        height, width = image.pixels.shape[1:]
        regions = []
        for number in range(max(1, len(image.concepts))):
            generator = seeded_generator(self.seed, "floor", image.name, number)
            area = float(image.concepts[number].mask.float().mean()) if image.concepts else FLOOR_AREA
            word = vocabulary[int(torch.randint(len(vocabulary), (), generator=generator))]
            regions.append(Region(number, word, 0.0, random_disc((height, width), area, generator)))
        return regions


class _Steps:
    """An observer that says how far learning is, now and then."""

    def __init__(self, what: str) -> None:
        self._ticker = Ticker(what)

    @hookimpl
    def step_done(self, step: Step) -> None:
        """One more is done."""
        self._ticker.tick(step.step, step.total)


def random_disc(size: tuple[int, int], area: float, generator: torch.Generator) -> Tensor:
    """A disc of this share of an image, somewhere wholly inside it, as far as it fits in: bool ``[H, W]``.

    size: (height, width).
    """
    height, width = size
    radius = min((height * width * area / torch.pi) ** 0.5, min(size) / 2)
    x, y = (radius + (torch.tensor([width, height]) - 2 * radius) * torch.rand(2, generator=generator)).tolist()
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    disc = (rows[:, None] - y) ** 2 + (columns[None] - x) ** 2 <= max(radius, 1.0) ** 2
    return disc


def true_regions(image: BenchImage) -> list[Region]:
    """The truth as regions."""
    return [Region(number, concept.word or UNNAMED, 1.0, concept.mask) for number, concept in enumerate(image.concepts)]


def known_truth(pictures: Sequence[BenchImage]) -> set[str]:
    """What is known of every concept of every image: ``"masks"``, ``"words"`` and names of attributes."""
    if not pictures or not all(image.concepts for image in pictures):
        return set()
    concepts = [concept for image in pictures for concept in image.concepts]
    known = set.intersection(*(set(concept.attributes) for concept in concepts)) | {"masks"}
    return known | ({"words"} if all(concept.word for concept in concepts) else set())


def _once(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _table(key: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise InputError(f"setting {key!r} cannot be {shown(values)}: it should be a table of settings")
    return dict(values)


def _check_keys(role: str, table: Any, fields: Mapping[str, Collection[str]]) -> None:
    """Whether each setting of a role is one of a chosen component, or the table of one."""
    if not isinstance(table, Mapping):
        raise InputError(f"setting {role!r} cannot be {shown(table)}: it should be a table, as in {role}.KEY=VALUE")
    known = {key for own in fields.values() for key in own} | fields.keys()
    for key, value in table.items():
        if key in fields and key not in {one for own in fields.values() for one in own}:
            _table(f"{role}.{key}", value)
        if key not in known:
            raise InputError(
                f"unknown setting '{role}.{key}': {nearest(f'{role}.{key}', [f'{role}.{k}' for k in known])}"
            )


def _check_columns(columns: Mapping[str, Mapping[str, Column]]) -> None:
    owners: dict[str, str] = {}
    for name, own in columns.items():
        for column in own:
            if column in owners:
                raise InputError(f"metrics {owners[column]!r} and {name!r} both give {column!r}: choose one of them")
            owners[column] = name


def _check_names(names: Sequence[str], dataset: str) -> None:
    counts = Counter(names)
    for name in names:
        if counts[name] > 1 or Path(name).name != name or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise RunError(
                f"data set {dataset!r} has a picture called {name!r}: names must be file names of at most "
                f"{MAX_NAME_BYTES} bytes, each once"
            )
