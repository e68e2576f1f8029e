"""Compose extracted concepts, of one image or of several, in one prompt with plain words."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from icekit import plugins
from icekit.files import read_bytes
from icekit.paths import user_path
from icekit.plugins import Plugins
from icekit.protocols import Backbone, InputError, object_tokens
from icekit.protocols.values import bounded
from icekit.randomness import derived_seed
from icekit.run.atomic import write_image_atomically, write_json_atomically
from icekit.run.border import draw
from icekit.run.directory import SCHEMA_VERSION
from icekit.run.extraction import Concept, Extraction
from icekit.run.machine import enough_memory
from icekit.run.models import load_backbone, reproducible, resolve_device
from icekit.run.origins import check_origins
from icekit.run.ownership import (
    LOCK,
    NEXT,
    PLAN,
    Busy,
    becomes,
    check_way,
    delete,
    exchange,
    finish_exchange,
    is_pending,
    link_to,
    refuse_if_busy,
    refuse_links,
    writing_into,
)
from icekit.settings import Settings, nearest

log = logging.getLogger(__name__)

MAX_IMAGES = 10_000
RECORD = "prompt.json"
"""What was asked for and made. It is written last: its presence means that the composition is complete."""


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
    low_memory: bool = False,
    overwrite: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    installed: Plugins | None = None,
) -> Composition:
    """Generate images from a prompt that names concepts of earlier runs.

    ``{a}`` is the object bound to ``a`` (its instance and category tokens), ``{a.colour}`` its colour token,
    ``{a.category}`` and ``{a.instance}`` those two alone; as far as its run's learner learned them. The model of the
    first run draws, or that of the run with fine-tuned weights. Runs of other models can be mixed in whose text
    encoders are the same and which are of its family, as a fine-tune and its base often are.

    Args:
        prompt: plain words and placeholders, as in ``"a cup, {b.material} {b.colour}"``.
        concepts: name -> run directory, ``RUN_DIR:CONCEPT`` (index or label; else the first one) or Extraction.
        n: number of images.
        seed: image i depends on it and i.
        out: folder for the images and ``prompt.json``; a new one in ``compositions/`` if None.
        device: as in the settings; that of the runs if None.
        low_memory: hold only the part of the model that is in use on the device (its setting of this name).
        overwrite: replace the composition in ``out``.
        on_image: called after every image with the number done and the total.
        installed: the plugins to use; those of this Python environment if None.

    Raises:
        InputError: a placeholder, a run or ``out`` is wrong, or the runs do not share one backbone.
    """
    if not 1 <= n <= MAX_IMAGES:
        raise InputError(f"the number of images cannot be {n}: it should be 1 to {MAX_IMAGES}")
    bound = {name: bind(name, reference) for name, reference in concepts.items()}
    expanded = expand(prompt, {name: one.tokens for name, one in bound.items()})
    run = drawing_run(bound)
    _say_who_draws(run, bound)
    with _output_folder(prompt, out, n, overwrite) as folder:
        found = installed or plugins.installed()
        check_origins(found, run.record.plugins, f"the run in {run.run_dir}", kinds=("backbone",))
        settings = _drawing_settings(run, found)
        if low_memory:
            settings = settings.model_copy(update={"backbone": settings.values_of("backbone") | {"low_memory": "on"}})
        backbone = load_backbone(found, settings, resolve_device(device or settings.device), learns=False)
        for name, one in bound.items():
            _check_fit(name, one, backbone)

        _clean(folder)
        seeds = [derived_seed(seed, "compose", number) for number in range(n)]
        names = [f"{number}.png" for number in range(n)]
        done = 0

        def keep(number: int, picture: Image.Image) -> None:
            nonlocal done
            write_image_atomically(folder / NEXT / names[number], picture)
            done += 1
            if on_image:
                on_image(done, n)

        drawing = ("backbone", settings.name_of("backbone"))
        with (
            reproducible(),
            enough_memory("generate", found, lambda: settings),
            found.naming("generate", [drawing], by=drawing),
        ):
            draw(
                drawing,
                backbone,
                [expanded] * n,
                keep,
                seeds=seeds,
                tokens={token: rows for one in bound.values() for token, rows in one.rows.items()},
                steps=settings.sample_steps,
                guidance_scale=settings.guidance_scale,
                tuning=run.tuning(),
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
            "drawn_by": _describe(run),
            "images": names,
        }
        write_json_atomically(folder / NEXT / RECORD, record)
        # The old composition goes only now that the new one is whole.
        exchange(folder, old=_own_names(folder), new=[*names, RECORD], last=RECORD)
    return Composition(folder, prompt, expanded, seeds, [folder / name for name in names])


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
    if not colon or os.path.exists(user_path(reference)):
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
        InputError: no concept is bound; two runs have models of different families or text encoders, so that their
            tokens mean nothing to each other; or weights of their own: there is one model.
    """
    if not bound:
        raise InputError("no concept given: bind one, as in a=RUN_DIR")
    (first_name, first), *others = bound.items()
    for name, other in others:
        if why := _why_apart(first.run, other.run):
            raise InputError(f"{first_name} and {name} were learned with {why}: their tokens cannot be mixed")
    runs = {one.run.run_dir.resolve(): one.run for one in bound.values()}
    tuned = {path: run for path, run in runs.items() if run.is_fine_tuned}
    if len(tuned) > 1:
        raise InputError(f"several runs have fine-tuned weights of their own ({', '.join(map(str, tuned))}): use one")
    return next(iter(tuned.values()), first.run)


def _why_apart(one: Extraction, other: Extraction) -> str | None:
    """Why tokens of one run mean nothing to the other's backbone, wherever its files are; None where they do."""
    families = [run.record.backbone.pipeline_class for run in (one, other) if run.record.backbone]
    of_one_family = len({family for family in families if family}) < 2
    if one.identity is None or other.identity is None:  # a run of schema version 1 tells no more than the name
        alike = _describe(one) == _describe(other)
    else:
        alike = one.identity == other.identity
    if of_one_family and alike:
        return None
    names = _describe(one), _describe(other)
    if names[0] == names[1]:
        return f"two states of {names[0]}, whose files were changed in between"
    return f"different backbones ({', '.join(names)})" + (
        ", which are of one family but read tokens differently" if of_one_family else ""
    )


def _say_who_draws(run: Extraction, bound: Mapping[str, Bound]) -> None:
    """Say which model draws where there are several with the same text encoders: a fine-tune and its base, say."""
    drawing = _describe(run)
    others = {name: _describe(one.run) for name, one in bound.items()}
    for name, other in others.items():
        if other != drawing:
            log.warning(
                "the images are drawn by %s; %s is of %s, whose text encoders are the same", drawing, name, other
            )


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


@contextlib.contextmanager
def _output_folder(prompt: str, out: str | Path | None, n: int, overwrite: bool) -> Iterator[Path]:
    """The folder that the images are to be in, with no other process writing into it.

    Raises:
        InputError: it is somebody else's, has a composition already, or something that is in the way.
    """
    if out is not None:
        folder = user_path(out, "out")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: --out takes a folder")
        refuse_if_busy(folder)
        _check_folder(folder, n, overwrite)
        with writing_into(folder):
            finish_exchange(folder, _is_own_name, writing=True)
            _check_folder(folder, n, overwrite)
            yield folder
        return
    stem = bounded("-".join(re.findall(r"\w+", prompt.lower())) or "composition", 60)
    for number in itertools.count(1):
        folder = Path("compositions") / (stem if number == 1 else f"{stem}-{number}")
        if not folder.exists():
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(writing_into(folder))
                except Busy:  # another process was faster
                    continue
                yield folder
                return


def _check_folder(folder: Path, n: int, overwrite: bool) -> None:
    """Whether a composition of ``n`` images can be written here.

    Raises:
        InputError: see ``_output_folder``.
    """
    if not folder.is_dir():
        return
    if is_pending(folder):
        finish_exchange(folder, _is_own_name)
    refuse_links(folder, NEXT)
    own = _own_names(folder)
    strange = [path for path in folder.iterdir() if path.name not in (LOCK, NEXT)]
    if (folder / NEXT).is_dir():
        strange += [one for one in (folder / NEXT).iterdir() if not _is_own_name(becomes(one) or one.name, PLAN)]
    if strange and not own:
        raise InputError(f"{folder} is not empty and no composition of icekit's: choose another --out")
    if own and not overwrite:
        raise InputError(f"{folder} already holds a composition: --overwrite replaces it, or choose another --out")
    check_way(folder, own, [f"{number}.png" for number in range(n)])


def _clean(folder: Path) -> None:
    """Delete what a process that was killed had made."""
    if (folder / NEXT).is_dir():
        for path in list((folder / NEXT).iterdir()):
            if _is_own_name(becomes(path) or path.name):
                delete(path)


def _own_names(folder: Path) -> set[str]:
    """What an earlier composition wrote, by its ``prompt.json``; nothing in a folder that has none of ours."""
    try:
        if link_to(folder, RECORD):
            return set()
        record = json.loads(read_bytes(folder / RECORD, 2**24))
        if not isinstance(record, dict) or "icekit_version" not in record or not isinstance(record["images"], list):
            return set()
    except (OSError, ValueError, KeyError, RecursionError):
        return set()
    return {RECORD} | {name for name in record["images"] if isinstance(name, str) and _is_own_name(name)}


def _is_own_name(name: str, *others: str) -> bool:
    return name in (RECORD, *others) or bool(re.fullmatch(r"\d+\.png", name))
