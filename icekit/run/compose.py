"""Compose extracted concepts, of one image or of several, in one prompt with plain words."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, ValidationError
from torch import Tensor

from icekit import plugins
from icekit.files import read_bytes
from icekit.paths import user_path
from icekit.plugins import Plugins
from icekit.protocols import Backbone, InputError
from icekit.protocols.errors import printable
from icekit.protocols.values import bounded
from icekit.randomness import derived_seed
from icekit.run.atomic import write_image_atomically, write_json_atomically
from icekit.run.border import draw
from icekit.run.directory import SCHEMA_VERSION
from icekit.run.extraction import Concept, Extraction
from icekit.run.hub import PREFIX, is_of_hub
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
from icekit.run.progress import told_of_images
from icekit.run.prompts import (
    NAME,
    Choice,
    Expanded,
    Reference,
    choices,
    choose,
    expand,
    parse,
    plain_word,
    weighted_row,
)
from icekit.run.records import Count, Name, Record, Text, explain
from icekit.run.sheets import Layout, Sheet, plain_layout
from icekit.settings import Settings
from icekit.wording import named, option

log = logging.getLogger(__name__)

MAX_IMAGES = 10_000
RECORD = "prompt.json"
"""What was asked for and made. It is written last: its presence means that the composition is complete."""
MAX_RECORD = 2**24
"""Bytes of it that are read."""
SHEET = "sheet.png"
"""All images on one, where there are several."""
IMAGES, SWEPT = 4, 1
"""How many images are made where nothing is said: of a prompt, and of each combination of a sweep's alternatives."""


@dataclass(frozen=True, repr=False)
class Composition:
    """What ``compose`` made.

    prompt: as typed. expanded: with tokens in the place of ``{...}``; a sweep's has its alternatives in brackets.
    seeds: one per image. images: the files: of a sweep row by row, in each column by column. sheet: all of them on one;
    None where there is one image. rows, columns: a sweep's labels.
    """

    out: Path
    prompt: str
    expanded: str
    seeds: list[int]
    images: list[Path]
    sheet: Path | None = None
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def __repr__(self) -> str:
        images = f"{len(self.images)} image{'s' * (len(self.images) != 1)}"
        return f"<Composition {printable(str(self.out), 200)}: {images} of {printable(self.prompt, 200)!r}>"

    def _repr_html_(self) -> str:
        from icekit.run.in_notebooks import of_composition

        return of_composition(self)


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    expanded: as in ``Composition``. cells: the prompts, n images of each; a sweep has one for each combination.
    layout: of the sheet.
    """

    expanded: str
    cells: tuple[Expanded, ...]
    layout: Layout


class AskedConcept(Record):
    """A concept of a composition in its record."""

    run: Text
    index: Count
    tokens_sha256: Name


class Asked(Record):
    """What a composition's record says of how it is made again."""

    prompt: Text
    concepts: dict[Name, AskedConcept]
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    sweep: dict[Name, Any] | None


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
    n: int | None = None,
    seed: int = 0,
    sweep: bool = False,
    out: str | Path | None = None,
    device: str | None = None,
    low_memory: bool = False,
    overwrite: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    progress: bool | None = None,
    installed: Plugins | None = None,
    backbone: Backbone | None = None,
) -> Composition:
    """Generate images from a prompt that names concepts of earlier runs.

    ``{a}`` is the object bound to ``a`` (its instance and category tokens), ``{a.colour}`` its colour token,
    ``{a.category}`` and ``{a.instance}`` those two alone; as far as its run's learner learned them. ``{a - colour}`` is
    the object without its colour, and ``{a.colour:1.3}`` more of it: see ``prompts``. The model of the first run draws,
    or that of the run with fine-tuned weights. Runs of other models can be mixed in whose text encoders are the same
    and which are of its family, as a fine-tune and its base often are.

    Args:
        prompt: plain words and placeholders, as in ``"a cup, {b.material} {b.colour}"``.
        concepts: name -> run directory, ``RUN_DIR:CONCEPT`` (index or label; else the first one) or Extraction.
        n: number of images, of a sweep for each combination; 4 if None, or 1 of a sweep.
        seed: image i depends on it and i; in a sweep all combinations start from the same noise.
        sweep: make a grid of the prompt's one or two alternations, ``{a|b}`` or ``[red|{a.colour}|]``; the first of two
            are the rows.
        out: folder for the images, the sheet of all and ``prompt.json``; a new one in ``compositions/`` if None.
        device: as in the settings; that of the runs if None.
        low_memory: hold only the part of the model that is in use on the device (its setting of this name).
        overwrite: replace the composition in ``out``.
        on_image: called after every image with the number done and the total.
        progress: show how many images are done: a bar on a terminal, a line of a notebook's output; None: in notebooks
            alone.
        installed: the plugins to use; those of this Python environment if None.
        backbone: the model of the run that draws, loaded before; loaded here if None.

    Raises:
        InputError: a placeholder, a run or ``out`` is wrong, or the runs do not share one backbone.
    """
    n = (SWEPT if sweep else IMAGES) if n is None else n
    on_image = told_of_images(progress, on_image)
    if not 1 <= n <= MAX_IMAGES:
        raise InputError(f"the number of images cannot be {n}: it should be 1 to {MAX_IMAGES}")
    bound = {name: bind(name, reference) for name, reference in concepts.items()}
    plan = plan_images(prompt, {name: one.tokens for name, one in bound.items()}, n, sweep=sweep)
    total = n * len(plan.cells)
    names = [f"{number}.png" for number in range(total)]
    made = [*names, *([SHEET] if total > 1 else [])]
    run = drawing_run(bound)
    _say_who_draws(run, bound)
    with _output_folder(prompt, out, made, overwrite) as folder:
        found = installed or plugins.installed()
        check_origins(found, run.record.plugins, f"the run in {run.run_dir}", kinds=("backbone",))
        settings = _drawing_settings(run, found)
        if low_memory:
            settings = settings.model_copy(update={"backbone": settings.values_of("backbone") | {"low_memory": "on"}})
        backbone = backbone or load_backbone(found, settings, resolve_device(device or settings.device), learns=False)
        for name, one in bound.items():
            _check_fit(name, one, backbone)

        _clean(folder)
        seeds = [derived_seed(seed, "compose", number) for number in range(n)] * len(plan.cells)
        sheet = Sheet(plan.layout, backbone.image_size) if total > 1 else None
        done = 0

        def keep(number: int, picture: Image.Image) -> None:
            nonlocal done
            write_image_atomically(folder / NEXT / names[number], picture)
            if sheet:
                sheet.put(number, picture)
            done += 1
            if on_image:
                on_image(done, total)

        drawing = ("backbone", settings.name_of("backbone"))
        with (
            reproducible(),
            enough_memory("generate", found, lambda: settings),
            found.naming("generate", [drawing], by=drawing),
        ):
            draw(
                drawing,
                backbone,
                [cell.text for cell in plan.cells for _ in range(n)],
                keep,
                seeds=seeds,
                tokens=tokens_of(bound, plan.cells, backbone),
                steps=settings.sample_steps,
                guidance_scale=settings.guidance_scale,
                tuning=run.tuning(),
            )
        if sheet:
            write_image_atomically(folder / NEXT / SHEET, sheet.image)
        rows, columns = (plan.layout.rows, plan.layout.columns) if sweep else ((), ())
        record = {
            "icekit_version": plugins.own_version(),
            "prompt": prompt,
            "expanded": plan.expanded,
            "concepts": {
                name: {
                    "run": str(one.run.run_dir),
                    "index": one.concept.index,
                    "label": one.concept.label,
                    "tokens_sha256": digest_of(one),
                }
                for name, one in bound.items()
            },
            "n": n,
            "seed": seed,
            "seeds": seeds,
            "drawn_by": _describe(run),
            "images": names,
            "sheet": SHEET if sheet else None,
            "sweep": {"rows": rows, "columns": columns, "prompts": [one.text for one in plan.cells]} if sweep else None,
        }
        write_json_atomically(folder / NEXT / RECORD, record)
        # The old composition goes only now that the new one is whole.
        exchange(folder, old=_own_names(folder), new=[*made, RECORD], last=RECORD)
    return Composition(
        folder,
        prompt,
        plan.expanded,
        seeds,
        [folder / name for name in names],
        folder / SHEET if sheet else None,
        rows,
        columns,
    )


def remake(
    folder: str | Path,
    concepts: Mapping[str, str | Path | Extraction] | None = None,
    *,
    out: str | Path | None = None,
    device: str | None = None,
    low_memory: bool = False,
    overwrite: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    progress: bool | None = None,
    installed: Plugins | None = None,
) -> Composition:
    """Make a composition again, by its ``prompt.json``: of the same tokens, from the same noise.

    Args:
        folder: of the composition.
        concepts: where runs are now that are no longer where they were.
        out: see ``compose``.
        device: see ``compose``.
        low_memory: see ``compose``.
        overwrite: see ``compose``.
        on_image: see ``compose``.
        progress: see ``compose``.
        installed: see ``compose``.

    Raises:
        InputError: it is no composition, was made by a version that did not say enough, or a run is not there or has
            other tokens by now; see ``compose``.
    """
    path = user_path(folder, "the composition")
    record = _read_record(path)
    if record is None:
        raise InputError(f"{path} is no composition of icekit's: it has no {RECORD} that says what was made")
    try:
        asked = Asked.model_validate(record)
    except ValidationError as error:
        raise InputError(
            f"{path / RECORD} does not say how to make its images again ({printable(explain(error), 200)}): compose "
            "them anew"
        ) from error
    kept, given = asked.concepts, dict(concepts or {})
    if strange := [name for name in given if name not in kept]:
        raise InputError(f"{path} has no concept {strange[0]!r}: its prompt has {', '.join(kept)}")
    references: dict[str, str | Path | Extraction] = {}
    for name, was in kept.items():
        references[name] = reference = given.get(name, f"{was.run}:{was.index}")
        if name not in given and not user_path(was.run).is_dir():
            raise InputError(f"{path} was made of {was.run}, which is not there: say where it is, as in {name}=RUN_DIR")
        if digest_of(bind(name, reference)) != was.tokens_sha256:
            where = reference.run_dir if isinstance(reference, Extraction) else reference
            raise InputError(f"{path} was made of other tokens than {name} has in {where}: the images would be others")
    return compose(
        asked.prompt,
        references,
        n=asked.n,
        seed=asked.seed,
        sweep=asked.sweep is not None,
        out=out,
        device=device,
        low_memory=low_memory,
        overwrite=overwrite,
        on_image=on_image,
        progress=progress,
        installed=installed,
    )


def plan_images(prompt: str, tokens: Mapping[str, Mapping[str, str]], n: int, *, sweep: bool = False) -> Plan:
    """What a prompt asks for.

    Args:
        prompt: as typed.
        tokens: the concept's name -> part -> token.
        n: how many images there are to be of each of its combinations.
        sweep: whether it has alternatives.

    Raises:
        InputError: see ``prompts.parse`` and ``prompts.expand``; a sweep has no alternation, more than two or more
            images than anybody waits for.
    """
    pieces = parse(prompt, sweep=sweep)
    axes = choices(pieces)
    if sweep and not 1 <= len(axes) <= 2:
        problem = f"has {len(axes)} alternations" if axes else "has nothing to choose from"
        raise InputError(
            f"prompt {prompt!r} {problem}: a sweep has one (a row of pictures) or two (rows and columns), as in "
            "'a photo of [a cup|a ball], {a.colour|b.colour}'"
        )
    sizes = [len(axis.alternatives) for axis in axes]
    count = n * math.prod(sizes)
    if count > MAX_IMAGES:
        raise InputError(f"prompt {prompt!r} asks for {count} images: {MAX_IMAGES} at most are made at once")
    combinations = itertools.product(*(range(size) for size in sizes))
    cells = tuple(expand(prompt, choose(pieces, chosen), tokens) for chosen in combinations)
    if not axes:
        return Plan(cells[0].text, cells, plain_layout(n))
    text = ""
    for piece in pieces:
        if isinstance(piece, Choice):
            text += "[" + "|".join(_expanded(prompt, one.pieces, tokens) for one in piece.alternatives) + "]"
        else:
            text += _expanded(prompt, [piece], tokens)
    labels = [tuple(one.label or "(nothing)" for one in axis.alternatives) for axis in axes]
    layout = Layout(columns=labels[0], down=n) if len(labels) == 1 else Layout(labels[0], labels[1], across=n)
    return Plan(text, cells, layout)


def tokens_of(
    bound: Mapping[str, Bound], prompts: Iterable[Expanded], backbone: Backbone
) -> dict[str, dict[str, Tensor]]:
    """The tokens that prompts may have: those of the concepts, and the weighted ones in them.

    bound: the concepts by their names. prompts: expanded. backbone: it knows the plain words that weights start from.
    """
    tokens = {token: rows for one in bound.values() for token, rows in one.rows.items()}
    for token, used in {name: used for prompt in prompts for name, used in prompt.weighted.items()}.items():
        concept = bound[used.name].concept
        plain = backbone.word_rows(plain_word(used.part, concept.label))
        tokens[token] = {
            encoder: weighted_row(row, plain[encoder].to("cpu", row.dtype), used.weight)
            for encoder, row in concept.embeddings[used.part].items()
        }
    return tokens


def digest_of(bound: Bound) -> str:
    """SHA-256 of a concept's rows, hexadecimal: equal where its tokens are, bit for bit."""
    digest = hashlib.sha256()
    for part, rows in sorted(bound.concept.embeddings.items()):
        for encoder, row in sorted(rows.items()):
            digest.update(f"{part} {encoder} {len(row)} ".encode())
            digest.update(row.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _expanded(prompt: str, pieces: Sequence[str | Reference], tokens: Mapping[str, Mapping[str, str]]) -> str:
    return "".join(piece if isinstance(piece, str) else expand(prompt, [piece], tokens).text for piece in pieces)


def bind(name: str, reference: str | Path | Extraction) -> Bound:
    """Open what a name stands for, and give its tokens names of their own: ``<cup-0-colour>`` -> ``<a-cup-0-colour>``.

    Raises:
        InputError: not a name, not a complete run, or no such concept in it.
    """
    if not NAME.fullmatch(name):
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
    """``"runs/photo:cup"`` -> (``"runs/photo"``, ``"cup"``). A folder may have a colon in its own name, and ``hub:``
    begins the name of a run of the hub.
    """
    of_hub = PREFIX if is_of_hub(reference) else ""
    path, colon, concept = reference.removeprefix(of_hub).rpartition(":")
    if not colon or (not of_hub and os.path.exists(user_path(reference))):
        return reference, None
    return of_hub + path, concept


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
def _output_folder(prompt: str, out: str | Path | None, new: Collection[str], overwrite: bool) -> Iterator[Path]:
    """The folder that the images are to be in, with no other process writing into it.

    new: names of the files that are to be there, but for the record.

    Raises:
        InputError: it is somebody else's, has a composition already, or something that is in the way.
    """
    if out is not None:
        folder = user_path(out, "out")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: {named('out')} takes a folder")
        refuse_if_busy(folder)
        _check_folder(folder, new, overwrite)
        with writing_into(folder):
            finish_exchange(folder, _is_own_name, writing=True)
            _check_folder(folder, new, overwrite)
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


def _check_folder(folder: Path, new: Collection[str], overwrite: bool) -> None:
    """Whether a composition of these files can be written here.

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
        raise InputError(f"{folder} is not empty and no composition of icekit's: choose another {named('out')}")
    if own and not overwrite:
        raise InputError(
            f"{folder} already holds a composition: {option('overwrite')} replaces it, or choose another {named('out')}"
        )
    check_way(folder, own, new)


def _clean(folder: Path) -> None:
    """Delete what a process that was killed had made."""
    if (folder / NEXT).is_dir():
        for path in list((folder / NEXT).iterdir()):
            if _is_own_name(becomes(path) or path.name):
                delete(path)


def _own_names(folder: Path) -> set[str]:
    """What an earlier composition wrote, by its ``prompt.json``; nothing in a folder that has none of ours."""
    record = _read_record(folder)
    if record is None:
        return set()
    names = [*record["images"], record.get("sheet")]
    return {RECORD} | {name for name in names if isinstance(name, str) and _is_own_name(name)}


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The ``prompt.json`` of a composition; None in a folder that has none of ours."""
    try:
        if link_to(folder, RECORD):
            return None
        record = json.loads(read_bytes(folder / RECORD, MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "icekit_version" not in record or not isinstance(record.get("images"), list):
        return None
    return record


def _is_own_name(name: str, *others: str) -> bool:
    return name in (RECORD, SHEET, *others) or bool(re.fullmatch(r"\d+\.png", name))
