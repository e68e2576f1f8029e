"""The index of a library: concepts of many runs by word and by similarity, in an embedded database (SQLite).

It is made from the runs, brought up to date before it is asked, and never the truth: it may be deleted at any time, and
one that is damaged or of another version is made anew. Vectors are compared by sqlite-vec, one by one and exactly: an
approximate index would save nothing that anybody notices at 100,000 concepts.

apsw brings an SQLite of its own, for that of many Python installations loads no extensions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import sqlite_vec
from numpy.typing import NDArray

from icekit.protocols import InputError
from icekit.run.atomic import CannotWrite
from icekit.wording import option

APPLICATION = 0x1CEC17
"""What the file says it is (SQLite's ``application_id``)."""
VERSION = 1
"""Of the tables. An index of another one is made anew."""
MOST_FOUND = 4096
"""Most concepts that one query gives: sqlite-vec's own bound."""
WAIT_MS = 60_000
"""How long another process may be bringing the index up to date."""
MAPPED_BYTES = 2**34
"""Of the file, so much is read as memory: rows are not copied before they are compared."""
ONE_BY_ONE = 500
"""Vectors that are looked up one by one; of more all are read."""
BATCH = 500
"""Runs that are put in between two commits."""
_HEADER = 100
_TABLES = """
create table runs(id integer primary key, place blob not null unique, stamp text not null);
create table concepts(id integer primary key, run integer not null, number integer not null, label text not null,
    words text not null, space integer);
create index concepts_of on concepts(run);
create table terms(term text, concept integer, weight real, primary key(term, concept)) without rowid;
create index terms_of on terms(concept);
create table words(attribute text, word text, concept integer, rank integer, primary key(attribute, word, concept))
    without rowid;
create index words_of on words(concept);
create table spaces(id integer primary key, name text not null unique, dimensions integer not null);
"""


@dataclass(frozen=True)
class Entry:
    """A concept as the index keeps it.

    number: its index in its run. label: what it is called. words: attribute -> words, best first. vector: float32
    ``[D]`` of length one, or None.
    """

    number: int
    label: str
    words: Mapping[str, Sequence[str]]
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Row:
    """A concept that was found. place: of its run. matched: how many words of the query it has. weight: how high they
    stand, the sum of each word's ``weight_of``. similarity: the cosine of its vector with the query's, or None.
    """

    place: Path
    number: int
    label: str
    words: dict[str, list[str]]
    matched: int = 0
    weight: float = 0.0
    similarity: float | None = None


@dataclass(frozen=True)
class Query:
    """What is looked for.

    terms: single words, as ``terms_in`` gives them. attributes: (attribute, word) pairs, all of which a concept has.
    vector: float32 ``[D]`` of length one, or None. space: of the vector. without: place and number of a concept that
    is left out.
    """

    terms: Sequence[str] = ()
    attributes: Sequence[tuple[str, str]] = ()
    vector: NDArray[np.float32] | None = None
    space: str = ""
    without: tuple[Path, int] | None = None


def terms_in(text: str) -> list[str]:
    """The single words of a label or of somebody's words, each once: ``"Red-bowl"`` -> ``["red", "bowl"]``."""
    spaced = "".join(one if one.isalnum() else " " for one in text.casefold())
    return list(dict.fromkeys(spaced.split()))


def weight_of(rank: int) -> float:
    """How much a word of an attribute counts: 1 for the first of its list, 1/2 for the second, ..., in (0, 1].

    rank: from 0. The label counts as a first word.
    """
    return 1 / (1 + rank)


class Index:
    """One index, open.

    Raises:
        InputError: another program's file is in the way.
        CannotWrite: the system refuses.
    """

    def __init__(self, file: Path | None, *, is_ours: bool = False) -> None:
        """file: None for one in memory. is_ours: whether what is there may be replaced, whatever it is."""
        self.file = file
        if file is not None and not _is_utf8(file):
            raise InputError(f"{option('index', 'FILE')}: SQLite takes no name that is not UTF-8")
        if file is not None and not is_ours:
            _refuse_foreign(file)
        self._database = _opened(file)
        self._spaces: dict[str, int] = {}
        self._read_spaces()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    # --- Bringing it up to date --------------------------------------------------------------------------------------

    def stamps(self) -> dict[Path, str]:
        """The runs in it, and what each was like."""
        rows = self._database.execute("select place, stamp from runs")
        return {Path(os.fsdecode(place)): stamp for place, stamp in rows}

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Changes within the block are there together or not at all; other processes wait."""
        with _told(self.file):
            self._database.execute("begin immediate")
            try:
                self._read_spaces()  # another process may have met a new one
                yield
                self._database.execute("commit")
            except BaseException:
                self._database.execute("rollback")
                self._read_spaces()
                raise

    def _read_spaces(self) -> None:
        self._spaces = dict(self._database.execute("select name, id from spaces"))

    def remove(self, place: Path) -> None:
        """Forget a run."""
        key = os.fsencode(place)
        for (run,) in self._database.execute("select id from runs where place = ?", (key,)).fetchall():
            for concept, space in self._database.execute(
                "select id, space from concepts where run = ?", (run,)
            ).fetchall():
                if space is not None:
                    self._database.execute(f"delete from vectors_{space:d} where rowid = ?", (concept,))
                self._database.execute("delete from terms where concept = ?", (concept,))
                self._database.execute("delete from words where concept = ?", (concept,))
            self._database.execute("delete from concepts where run = ?", (run,))
            self._database.execute("delete from runs where id = ?", (run,))

    def put(self, place: Path, stamp: str, entries: Iterable[Entry], space: str = "") -> None:
        """Put in a run, which is not there. stamp: what it is like now. space: of the vectors, if there are some."""
        execute = self._database.execute
        [(run,)] = execute("insert into runs(place, stamp) values(?, ?) returning id", (os.fsencode(place), stamp))
        for one in entries:
            own = self._space(space, len(one.vector)) if one.vector is not None else None
            values = (run, one.number, one.label, json.dumps({key: list(words) for key, words in one.words.items()}))
            [(concept,)] = execute(
                "insert into concepts(run, number, label, words, space) values(?, ?, ?, ?, ?) returning id",
                (*values, own),
            )
            weights = dict.fromkeys(terms_in(one.label), 1.0)
            for attribute, words in one.words.items():
                for rank, word in enumerate(words):
                    for term in terms_in(word):
                        weights[term] = max(weights.get(term, 0.0), weight_of(rank))
                    execute(
                        "insert or ignore into words values(?, ?, ?, ?)",
                        (attribute.casefold(), " ".join(terms_in(word)), concept, rank),
                    )
            self._database.executemany(
                "insert into terms values(?, ?, ?)", [(term, concept, weight) for term, weight in weights.items()]
            )
            if own is not None and one.vector is not None:
                execute(f"insert into vectors_{own:d}(rowid, vector) values(?, ?)", (concept, _blob(one.vector)))

    def _space(self, name: str, dimensions: int) -> int:
        """The number of a space, whose table is made when it is first met."""
        if name not in self._spaces:
            [(number,)] = self._database.execute(
                "insert into spaces(name, dimensions) values(?, ?) returning id", (name, dimensions)
            )
            self._database.execute(
                f"create virtual table vectors_{number:d} using vec0(vector float[{dimensions:d}], chunk_size=4096)"
            )
            self._spaces[name] = number
        return self._spaces[name]

    # --- Asking ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many concepts there are."""
        return int(_one(self._database, "select count(*) from concepts"))

    def spaces(self) -> dict[str, int]:
        """The spaces of its vectors, and how many concepts each has; the largest first."""
        rows = self._database.execute(
            "select spaces.name, count(*) from concepts join spaces on spaces.id = concepts.space "
            "group by spaces.id order by count(*) desc, spaces.name"
        )
        return dict(rows)

    def without_vectors(self) -> int:
        """How many concepts have none."""
        return int(_one(self._database, "select count(*) from concepts where space is null"))

    def runs_of(self, space: str) -> Iterator[Path]:
        """The runs whose vectors are of this space."""
        rows = self._database.execute(
            "select distinct runs.place from runs join concepts on concepts.run = runs.id "
            "join spaces on spaces.id = concepts.space where spaces.name = ?",
            (space,),
        )
        return (Path(os.fsdecode(place)) for (place,) in rows)

    def dimensions(self, space: str) -> int:
        """How many numbers the vectors of a space have; 0 where there are none."""
        return int(_one(self._database, "select dimensions from spaces where name = ?", [space]) or 0)

    def find(self, query: Query, count: int) -> list[Row]:
        """The concepts that fit best, at most so many.

        Those with more words of the query come first; of equally many those whose words stand higher; of these the
        more similar. What has none of the words follows, by similarity alone. A query without any vector finds those
        with a word, and one of attributes alone all that have these.
        """
        self._read_spaces()
        found: list[tuple[int, int, float, float | None]] = []
        for (matched, weight), concepts in self._tiers(query):
            room = count - len(found)
            if room <= 0:
                break
            near = self._near(query, concepts, room)
            found += [(concept, matched, weight, similarity) for concept, similarity in near]
        if len(found) < count and query.vector is not None and not query.attributes:
            seen = {one[0] for one in found}
            nearest = self._nearest(query, count + (query.without is not None), None)
            left = self._left_out(query)
            more = [(concept, 0, 0.0, near) for concept, near in nearest if concept not in seen and concept != left]
            found += more[: count - len(found)]
        return [self._row(*one) for one in found]

    def _tiers(self, query: Query) -> Iterator[tuple[tuple[int, float], list[int]]]:
        """Concepts by how many words they have and how high these stand, the best first."""
        conditions: list[str] = []
        values: list[object] = []
        for attribute, word in query.attributes:
            conditions.append("concept in (select concept from words where attribute = ? and word = ?)")
            values += [attribute.casefold(), " ".join(terms_in(word))]
        if query.terms:
            marks = ", ".join("?" * len(query.terms))
            where = " and ".join([f"term in ({marks})", *conditions])
            statement = (
                f"select concept, count(*) as matched, sum(weight) as weight from terms where {where} group by concept"
            )
            values = [*query.terms, *values]
        elif conditions:
            rank = "(select 1.0 / (1 + rank) from words where attribute = ? and word = ? and concept = found.concept)"
            ranks = " + ".join([rank] * len(query.attributes))
            statement = (
                f"select concept, 0 as matched, {ranks} as weight from (select id as concept from concepts where "
                f"{' and '.join(one.replace('concept in', 'id in') for one in conditions)}) as found"
            )
            values = [*values, *values]
        else:
            return
        left = self._left_out(query)
        for matched, weight, concepts in self._database.execute(
            f"select matched, round(weight, 6) as weight, json_group_array(concept) from ({statement}) "
            "group by 1, 2 order by 1 desc, 2 desc",
            values,
        ):
            yield (matched, weight), [concept for concept in json.loads(concepts) if concept != left]

    def _near(self, query: Query, concepts: Sequence[int], count: int) -> list[tuple[int, float | None]]:
        """Of these concepts so many: the nearest first, then those without a vector, in the order of the index."""
        near: dict[int, float | None] = {}
        if query.vector is not None and query.space in self._spaces:
            if len(concepts) > ONE_BY_ONE:
                near |= self._nearest(query, min(count, len(concepts)), concepts)
            else:
                near |= self._cosines(query, concepts)[:count]
        for concept in sorted(concepts):
            if len(near) == count:
                break
            near.setdefault(concept, None)
        return list(near.items())

    def _nearest(self, query: Query, count: int, among: Sequence[int] | None) -> list[tuple[int, float]]:
        """The nearest vectors and their cosines. Of vectors of length one |a - b|^2 = 2 - 2 cos(a, b)."""
        number = self._spaces.get(query.space)
        if number is None or query.vector is None or count < 1:
            return []
        values: list[object] = [_blob(query.vector), min(count, MOST_FOUND)]
        within = ""
        if among is not None:
            within, values = " and rowid in (select value from json_each(?))", [*values, json.dumps(list(among))]
        rows = self._database.execute(
            f"select rowid, distance from vectors_{number:d} where vector match ? and k = ?{within}",
            values,
        )
        return [(concept, 1 - distance**2 / 2) for concept, distance in sorted(rows, key=lambda row: (row[1], row[0]))]

    def _cosines(self, query: Query, concepts: Sequence[int]) -> list[tuple[int, float]]:
        """The cosines of these concepts' vectors with the query's, the nearest first."""
        assert query.vector is not None
        statement = f"select vec_distance_cosine(vector, ?) from vectors_{self._spaces[query.space]:d} where rowid = ?"
        blob, cosines = _blob(query.vector), []
        for concept in concepts:
            for (distance,) in self._database.execute(statement, (blob, concept)):
                cosines.append((concept, 1 - distance))
        return sorted(cosines, key=lambda one: (-one[1], one[0]))

    def _left_out(self, query: Query) -> int | None:
        if query.without is None:
            return None
        place, number = query.without
        statement = (
            "select concepts.id from concepts join runs on runs.id = concepts.run where place = ? and number = ?"
        )
        found = _one(self._database, statement, [os.fsencode(place), number])
        return None if found is None else int(found)

    def _row(self, concept: int, matched: int, weight: float, similarity: float | None) -> Row:
        [(place, number, label, words)] = self._database.execute(
            "select place, number, label, words from concepts join runs on runs.id = run where concepts.id = ?",
            (concept,),
        )
        return Row(Path(os.fsdecode(place)), number, label, json.loads(words), matched, weight, similarity)


def _one(database: apsw.Connection, statement: str, values: Sequence[object] = ()) -> Any:
    """The first value of the first row; None where there is no row."""
    row = database.execute(statement, tuple(values)).fetchone()
    return None if row is None else row[0]


def _blob(vector: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def _opened(file: Path | None) -> apsw.Connection:
    """A database with this version's tables: the one that is there, or a new one in its place."""
    with _told(file):
        if file is None:
            return _prepared(apsw.Connection(":memory:"))
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _prepared(apsw.Connection(str(file)))
        except (apsw.NotADBError, apsw.CorruptError, apsw.SQLError, _OtherVersion):
            for name in (file, *(file.with_name(file.name + ending) for ending in ("-journal", "-wal", "-shm"))):
                name.unlink(missing_ok=True)
            return _prepared(apsw.Connection(str(file)))


class _OtherVersion(Exception):
    """The tables are of another version of icekit."""


def _prepared(database: apsw.Connection) -> apsw.Connection:
    """The database with sqlite-vec in it and with its tables, which are made in an empty one."""
    try:
        database.set_busy_timeout(WAIT_MS)
        database.enable_load_extension(True)
        database.load_extension(sqlite_vec.loadable_path())
        database.enable_load_extension(False)
        for pragma in ("trusted_schema = off", f"mmap_size = {MAPPED_BYTES}"):
            database.execute(f"pragma {pragma}").fetchall()
        database.execute("begin immediate")
        version = _one(database, "pragma user_version")
        tables = _one(database, "select count(*) from sqlite_schema")
        if not tables:
            database.execute(f"{_TABLES}; pragma application_id = {APPLICATION}; pragma user_version = {VERSION}")
        elif version != VERSION or _one(database, "pragma application_id") != APPLICATION:
            raise _OtherVersion
        database.execute("commit")
        database.execute("select count(*) from spaces").fetchall()
    except BaseException:
        database.close()
        raise
    return database


def _is_utf8(file: Path) -> bool:
    """Whether a file's name is UTF-8, as SQLite wants it."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_foreign(file: Path) -> None:
    """Nothing, unless there is a file that is no index of icekit's, whole or damaged.

    Raises:
        InputError: there is.
    """
    if not os.path.lexists(file):
        return
    problem = f"{file} is no index of icekit's: {option('index', 'FILE')} takes a new name, or an index"
    if not file.is_file():
        raise InputError(problem)
    try:
        with file.open("rb") as opened:
            header = opened.read(_HEADER)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    if not (header.startswith(b"SQLite format 3\0") and int.from_bytes(header[68:72], "big") == APPLICATION):
        raise InputError(problem)


@contextmanager
def _told(file: Path | None) -> Iterator[None]:
    """What the system refuses is said in one line."""
    try:
        yield
    except (apsw.FullError, apsw.IOError, apsw.CantOpenError, apsw.ReadOnlyError, apsw.BusyError, OSError) as error:
        reason = error if isinstance(error, OSError) else OSError(0, str(error))
        raise CannotWrite(file or Path("the index in memory"), reason) from error
