"""A library: the concepts of many runs, found by their words, their attributes and what they look like."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import apsw
import numpy as np
from numpy.typing import NDArray

from icekit import plugins
from icekit.cache import cache_folder
from icekit.concept_library.index import BATCH, MOST_FOUND, Entry, Index, Query, Row, terms_in
from icekit.concept_library.places import Place, places_of, stamp_of
from icekit.paths import user_path
from icekit.plugins import Plugins
from icekit.protocols import InputError, RunError
from icekit.protocols.errors import printable
from icekit.run.atomic import CannotWrite
from icekit.run.directory import VECTORS, RunDirectory, Vectors
from icekit.run.extraction import MOST_NAMED, Concept, Extraction, listed_concepts, readable_manifest
from icekit.run.records import Manifest
from icekit.waiting import Ticker

CLIPS_TRIED = 3
"""Runs whose settings are tried before the model that a space is of is taken for not at hand."""

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Hit:
    """A concept that was found.

    run_dir: of its run. shown: the same as it can be typed. index, label, words: as in the run's manifest.
    matched: how many of the words it has. similarity: the cosine in the space of the retriever's CLIP, or None.
    """

    run_dir: Path = field(repr=False)
    shown: str = field(repr=False)
    index: int
    label: str
    words: dict[str, list[str]]
    matched: int
    similarity: float | None

    @property
    def reference(self) -> str:
        """``runs/photo:0``: what ``compose`` takes."""
        return f"{self.shown}:{self.index}"

    def concept(self) -> Concept:
        """The concept itself, read from its run.

        Raises:
            InputError: the run is not there any more, or damaged.
        """
        return Extraction.open(self.run_dir).concept(self.index)


@dataclass(frozen=True)
class Found:
    """What ``ConceptLibrary.find`` found.

    hits: best first. notes: what they were not compared by, and which runs were passed over, a line each.
    """

    hits: tuple[Hit, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, place: int) -> Hit:
        return self.hits[place]


class ConceptLibrary:
    """The concepts of complete runs: of run directories, of folders with runs in them, a batch's say, and of runs of
    the hub (``hub:user/run``).

    Raises:
        InputError: one of the directories is not there, or there is no complete run in it.
    """

    def __init__(
        self, *run_dirs: str | Path, index: str | Path | None = None, installed: Plugins | None = None
    ) -> None:
        """Say which runs.

        index: the file that ``find`` keeps what it knows of them in; one in icekit's cache if None. It holds these
            runs alone, and is never needed.
        installed: the plugins to use; those of this Python environment if None.
        """
        self.places = tuple(places_of(run_dirs))
        self._named = b"\0".join(sorted(os.fsencode(os.path.abspath(one)) for one in run_dirs))
        self._index_file = None if index is None else user_path(index, "index")
        self._installed = installed
        self._index: Index | None = None
        self._problems: list[str] = []
        self._readers: dict[str, Any] = {}

    @cached_property
    def runs(self) -> tuple[Extraction, ...]:
        """All runs, read.

        Raises:
            InputError: one is damaged.
        """
        return tuple(Extraction.open(place.path) for place in self.places)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """All concepts, run by run. Raises InputError, see ``runs``."""
        return tuple(concept for run in self.runs for concept in run.concepts)

    def __repr__(self) -> str:
        first = self.places[:MOST_NAMED]
        shown = [concept for place in first for concept in Extraction.open(place.path).concepts]
        more = ", ..." * (len(self.places) > len(first) and len(shown) <= MOST_NAMED)
        return f"<ConceptLibrary of {len(self.places)} runs: {listed_concepts(shown)}{more}>"

    def _repr_html_(self) -> str:
        from icekit.run.in_notebooks import of_run

        first = self.places[:MOST_NAMED]
        more = len(self.places) - len(first)
        shown = "".join(of_run(Extraction.open(place.path)) for place in first)
        return shown + (f"<div>and {more} more runs</div>" if more else "")

    def __iter__(self) -> Iterator[Concept]:
        return iter(self.concepts)

    def __len__(self) -> int:
        return len(self.concepts)

    # --- Finding -----------------------------------------------------------------------------------------------------

    def find(
        self,
        words: str = "",
        *,
        attributes: Mapping[str, str] | None = None,
        like: str | Path | Concept | None = None,
        n: int = 20,
        similar: bool = True,
    ) -> Found:
        """The concepts that fit best.

        Those whose label and attributes have more of the words come first; of equally many those whose words stand
        higher in their attribute's list; of these the more similar. What has none of the words follows, by similarity
        alone: that of the words themselves, read by the CLIP that the runs' retriever had, if it is on this machine; or
        with ``like`` that of another concept, for which no model is needed.

        Args:
            words: such as ``"red glass"``.
            attributes: attribute -> a word that its list has to have, as in ``{"material": "glass"}``.
            like: ``RUN_DIR:CONCEPT`` or a concept: of its run the vectors are read. It is not found itself.
            n: most concepts.
            similar: whether words are compared by similarity, for which a model is loaded.

        Raises:
            InputError: nothing is asked for, no such attribute or run, or a run without vectors to be like.
            CannotWrite: the file that was given as ``index`` cannot be written.
        """
        terms, conditions = terms_in(words), self._conditions(attributes or {})
        if not (terms or conditions or like):
            raise InputError("nothing to look for: give words, an attribute or a concept to be like")
        if not 1 <= n <= MOST_FOUND:
            raise InputError(f"n cannot be {n}: 1 to {MOST_FOUND} concepts are found at once")
        near = self._like(like) if like is not None else None
        return self._asked(lambda index: self._find(index, words, terms, conditions, near, n, similar))

    def _find(
        self,
        index: Index,
        words: str,
        terms: Sequence[str],
        conditions: Sequence[tuple[str, str]],
        near: _Near | None,
        n: int,
        similar: bool,
    ) -> Found:
        notes = list(self._problems)
        spaces, total = index.spaces(), len(index)
        if near is None and terms and similar and spaces:
            near, why = self._words_in(next(iter(spaces)), index, words)
            if near is None:
                notes.append(f"found by words alone: {why}")
        if near is not None or (terms and similar):
            compared = spaces.get(near.space, 0) if near else 0
            bare, others = index.without_vectors(), total - index.without_vectors() - compared
            if bare:
                notes.append(f"{bare} of {total} concepts are found by words alone: their runs have no {VECTORS}")
            if near and others:
                notes.append(f"{others} of {total} concepts are found by words alone: their vectors are another CLIP's")
        query = Query(
            terms,
            conditions,
            near.vector if near else None,
            near.space if near else "",
            near.itself if near else None,
        )
        shown = {place.path: place.shown for place in self.places}
        return Found(tuple(_hit(row, shown[row.place]) for row in index.find(query, n)), tuple(notes))

    def _conditions(self, attributes: Mapping[str, str]) -> list[tuple[str, str]]:
        """Attributes by their names, whatever alias was given."""
        found = []
        for name, word in attributes.items():
            if not terms_in(word):
                raise InputError(f"attribute {name}: give a word, as in material=glass")
            names = {alias: one.name for one in self._attributes() for alias in (one.name, *one.aliases)}
            found.append((names.get(name, name), word))
        return found

    def _attributes(self) -> Iterable[Any]:
        offered = self._plugins.offered("attribute")
        return [self._plugins.attribute(name) for name in offered]

    @property
    def _plugins(self) -> Plugins:
        return self._installed or plugins.installed()

    # --- Vectors -----------------------------------------------------------------------------------------------------

    def _like(self, like: str | Path | Concept) -> _Near:
        """The vector of a concept."""
        if isinstance(like, Concept):
            run, concept = Extraction.open(like.mask_file.parents[1]), like
        else:
            from icekit.run.compose import split_reference  # torch takes seconds to import

            path, key = split_reference(str(like))
            run = Extraction.open(path)
            concept = run.concept(key)
        vectors = run.vectors()
        if vectors is None:
            raise InputError(f"{run.run_dir} has no {VECTORS}: nothing can be like its concepts; find them by words")
        row = [one.index for one in run.concepts].index(concept.index)
        return _Near(space_of(vectors), vectors.rows[row], (Path(os.path.abspath(run.run_dir)), concept.index))

    def _words_in(self, space: str, index: Index, words: str) -> tuple[_Near | None, str]:
        """Where the retriever's CLIP places words; or None, and why."""
        if space not in self._readers:
            self._readers[space] = self._reader_of(space, index)
        reader, why = self._readers[space]
        if reader is None:
            return None, why
        [row] = reader.embed([" ".join(words.split())])
        vector = np.asarray(row, dtype=np.float32)
        if vector.shape != (index.dimensions(space),):
            return None, "the retriever places words in another space than pictures"
        return _Near(space, vector), ""

    def _reader_of(self, space: str, index: Index) -> tuple[Any, str]:
        """What embeds texts in a space, by the settings of a run that has vectors of it; or None, and why."""
        import torch

        why = "the retriever of these runs is not installed"
        for path in itertools.islice(index.runs_of(space), CLIPS_TRIED):
            try:
                settings = Extraction.open(path).settings()
                name = settings.name_of("retriever")
                make = getattr(self._plugins.component("retriever", name), "text_encoder", None)
                if make is None:
                    continue
                values = self._plugins.component_settings("retriever", name, settings.values_of("retriever"))
                with self._plugins.naming("load", [("retriever", name)], by=("retriever", name)):
                    reader = make(values, torch.device("cpu"))
            except (InputError, RunError) as error:
                why = f"the CLIP of {path} is not at hand ({printable(str(error), 300)})"
                continue
            if space.startswith(f"{reader.space} ["):
                return reader, ""
            why = f"the CLIP that {path} names is another one by now"
        return None, why

    # --- The index ---------------------------------------------------------------------------------------------------

    def _asked(self, ask: Callable[[Index], Result]) -> Result:
        """What the index answers, up to date; one that is found to be damaged is made anew."""
        try:
            return ask(self._current())
        except (apsw.CorruptError, apsw.NotADBError, apsw.SQLError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError) or self._index is None or self._index.file is None:
                raise
            log.info("the index in %s is damaged (%s), and is made anew", self._index.file, error)
            file = self._index.file
            self._index.close()
            file.unlink(missing_ok=True)
            self._index = None
            return ask(self._current())

    def _current(self) -> Index:
        """The index, up to date with the runs."""
        if self._index is None:
            self._index = self._open_index()
        try:
            self._update(self._index)
        except CannotWrite:
            if self._index_file is not None or self._index.file is None:
                raise
            self._index.close()
            self._index = Index(None)
            self._update(self._index)
        return self._index

    def _open_index(self) -> Index:
        if self._index_file is not None:
            return Index(self._index_file)
        folder = cache_folder()
        if folder is None:
            return Index(None)
        file = folder / "library" / f"{hashlib.sha256(self._named).hexdigest()}.sqlite"
        try:
            return Index(file, is_ours=True)
        except (CannotWrite, InputError):  # a cache is no one's duty
            return Index(None)

    def _update(self, index: Index) -> None:
        """Put in what is new, take out what is gone or changed."""
        places = {place.path: place for place in self.places}
        known = index.stamps()
        stamps = {path: stamp_of(path) for path in places}
        gone = [path for path in known if path not in places]
        new = [path for path, stamp in stamps.items() if known.get(path) != stamp]
        self._problems = []
        ticker = Ticker("reading runs")
        for start in range(0, max(len(new), 1) if gone or new else 0, BATCH):
            with index.changing():
                for path in gone if start == 0 else []:
                    index.remove(path)
                for number, path in enumerate(new[start : start + BATCH], start):
                    ticker.tick(number, len(new))
                    index.remove(path)
                    self._put(index, places[path], stamps[path])

    def _put(self, index: Index, place: Place, stamp: str) -> None:
        try:
            entries, space = _entries(place.path)
        except InputError as error:
            self._problems.append(f"passed over: {printable(str(error), 400)}")
            return
        index.put(place.path, stamp, entries, space)


@dataclass(frozen=True)
class _Near:
    """A point that concepts are to be near. itself: the concept that is there, which is not found."""

    space: str
    vector: NDArray[np.float32]
    itself: tuple[Path, int] | None = None


def space_of(vectors: Vectors) -> str:
    """The name of a space in the index, where spaces of one name and other lengths are others."""
    return f"{vectors.space} [{vectors.rows.shape[1]}]"


def _entries(path: Path) -> tuple[list[Entry], str]:
    """What the index keeps of a run. Raises InputError where it is damaged."""
    directory = RunDirectory(path)
    record = directory.files.check("manifest.json", Manifest, readable_manifest(directory))
    vectors = directory.load_vectors(len(record.concepts))
    rows: Iterable[Any] = itertools.repeat(None) if vectors is None else vectors.rows
    entries = [
        Entry(one.index, one.label, one.words, row)
        for one, row in zip(record.concepts, rows, strict=vectors is not None)
    ]
    return entries, space_of(vectors) if vectors else ""


def _hit(row: Row, shown: str) -> Hit:
    return Hit(row.place, shown, row.number, row.label, row.words, row.matched, row.similarity)
