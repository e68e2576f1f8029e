"""Compose extracted concepts, of one image or of several, in one prompt with plain words."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from icekit import plugins
from icekit.plugins import Plugins
from icekit.protocols import Backbone, InputError, object_tokens
from icekit.randomness import derived_seed
from icekit.run.atomic import write_image_atomically, write_json_atomically
from icekit.run.directory import SCHEMA_VERSION
from icekit.run.extraction import Concept, Extraction
from icekit.run.models import load_backbone, reproducible, resolve_device
from icekit.settings import Settings, nearest


@dataclass(frozen=True)
class Composition:
    """What ``compose`` made.

    prompt: as typed. expanded: with tokens in the place of ``{...}``. seeds: one per image.
    images: the files, in the order of the seeds.
    """

    out: Path
    prompt: str
    expanded: str
    seeds: list[int]
    images: list[Path]


@dataclass(frozen=True)
class Bound:
    """A concept bound to a name of the prompt, its tokens renamed so that no other binding has the same."""

    run: Extraction
    concept: Concept
    tokens: dict[str, str]

    @property
    def rows(self) -> dict[str, dict[str, Tensor]]:
        """Its tokens under their new names -> text encoder -> row."""
        return {token: self.concept.embeddings[part] for part, token in self.tokens.items()}


def compose(
    prompt: str,
    concepts: Mapping[str, str | Path | Extraction],
    *,
    n: int = 4,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    installed: Plugins | None = None,
) -> Composition:
    """Generate images from a prompt that names concepts of earlier runs.

    ``{a}`` is the object bound to ``a`` (its instance and category tokens), ``{a.colour}`` its colour token,
    ``{a.category}`` and ``{a.instance}`` those two alone; as far as its run's learner learned them.

    Args:
        prompt: plain words and placeholders, as in ``"a cup, {b.material} {b.colour}"``.
        concepts: name -> run directory, ``RUN_DIR:CONCEPT`` (index or label; else the first one) or Extraction.
        n: number of images.
        seed: image i depends on it and i.
        out: folder for the images and ``prompt.json``; a new one in ``compositions/`` if None.
        device: as in the settings; that of the runs if None.
        overwrite: replace the composition in ``out``.
        on_image: called after every image with the number done and the total.
        installed: the plugins to use; those of this Python environment if None.

    Raises:
        InputError: a placeholder, a run or ``out`` is wrong, or the runs do not share one backbone.
    """
    if n < 1:
        raise InputError(f"the number of images cannot be {n}: it should be 1 or more")
    bound = {name: bind(name, reference) for name, reference in concepts.items()}
    expanded = expand(prompt, {name: one.tokens for name, one in bound.items()})
    run = drawing_run(bound)
    folder = _output_folder(prompt, out, overwrite)
    found = installed or plugins.installed()
    settings = _drawing_settings(run, found)
    backbone = load_backbone(found, settings, resolve_device(device or settings.device))
    for name, one in bound.items():
        _check_fit(name, one, backbone)

    stale = _own_files(folder)
    seeds = [derived_seed(seed, "compose", number) for number in range(n)]
    files = [folder / f"{number}.png" for number in range(n)]
    done = 0

    def keep(number: int, picture: Image.Image) -> None:
        nonlocal done
        while stale:  # now that there is something in its place
            stale.pop().unlink()
        write_image_atomically(files[number], picture)
        done += 1
        if on_image:
            on_image(done, n)

    with reproducible():
        backbone.generate(
            [expanded] * n,
            seeds=seeds,
            tokens={token: rows for one in bound.values() for token, rows in one.rows.items()},
            steps=settings.sample_steps,
            guidance_scale=settings.guidance_scale,
            tuning=run.tuning(),
            on_image=keep,
        )
    record = {
        "icekit_version": plugins.own_version(),
        "prompt": prompt,
        "expanded": expanded,
        "concepts": {
            name: {"run": str(one.run.run_dir), "index": one.concept.index, "label": one.concept.label}
            for name, one in bound.items()
        },
        "seed": seed,
        "seeds": seeds,
        "images": [file.name for file in files],
    }
    write_json_atomically(folder / "prompt.json", record)
    return Composition(folder, prompt, expanded, seeds, files)


def bind(name: str, reference: str | Path | Extraction) -> Bound:
    """Open what a name stands for, and give its tokens names of their own: ``<cup-0-colour>`` -> ``<a-cup-0-colour>``.

    Raises:
        InputError: not a name, not a complete run, or no such concept in it.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InputError(f"{name!r} cannot stand for a concept: use a letter or a word, as in a=RUN_DIR")
    if isinstance(reference, Extraction):
        run, concept = reference, reference.concept()
    else:
        path, key = split_reference(str(reference))
        run = Extraction.open(path)
        concept = run.concept(key)
    tokens = {part: f"<{name}-{token.strip('<>')}>" for part, token in concept.tokens.items()}
    return Bound(run, concept, tokens)


def split_reference(reference: str) -> tuple[str, str | None]:
    """``"runs/photo:cup"`` -> (``"runs/photo"``, ``"cup"``). A folder may have a colon in its own name."""
    path, colon, concept = reference.rpartition(":")
    if not colon or Path(reference).exists():
        return reference, None
    return path, concept


def expand(prompt: str, tokens: Mapping[str, Mapping[str, str]]) -> str:
    """Put tokens in the place of placeholders.

    Args:
        prompt: with ``{name}`` and ``{name.part}``; ``{{`` is a brace.
        tokens: name -> part -> token.

    Raises:
        InputError: an unknown name or part, or braces that do not match.
    """
    try:
        pieces = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise InputError(f"prompt {prompt!r}: {str(error).lower()}") from error
    text = ""
    for literal, placeholder, form, conversion in pieces:
        text += literal
        if placeholder is None:
            continue
        name, dot, part = placeholder.partition(".")
        if name not in tokens or form or conversion:
            raise InputError(
                f"prompt {prompt!r} has {{{placeholder}}}, but no concept {name!r}: {nearest(name, tokens)}"
            )
        if not dot:
            text += object_tokens(tokens[name])
        elif part in tokens[name]:
            text += tokens[name][part]
        else:
            raise InputError(
                f"prompt {prompt!r} has {{{placeholder}}}, but {name} has no token {part!r}: "
                f"{nearest(part, tokens[name])}"
            )
    if not text.strip():
        raise InputError("the prompt is empty: give words, or placeholders as in 'a photo of {a}'")
    return text


def drawing_run(bound: Mapping[str, Bound]) -> Extraction:
    """The run whose backbone draws: the one with fine-tuned weights if there is one, or else the first.

    Raises:
        InputError: no concept is bound; two runs have different backbones, so that their tokens mean nothing to each
            other; or weights of their own: there is one model.
    """
    if not bound:
        raise InputError("no concept given: bind one, as in a=RUN_DIR")
    (first_name, first), *others = bound.items()
    for name, other in others:
        if not _of_one_model(first.run, other.run):
            raise InputError(
                f"{first_name} and {name} were learned with different backbones"
                f" ({_describe(first.run)}, {_describe(other.run)}): their tokens cannot be mixed"
            )
    runs = {one.run.run_dir.resolve(): one.run for one in bound.values()}
    tuned = {path: run for path, run in runs.items() if run.is_fine_tuned}
    if len(tuned) > 1:
        raise InputError(f"several runs have fine-tuned weights of their own ({', '.join(map(str, tuned))}): use one")
    return next(iter(tuned.values()), first.run)


def _of_one_model(one: Extraction, other: Extraction) -> bool:
    """Whether tokens of one run mean the same to the other's backbone, wherever its files are."""
    if one.identity is not None and other.identity is not None:
        return one.identity == other.identity
    return _describe(one) == _describe(other)  # all that a run of schema version 1 tells


def _describe(run: Extraction) -> str:
    settings = run.settings()
    model = settings.values_of("backbone").get("model")
    return settings.name_of("backbone") + (f" with model {model}" if model else "")


def _drawing_settings(run: Extraction, found: Plugins) -> Settings:
    """The settings of a run, as far as generating goes; of schema version 1 those that its backbone still has."""
    settings = run.settings()
    if run.schema_version == SCHEMA_VERSION:
        return settings
    known = found.component("backbone", settings.name_of("backbone")).Settings.model_fields  # type: ignore[attr-defined]
    values = {key: value for key, value in settings.values_of("backbone").items() if key in known}
    return settings.model_copy(update={"backbone": values})


def _check_fit(name: str, bound: Bound, backbone: Backbone) -> None:
    """Whether the backbone that was loaded is the one that these tokens were learned with.

    Raises:
        InputError: it is another one by now.
    """
    lengths = {encoder: len(row) for rows in bound.rows.values() for encoder, row in rows.items()}
    if lengths != dict(backbone.rows) or bound.run.identity not in (None, backbone.identity):
        raise InputError(
            f"the tokens of {name} were learned with another model than the one that {_describe(bound.run)} is now: "
            "give the run the model it was made with, or make it anew"
        )


def _output_folder(prompt: str, out: str | Path | None, overwrite: bool) -> Path:
    if out is None:
        stem = "-".join(re.findall(r"\w+", prompt.lower()))[:60] or "composition"
        base = Path("compositions") / stem
        number = 1
        while (folder := base if number == 1 else base.with_name(f"{stem}-{number}")).exists():
            number += 1
        return folder
    folder = Path(out)
    if folder.is_file():
        raise InputError(f"{folder} is a file: --out takes a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not _own_files(folder):
            raise InputError(f"{folder} is not empty and no composition of icekit's: choose another --out")
        if not overwrite:
            raise InputError(f"{folder} already holds a composition: --overwrite replaces it, or choose another --out")
    return folder


def _own_files(folder: Path) -> list[Path]:
    """What an earlier composition left; nothing in a folder that has no ``prompt.json`` of ours."""
    if not (folder / "prompt.json").is_file() or '"icekit_version"' not in (folder / "prompt.json").read_text():
        return []
    return [folder / "prompt.json", *(path for path in folder.iterdir() if re.fullmatch(r"\d+\.png", path.name))]
