"""Embeddings that other programs have learned, as a run: its concepts are composed as those of any other.

A file of textual inversion says nothing but its rows. So they are held against the model that they are to be used
with, and the run has the picture that this model draws with them in the place of a photograph.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from icekit import plugins
from icekit.files import read_bytes
from icekit.paths import user_path
from icekit.plugins import Plugins
from icekit.protocols import Backbone, InputError, Learned, Region
from icekit.protocols.errors import printable
from icekit.protocols.values import bounded
from icekit.randomness import derived_seed
from icekit.run import directory
from icekit.run.atomic import why
from icekit.run.border import draw
from icekit.run.card import model_card
from icekit.run.directory import Located, RunDirectory
from icekit.run.exporting import ExportError, write_export
from icekit.run.extraction import Extraction
from icekit.run.machine import enough_memory
from icekit.run.models import load_backbone, pipeline_facts, reproducible, resolve_device
from icekit.run.origins import origins_of
from icekit.run.ownership import refuse_if_busy, writing_into
from icekit.run.showing import concept_prompt
from icekit.settings import Settings
from icekit.wording import is_typed

MAX_FILES, MAX_ROWS = 100, 75
"""Most files of a run, and most rows of a file: a prompt of CLIP has room for 75."""
MAX_BYTES = 64 * 2**20
"""Largest file: 75 rows of the longest are a hundredth of it."""
MAX_SIDE = 2048
"""Longest side of a run's picture, pixels."""
ONE = ""
"""In ``Embedding.rows``: a text encoder that the file does not name."""
ENCODERS = re.compile(r"clip_[lgh]|t5xxl|umt5xxl|gemma\w+|qwen\w+|llama\w*|mistral\w+|hydit_clip|mt5xl")
"""Keys that are names of text encoders."""
ADAPTERS = ("lora_", ".lora", "lora.", "lycoris", "hada_", "lokr_", "to_q", "to_k")
"""Parts of the names of weights of a model."""


@dataclass(frozen=True)
class Embedding:
    """What is in one file.

    file: as typed. sha256: of its bytes. rows: text encoder -> float32 ``[n, dim]``; ``ONE`` where it is not named.
    """

    file: Path
    sha256: str
    rows: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many rows it has: as many tokens stand for it."""
        return len(next(iter(self.rows.values())))


def import_embeddings(
    files: Sequence[str | Path],
    out: str | Path,
    settings: Settings | None = None,
    *,
    words: Sequence[str] = (),
    overwrite: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    installed: Plugins | None = None,
) -> Extraction:
    """Make a run of textual-inversion files, a concept a file, whose tokens ``compose`` takes.

    A file of n rows becomes n tokens, ``<word-0-instance>``, ``<word-0-instance2>``, ..., and ``{a}`` stands for all of
    them in order, as the file's name does in other programs. The picture of the run is what the model draws with each,
    side by side, and each concept's mask is its part of it.

    Args:
        files: .safetensors of any layout: a tensor of any name, ``emb_params``, or one for each text encoder by its
            name (``clip_l`` and ``clip_g``, ``t5xxl``, ...).
        out: the run directory.
        settings: which backbone and model, the seed, ``samples`` and how they are drawn; the defaults if None.
        words: what each concept is called; the files' names if there are none.
        overwrite: replace the run in ``out``.
        on_image: called after every picture with the number done and the total.
        installed: the plugins to use; those of this Python environment if None.

    Raises:
        InputError: a file is no embedding, or not for this model; ``words`` or ``out`` are wrong.
        ExportError: the run is complete, but an exporter failed.
    """
    embeddings = [read_embedding(user_path(file)) for file in files]
    if not 1 <= len(embeddings) <= MAX_FILES:
        raise InputError(f"{len(embeddings)} files: a run takes 1 to {MAX_FILES}")
    its, example = ("--word", "--word cup") if is_typed() else ("word", 'words=["cup"]')
    if words and len(words) != len(embeddings):
        raise InputError(f"{len(words)} words for {len(embeddings)} files: give each file its {its}, in their order")
    labels = list(words) or [one.file.stem for one in embeddings]
    if empty := next((word for word in labels if not word.strip()), None):
        raise InputError(f"{its} {empty!r} is empty: a concept is called by a word, as in {example}")
    home = RunDirectory(user_path(out, "out"))
    refuse_if_busy(home.path)
    home.check_usable(resume=False, overwrite=overwrite)

    found = installed or plugins.installed()
    asked = settings or Settings()
    settings = found.resolve(asked).model_copy(update={"attributes": ()})
    backbone = load_backbone(found, settings, resolve_device(settings.device), learns=False)
    rows = [rows_for_model(one, backbone.rows, _model(settings)) for one in embeddings]
    regions = [Region(place, word, 1.0, torch.ones(1, 1, dtype=torch.bool)) for place, word in enumerate(labels)]
    names = [_tokens(region, one.count) for region, one in zip(regions, embeddings, strict=True)]
    tokens = {
        token: {encoder: values[place].clone() for encoder, values in own.items()}
        for own, parts in zip(rows, names, strict=True)
        for place, token in enumerate(parts.values())
    }
    for one, parts in zip(embeddings, names, strict=True):
        try:
            backbone.token_positions(concept_prompt(parts), [], tokens)
        except InputError as error:
            raise InputError(f"{one.file} has {one.count} rows, which no prompt has room for: {error}") from error
    pictures = _drawn(found, settings, backbone, names, tokens, on_image)
    sheet, masks = _side_by_side([own[0] for own in pictures])
    regions = [Region(one.index, one.word, one.score, mask) for one, mask in zip(regions, masks, strict=True)]

    with writing_into(home.path):
        home.finish_exchange(writing=True)
        home.check_usable(resume=False, overwrite=overwrite)  # another process may have been here
        home.clear_leftovers()
        run = home.next if overwrite and home.holds_run else home  # the old run stays until the new one is complete
        if run is home:
            home.discard_next()
        run.check_usable(resume=False, overwrite=overwrite)
        stored = found.stored(settings)
        origins = [one for one in origins_of(found, settings) if one.kind in ("backbone", "exporter")]
        digest = hashlib.sha256("".join(one.sha256 for one in embeddings).encode()).hexdigest()
        sha256 = embeddings[0].sha256 if len(embeddings) == 1 else digest
        source = str(embeddings[0].file)
        run.begin(stored, source, sha256, sheet, origins)
        run.save_located(Located(tuple(regions), finished=True))
        run.save_learned(Learned(tokens))
        for region, own in zip(regions, pictures, strict=True):
            for number, picture in enumerate(own[: settings.samples]):
                run.save_sample(region.index, "object", number, picture)
        manifest = {
            "schema_version": directory.SCHEMA_VERSION,
            "icekit_version": plugins.own_version(),
            "image": {"source": source, "sha256": sha256, "width": sheet.width, "height": sheet.height},
            "imported": [{"file": one.file.name, "sha256": one.sha256, "rows": one.count} for one in embeddings],
            "presets": [preset.name for preset in found.presets_of(settings)],
            "components": {"backbone": settings.name_of("backbone")},
            "backbone": {"identity": backbone.identity, "rows": dict(backbone.rows)} | pipeline_facts(backbone),
            "attributes": [],
            "seed": settings.seed,
            "concepts": [
                {
                    "index": region.index,
                    "label": region.label,
                    "score": region.score,
                    "mask": directory.mask_name(region),
                    "area": round(float(region.mask.float().mean()), 4),
                    "tokens": parts,
                    "words": {},
                }
                for region, parts in zip(regions, names, strict=True)
            ],
            "plugins": [one.model_dump() for one in origins],
        }
        extraction = Extraction.of(run, manifest)
        run.save_card(model_card(run, extraction.record, stored))
        failed = _export(found, extraction, settings, run.path)
        if run is not home:
            home.check_replaceable(run)
        run.finish(manifest)
        if run is not home:
            home.replace()
        extraction = Extraction.open(home.path)
    if failed:
        raise ExportError(failed, extraction)
    return extraction


def read_embedding(file: Path) -> Embedding:
    """A file of textual inversion, of any of the layouts that ``import_embeddings`` takes.

    Raises:
        InputError: it is no .safetensors file (pickled ones are not read), or not of one embedding.
    """
    if file.suffix.lower() in (".pt", ".bin", ".pth", ".ckpt"):
        raise InputError(
            f"{file} is a pickled file, which can run code when it is read, and icekit reads none: take the embedding "
            "as .safetensors"
        )
    try:
        data = read_bytes(file, MAX_BYTES)
    except FileNotFoundError as error:
        raise InputError(f"no such file: {file}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read as an embedding: {why(error)}") from error
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no whole safetensors file ({' '.join(str(error).split())[:200]})") from error
    return Embedding(file, hashlib.sha256(data).hexdigest(), rows_in(tensors, str(file)))


def rows_in(tensors: Mapping[str, Tensor], named: str) -> dict[str, Tensor]:
    """The rows of one embedding.

    The layouts are those that diffusers, A1111, ComfyUI, InvokeAI and kohya's trainer write: one tensor, whatever its
    name (a token, ``emb_params``, ``*``), or one for each text encoder by its name.

    Args:
        tensors: a file's, floats ``[dim]`` or ``[n, dim]``.
        named: how messages begin.

    Returns:
        Text encoder -> float32 ``[n, dim]``, the same n for all; ``ONE`` where it is not named.

    Raises:
        InputError: there are several embeddings, or something else; or numbers that are not finite.
    """
    keys = sorted(tensors)
    shown = printable(", ".join(keys[:3]), 200) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    if any(part in key for key in keys for part in ADAPTERS):
        raise InputError(f"{named} has weights of a model or a LoRA adapter ({shown}), not an embedding")
    by_encoder = bool(keys) and all(ENCODERS.fullmatch(key) for key in keys)
    if not by_encoder and len(keys) != 1:
        raise InputError(
            f"{named} has {len(keys)} tensors ({shown}): an embedding is one, or one for each text encoder by its name "
            "(clip_l, clip_g, ...); give each token its own file"
        )
    rows = {}
    for key in keys:
        value = tensors[key]
        if not value.is_floating_point() or value.ndim not in (1, 2) or not value.numel():
            kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise InputError(f"{named}: {printable(key, 200)} is {kind}: rows are floats [n, dim]")
        if not bool(value.isfinite().all()):
            raise InputError(f"{named}: {printable(key, 200)} has numbers that are NaN or infinite")
        rows[key if by_encoder else ONE] = value.float().reshape(-1, value.shape[-1])
    counts = {key: len(value) for key, value in rows.items()}
    if len(set(counts.values())) > 1:
        several = ", ".join(f"{count} for {key}" for key, count in counts.items())
        raise InputError(f"{named} has not the same number of rows for each text encoder: {several}")
    if max(counts.values()) > MAX_ROWS:
        raise InputError(f"{named} has {max(counts.values())} rows: a prompt has room for {MAX_ROWS} at most")
    return rows


def rows_for_model(embedding: Embedding, wanted: Mapping[str, int], model: str) -> dict[str, Tensor]:
    """An embedding's rows by the model's text encoders.

    Args:
        embedding: as read.
        wanted: text encoder -> how long a row is.
        model: what the model is called in messages.

    Returns:
        Text encoder -> float32 ``[n, dim]``.

    Raises:
        InputError: it is for another model: says both sides' text encoders and lengths.
    """
    rows = dict(embedding.rows)
    if {*rows} == {ONE} and len(wanted) == 1:
        rows = {next(iter(wanted)): rows[ONE]}
    if {name: values.shape[-1] for name, values in rows.items()} == dict(wanted):
        return {name: rows[name] for name in wanted}
    has = ", ".join(f"{name} {values.shape[-1]}".strip() for name, values in embedding.rows.items())
    needs = ", ".join(f"{name} {length}" for name, length in wanted.items())
    raise InputError(f"{embedding.file} is for another model: rows of length {has} against {needs} of {model}")


def _tokens(region: Region, count: int) -> dict[str, str]:
    """A concept's tokens by part, one a row."""
    parts = ["instance", *(f"instance{number}" for number in range(2, count + 1))]
    return {part: f"<{region.label}-{region.index}-{part}>" for part in parts}


def _model(settings: Settings) -> str:
    model = settings.values_of("backbone").get("model")
    return settings.name_of("backbone") + (f" with model {bounded(str(model), 200)}" if model else "")


def _drawn(
    found: Plugins,
    settings: Settings,
    backbone: Backbone,
    names: Sequence[Mapping[str, str]],
    tokens: Mapping[str, Mapping[str, Tensor]],
    on_image: Callable[[int, int], None] | None,
) -> list[list[Image.Image]]:
    """For each concept its samples, and at least one: see ``showing.show``."""
    each = max(1, settings.samples)
    wanted = [(place, number) for place in range(len(names)) for number in range(each)]
    pictures: dict[int, Image.Image] = {}

    def keep(number: int, picture: Image.Image) -> None:
        pictures[number] = picture
        if on_image:
            on_image(len(pictures), len(wanted))

    drawing = ("backbone", settings.name_of("backbone"))
    with (
        reproducible(),
        enough_memory("generate", found, lambda: settings),
        found.naming("generate", [drawing], by=drawing),
    ):
        draw(
            drawing,
            backbone,
            [concept_prompt(names[place]) for place, _ in wanted],
            keep,
            seeds=[derived_seed(settings.seed, "sample", place, "object", number) for place, number in wanted],
            tokens=tokens,
            steps=settings.sample_steps,
            guidance_scale=settings.guidance_scale,
        )
    return [[pictures[place * each + number] for number in range(each)] for place in range(len(names))]


def _side_by_side(pictures: Sequence[Image.Image]) -> tuple[Image.Image, list[Tensor]]:
    """Pictures of one size on one sheet of ``MAX_SIDE`` pixels a side at most, and where each is, bool ``[H, W]``."""
    columns = math.ceil(math.sqrt(len(pictures)))
    lines = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    scale = min(1.0, MAX_SIDE / (columns * width), MAX_SIDE / (lines * height))
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    sheet, masks = Image.new("RGB", (columns * width, lines * height), "white"), []
    for place, picture in enumerate(pictures):
        left, top = place % columns * width, place // columns * height
        shown = picture if scale == 1 else picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(shown, (left, top))
        mask = torch.zeros(sheet.height, sheet.width, dtype=torch.bool)
        mask[top : top + height, left : left + width] = True
        masks.append(mask)
    return sheet, masks


def _export(found: Plugins, extraction: Extraction, settings: Settings, folder: Path) -> str:
    """Write what the settings' exporters write; why some failed, which make no run incomplete."""
    failed = []
    for name in settings.exporters:
        try:
            write_export(found, extraction, name, settings.exporter[name], folder)
        except InputError as error:
            failed.append(f"exporter {name!r}: {error}")
    return "; ".join(failed)
