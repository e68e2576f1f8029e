"""A complete run, read: its manifest, its concepts with their tokens, and several runs together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from icekit.protocols import FineTuning, InputError
from icekit.protocols.errors import printable
from icekit.run.directory import OLDEST_SCHEMA_VERSION, SCHEMA_VERSION, RunDirectory, Vectors
from icekit.run.hub import run_path
from icekit.run.reading import Files
from icekit.run.records import Header, Manifest
from icekit.settings import Settings, of_run_before, read_settings_file, validate
from icekit.wording import run_into

if TYPE_CHECKING:
    from torch import Tensor

MOST_NAMED = 8
"""Most concepts that one line names."""


@dataclass(frozen=True, repr=False)
class Concept:
    """One concept of a complete run.

    index, label, score, area, words: as in the manifest; ``area`` is the mask's share of the image.
    tokens: part (``"category"``, ``"instance"``, ``"colour"``, ...) -> token (``"<cup-0-colour>"``).
    embeddings: part -> text encoder -> its row, float32 on the CPU.
    mask_file: the mask, 0 or 255.
    read_mask: reads it, checked.
    """

    index: int
    label: str
    score: float
    area: float
    tokens: dict[str, str]
    words: dict[str, list[str]]
    embeddings: dict[str, dict[str, Tensor]] = field(repr=False)
    mask_file: Path = field(repr=False)
    read_mask: Callable[[], NDArray[np.bool_]] = field(repr=False, compare=False)

    def __repr__(self) -> str:
        words = [", ".join(words[:1]) for words in self.words.values() if words]
        seen = f" ({', '.join(words)})" if words else ""
        return f"<Concept {self.index}: {printable(self.label, 60)}{printable(seen, 80)}, {self.area:.0%} of the image>"

    def _repr_html_(self) -> str:
        from icekit.run.in_notebooks import of_concept

        return of_concept(self)

    def mask(self) -> NDArray[np.bool_]:
        """The mask, bool ``[H, W]``, the size of the run's image.

        Raises:
            InputError: it is not there, damaged, of another size, or outside the run.
        """
        return self.read_mask()


@dataclass(frozen=True, repr=False)
class Extraction:
    """A complete run: where it is, its manifest and its concepts.

    manifest: as it is on disk. record: the same, checked. home: where its files will be in the end, if not there.
    """

    run_dir: Path
    manifest: dict[str, Any] = field(repr=False)
    record: Manifest = field(repr=False)
    concepts: tuple[Concept, ...]
    home: Path = field(repr=False)

    def __repr__(self) -> str:
        return f"<Extraction {printable(str(self.run_dir), 200)}: {listed_concepts(self.concepts)}>"

    def _repr_html_(self) -> str:
        from icekit.run.in_notebooks import of_run

        return of_run(self)

    @classmethod
    def open(cls, run_dir: str | Path) -> Extraction:
        """Read a run directory, or a run of the hub: ``hub:user/run``, see ``hub``.

        Raises:
            InputError: there is none, it is not complete or damaged, or a newer version of icekit wrote it; or the hub
                does not give it.
        """
        path = run_path(run_dir)
        directory = RunDirectory(path)
        if not path.is_dir():
            raise InputError(f"no such run directory: {path}")
        directory.finish_exchange()
        return cls.of(directory, readable_manifest(directory))

    @classmethod
    def of(cls, directory: RunDirectory, manifest: dict[str, Any]) -> Extraction:
        """The run in a directory whose manifest is this one, which need not be on disk yet.

        Raises:
            InputError: it is damaged.
        """
        path, files = directory.path, directory.files
        record = files.check("manifest.json", Manifest, manifest)
        rows = directory.load_tokens(record.backbone.rows if record.backbone else None, record.tokens)
        if rows is None:
            raise files.damaged("embeddings.safetensors", "it is missing")
        concepts = tuple(
            Concept(
                index=entry.index,
                label=entry.label,
                score=entry.score,
                area=entry.area,
                tokens=entry.tokens,
                words=entry.words,
                embeddings={part: rows[token] for part, token in entry.tokens.items()},
                mask_file=path / entry.mask,
                read_mask=_mask_reader(files, entry.mask, (record.image.width, record.image.height)),
            )
            for entry in record.concepts
        )
        return cls(path, manifest, record, concepts, directory.home)

    @property
    def tokens(self) -> dict[str, dict[str, Tensor]]:
        """Every token of the run -> text encoder -> its row, float32."""
        return {token: concept.embeddings[part] for concept in self.concepts for part, token in concept.tokens.items()}

    @property
    def schema_version(self) -> int:
        """That of its manifest."""
        return self.record.schema_version

    @property
    def identity(self) -> str | None:
        """What its tokens depend on, see ``protocols.Backbone``; None for a run of schema version 1."""
        return self.record.backbone.identity if self.record.backbone else None

    def settings(self) -> Settings:
        """The settings of the run, complete; of a run of schema version 1 those that there still are.

        Raises:
            InputError: ``settings.toml`` is not there, damaged, or outside the run.
        """
        name = "settings.toml"
        files = RunDirectory(self.run_dir).files
        path = files.find(name)
        if path is None:
            raise files.damaged(name, "it is missing")
        try:
            values = of_run_before(read_settings_file(path))
            if self.schema_version < SCHEMA_VERSION:
                values = {key: value for key, value in values.items() if key in Settings.model_fields}
            return validate(Settings, values)
        except InputError as error:
            problem = str(error).removeprefix(f"settings file {path}").removeprefix(":").strip()
            raise files.damaged(name, printable(problem, 400)) from error

    def vectors(self) -> Vectors | None:
        """Where the retriever's CLIP places each concept; None where the run did not keep it.

        Raises:
            InputError: ``vectors.safetensors`` is damaged, or outside the run.
        """
        return RunDirectory(self.run_dir).load_vectors(len(self.concepts))

    @property
    def is_fine_tuned(self) -> bool:
        """Whether the run has trained weights of the noise predictor, by an adapter or as a whole."""
        return RunDirectory(self.run_dir).is_fine_tuned

    def tuning(self) -> FineTuning:
        """What the learner made of the noise predictor."""
        return RunDirectory(self.run_dir).load_tuning()

    def tuning_files(self) -> dict[str, Path]:
        """The files of what the learner made of the noise predictor: name in the run directory -> where it is.

        ``lora.safetensors``, or a folder in diffusers' format (``unet/``, ``transformer/``); none where it was not
        trained.

        Raises:
            InputError: one is a link that leads out of the run, or no plain file.
        """
        return RunDirectory(self.run_dir).tuning_files()

    def concept(self, reference: str | int | None = None) -> Concept:
        """A concept by its index or label; the first one for None.

        Raises:
            InputError: there is none, or several have the label.
        """
        key = str(0 if reference is None else reference)
        choices = ", ".join(f"{concept.index} ({concept.label})" for concept in self.concepts)
        by_index = [concept for concept in self.concepts if str(concept.index) == key]
        found = by_index or [concept for concept in self.concepts if concept.label == key]
        if len(found) != 1:
            problem = "has no concept" if not found else "has several concepts"
            raise InputError(f"{self.run_dir} {problem} {key!r}: choose from {choices}")
        return found[0]


def readable_manifest(directory: RunDirectory) -> dict[str, Any]:
    """The manifest of a complete run that this version reads, and nothing else of it.

    Raises:
        InputError: it is not complete or damaged, or a newer version of icekit wrote it.
    """
    path, files = directory.path, directory.files
    manifest = directory.read_manifest()
    if not manifest:
        if directory.is_ours:
            raise InputError(f"the run in {path} is not complete: {run_into(path, 'resume')} goes on")
        raise InputError(f"{path} is not a run directory: it has no manifest.json of icekit's")
    header = files.check("manifest.json", Header, manifest)
    if not OLDEST_SCHEMA_VERSION <= header.schema_version <= SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {header.schema_version} (icekit {header.icekit_version}); this "
            f"icekit reads up to version {SCHEMA_VERSION}: use that one, or {run_into(path, 'overwrite')}"
        )
    return manifest


def open(run_dir: str | Path) -> Extraction:
    """A complete run, read: its concepts with their words, masks and tokens.

    Raises:
        InputError: there is none, it is not complete or damaged, or a newer version of icekit wrote it.
    """
    return Extraction.open(run_dir)


def listed_concepts(concepts: Sequence[Concept]) -> str:
    """Concepts in one line."""
    named = [f"{concept.index} {printable(concept.label, 40)}" for concept in concepts[:MOST_NAMED]]
    return ", ".join([*named, *(["..."] if len(concepts) > MOST_NAMED else [])]) or "no concepts"


def _mask_reader(files: Files, name: str, size: tuple[int, int]) -> Callable[[], NDArray[np.bool_]]:
    def read() -> NDArray[np.bool_]:
        picture = files.picture(name, size)
        if picture is None:
            raise files.damaged(name, "it is missing")
        return np.asarray(picture.convert("L")) > 127

    return read
