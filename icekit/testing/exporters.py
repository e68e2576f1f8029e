"""The conformance checks of ``icekit.protocols.Exporter``; ``icekit.testing`` says how they are used.

They export runs that are made here: of drawn pictures, with the true masks and words, and the rows of these words in
place of learned tokens.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import SkipTest

from torch import Tensor

from icekit.hookspecs import hookimpl
from icekit.plugins import Origin, Plugins
from icekit.protocols import (
    Attribute,
    Candidate,
    Checkpoint,
    ComponentSettings,
    InputError,
    Learned,
    Proposal,
    Region,
    Step,
    View,
    token_names,
)
from icekit.run.exporting import check_declared, check_written, write_export
from icekit.run.extraction import Extraction
from icekit.run.orchestrator import extract
from icekit.run.ownership import EXPORTS
from icekit.settings import Settings, validate
from icekit.testing import components
from icekit.testing.asserting import other_random_numbers
from icekit.testing.scenes import Scene, one_colour, one_pixel_object, ten_objects, two_objects
from icekit.testing.subjects import ExporterUnderTest, kit_backbone

Contents = Mapping[str, bytes]
"""Name -> what is in the file."""
WORDS: Mapping[str, Sequence[str]] = {"colour": ("red", "blue"), "material": ("metal", "rubber")}
"""Attribute -> its words, of the runs that are exported."""


def check_files(subject: ExporterUnderTest) -> None:
    """``files``: names of files in the folder, relative to it, each once, and the same for the same run."""
    run = two_concepts()
    first, again = (_declared(_built(subject), run) for _ in range(2))
    assert first == again, f"files gives {again} a second time, and gave {first}"
    assert first, "files gives nothing for a run with two concepts"


def check_written_files(subject: ExporterUnderTest) -> None:
    """``export`` writes what ``files`` declares, as plain files in the folder, and nothing else."""
    _exported(subject, two_concepts(), may_refuse=False)


def check_the_run_stays(subject: ExporterUnderTest) -> None:
    """The run is afterwards as it was, and nothing is written beside the folder."""
    run = two_concepts()
    before, manifest = _contents(run.run_dir), copy.deepcopy(run.manifest)
    rows = {token: {key: row.clone() for key, row in own.items()} for token, own in run.tokens.items()}
    _exported(subject, run)
    changed = sorted(name for name, data in _contents(run.run_dir).items() if before.get(name) != data)
    gone = sorted(before.keys() - _contents(run.run_dir).keys())
    assert not changed and not gone, f"export has changed the run's directory: {', '.join([*changed, *gone])}"
    assert run.manifest == manifest, "export has changed the manifest that it was handed"
    for token, own in run.tokens.items():
        assert all(bool((row == rows[token][key]).all()) for key, row in own.items()), f"export has changed {token}"


def check_same_run_same_files(subject: ExporterUnderTest) -> None:
    """The same run gives the same bytes, whatever is random elsewhere."""
    first = _exported(subject, two_concepts())
    with other_random_numbers(1):
        again = _exported(subject, two_concepts())
    differing = sorted(name for name in first if again.get(name) != first[name])
    assert not differing, f"exported a second time, {', '.join(differing)} is another file"


def check_in_a_run_directory(subject: ExporterUnderTest) -> None:
    """It can write into the run directory, again as well, and the run is read as before; or it is refused there, and
    needs a folder of its own.
    """
    found, run = Plugins(), two_concepts()
    found.add(Origin("exporter", "under-test", "1"), lambda: _Offered("checked", subject.component))
    values = subject.settings_for(two_objects()).model_dump(mode="json")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        shutil.copytree(run.run_dir, folder)
        before = _contents(folder)
        try:
            for _ in range(2):
                write_export(found, Extraction.open(folder), "checked", values, folder)
        except InputError as error:
            if "--out" in str(error):
                raise SkipTest(str(error)) from error
            raise AssertionError(f"it refuses to write into the run directory: {error}") from error
        after = _contents(folder)
        changed = sorted(name for name in before if after.get(name) != before[name])
        assert not changed, f"it has changed the run's own files: {', '.join(changed)}"
        assert EXPORTS in after, "what it wrote is not in the record of exports"
        assert len(Extraction.open(folder).concepts) == len(run.concepts)


def check_one_concept(subject: ExporterUnderTest) -> None:
    """A run may have one concept."""
    _exported(subject, run_of(two_objects, count=1))


def check_ten_concepts(subject: ExporterUnderTest) -> None:
    """A run may have ten concepts."""
    _exported(subject, run_of(ten_objects))


def check_one_word_for_all(subject: ExporterUnderTest) -> None:
    """Several concepts may have one label; their indices tell them apart."""
    _exported(subject, run_of(two_objects, nouns=("ball",)))


def check_any_word(subject: ExporterUnderTest) -> None:
    """A concept's word may have spaces, capitals, accents, other letters and signs, and be long."""
    _exported(subject, run_of(two_objects, nouns=("Crème brûlée (100 %) / <b>", "器 " + "very " * 30 + "old cup")))


def check_no_attributes(subject: ExporterUnderTest) -> None:
    """A run may have learned no attributes."""
    _exported(subject, run_of(two_objects, attributes=0))


def check_eight_attributes(subject: ExporterUnderTest) -> None:
    """A run may have learned eight attributes."""
    _exported(subject, run_of(two_objects, attributes=8))


def check_instance_alone(subject: ExporterUnderTest) -> None:
    """A learner may learn one token a concept: there is none for its category or an attribute then."""
    _exported(subject, run_of(two_objects, learner="instance-alone"))


def check_no_samples(subject: ExporterUnderTest) -> None:
    """A run may have no samples."""
    _exported(subject, run_of(two_objects))


def check_one_pixel(subject: ExporterUnderTest) -> None:
    """A concept may be one pixel."""
    _exported(subject, run_of(one_pixel_object))


def check_one_colour(subject: ExporterUnderTest) -> None:
    """The picture may have one colour everywhere."""
    _exported(subject, run_of(one_colour))


def check_two_sided_pictures(subject: ExporterUnderTest) -> None:
    """The picture need not be square."""
    for size in ((64, 96), (96, 64)):
        _exported(subject, run_of(two_objects, size=size))


# --- What is exported -------------------------------------------------------------------------------------------------


def two_concepts() -> Extraction:
    """A complete run of a red ball and a blue cube, with samples."""
    return run_of(two_objects, samples=1)


@functools.cache
def run_of(
    drawn: Callable[..., Scene],
    *,
    size: tuple[int, int] = (64, 64),
    nouns: Sequence[str] = (),
    count: int | None = None,
    attributes: int = 2,
    learner: str = "all-parts",
    samples: int = 0,
) -> Extraction:
    """A complete run of a drawn picture; made once a process, in a folder that goes with it.

    Args:
        drawn: what draws it, of ``scenes``.
        size: (height, width) of the picture.
        nouns: other names of its objects.
        count: how many of them were found; None for all.
        attributes: how many were learned.
        learner: ``"all-parts"`` or ``"instance-alone"``.
        samples: of each part.
    """
    scene, found = drawn(size, nouns), Plugins()
    more = {f"trait{place}": ("one", "two") for place in range(attributes)}
    words = dict([*WORDS.items(), *more.items()][:attributes])
    found.add(Origin("builtin", "icekit", "0"), lambda: import_module("icekit.builtin"))
    found.add(Origin("testing", "icekit", "0"), lambda: _Drawn(scene.regions()[:count], words))
    values = {
        "components": {"retriever": "nothing-more", "segmentor": "drawn", "learner": learner},
        "attributes": list(words),
        "naming": "retrieved",
        "min_area": 0,
        "samples": samples,
        "words_alone": False,
        "sample_steps": 1,
        "exporters": [],
    }
    folder = Path(_place().name) / f"{len(list(Path(_place().name).iterdir()))}"
    return extract(scene.picture, folder, validate(Settings, values), installed=found, backbone=kit_backbone(size))


@functools.cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="icekit-runs-")


class _NoSettings(ComponentSettings):
    """There are none."""


class _Drawn:
    """A plugin: the parts of a run whose regions are known, and that learns nothing."""

    def __init__(self, regions: Sequence[Region], words: Mapping[str, Sequence[str]]) -> None:
        self._regions, self._words = regions, words

    @hookimpl
    def register_attributes(self, register: Callable[[Attribute], None]) -> None:
        """Those that are not icekit's own."""
        for name, words in self._words.items():
            if name not in WORDS:
                register(Attribute(name, name, tuple(words)))

    @hookimpl
    def register_retrievers(self, register: Any) -> None:
        """One that is not asked."""
        register("nothing-more", _NothingMore)

    @hookimpl
    def register_segmentors(self, register: Any) -> None:
        """The regions as they are."""
        regions = self._regions

        class Segmentor:
            """The true masks and words."""

            Settings = _NoSettings

            def __init__(self, settings: _NoSettings, backbone: Any) -> None:
                pass

            def propose(self, image: Tensor) -> list[Proposal]:
                return [Proposal(region.mask.clone(), region.word) for region in regions]

        register("drawn", Segmentor)

    @hookimpl
    def register_learners(self, register: Any) -> None:
        """Of all parts, and of one."""
        register("all-parts", _Rows)
        register("instance-alone", _InstanceRows)


class _NothingMore:
    """A retriever that finds no words."""

    Settings = _NoSettings

    def __init__(self, settings: _NoSettings, backbone: Any) -> None:
        pass

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        return []


class _Rows:
    """The rows of each concept's word for all of its tokens."""

    Settings = _NoSettings

    def __init__(self, settings: _NoSettings, backbone: Any) -> None:
        self.backbone = backbone

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        on_step(Step(1, 1, "words", {"total": 0.0}))
        parts = getattr(self, "parts", None)
        return Learned(
            {
                token: {key: row.clone() for key, row in self.backbone.word_rows("ball").items()}
                for region in regions
                for part, token in token_names(region, attributes).items()
                if parts is None or part in parts
            }
        )


class _InstanceRows(_Rows):
    """The rows of each concept's word for one token."""

    parts = ("instance",)


class _Offered:
    """A plugin of one exporter."""

    def __init__(self, name: str, component: type) -> None:
        self._name, self._component = name, component

    @hookimpl
    def register_exporters(self, register: Any) -> None:
        """It."""
        register(self._name, self._component)


# --- How it is exported -----------------------------------------------------------------------------------------------


def _built(subject: ExporterUnderTest) -> Any:
    return subject.component(subject.settings_for(two_objects()))


def _declared(exporter: Any, run: Extraction) -> list[str]:
    try:
        return check_declared(exporter.files(run))
    except InputError:
        raise
    except ValueError as error:
        raise AssertionError(f"it {error}") from error


def _exported(subject: ExporterUnderTest, run: Extraction, may_refuse: bool = True) -> Contents:
    """What is written of a run; nothing where it says in one line that it cannot be."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "made"
        folder.mkdir()
        try:
            exporter = _built(subject)
            files = _declared(exporter, run)
            exporter.export(run, folder)
        except InputError as error:
            assert may_refuse, f"it refuses a run with two concepts: {error}"
            return {}
        try:
            check_written(files, folder)
        except ValueError as error:
            raise AssertionError(f"it {error}") from error
        beside = sorted(one.name for one in Path(place).iterdir() if one != folder)
        assert not beside, f"it wrote {', '.join(beside)} beside the folder that it was handed"
        return _contents(folder)


def _contents(folder: Path) -> Contents:
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


CHECKS = (
    *components.CHECKS,
    check_files,
    check_written_files,
    check_the_run_stays,
    check_same_run_same_files,
    check_in_a_run_directory,
    check_no_samples,
    check_one_concept,
    check_one_word_for_all,
    check_any_word,
    check_no_attributes,
    check_eight_attributes,
    check_instance_alone,
    check_one_pixel,
    check_one_colour,
    check_two_sided_pictures,
    check_ten_concepts,
)
"""All checks of an exporter, cheap ones first."""
