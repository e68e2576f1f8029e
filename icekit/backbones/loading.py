"""Reading a model of diffusers' format: checked part by part before diffusers and transformers see it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch

from icekit import wording
from icekit.backbones.common import quiet
from icekit.backbones.file_layouts import Layout, layout_of, shapes_in
from icekit.backbones.single_file import check_whole, load_from_file, write_configurations
from icekit.model_files import (
    HUB_ID,
    Hub,
    check_counts,
    check_folder,
    count_weights,
    from_safetensors,
    one_line,
    read_json,
    ways_out,
)
from icekit.paths import PREFIX, resolved_path
from icekit.protocols import InputError

_UNET: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "scheduler": ("diffusers", ()),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
}


@dataclass(frozen=True)
class Family:
    """What a model of a family is made of.

    name: what people call it. pipeline: its class in diffusers. parts: the library of each part, and its classes there;
    where a scheduler has none, any that DDPM can stand in for. options: of the pipeline's constructor, beside its
    parts. optional: parts that a model need not have; its index then says null for them, and its pipeline is made with
    None. told: of the options those, true or false, that a model's index may say.
    """

    name: str
    pipeline: str
    parts: Mapping[str, tuple[str, tuple[str, ...]]]
    options: Mapping[str, Any]
    optional: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, str]:
        """The parts that have weights, and what the libraries call the files of these."""
        stems = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
        return {
            part: stems[library]
            for part, (library, _) in self.parts.items()
            if part != "scheduler" and not part.startswith("tokenizer")
        }


STABLE_DIFFUSION = Family(
    "Stable Diffusion 1.x and 2.x",
    "StableDiffusionPipeline",
    _UNET,
    {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)
STABLE_DIFFUSION_XL = Family(
    "Stable Diffusion XL",
    "StableDiffusionXLPipeline",
    {
        **_UNET,
        "tokenizer_2": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    },
    {"add_watermarker": False},
    told=("force_zeros_for_empty_prompt",),
)
PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MOST_STEPS = 100_000
"""Steps of the noise schedule that a model was trained with, at most; all known ones have 1000."""


class Source(Protocol):
    """The settings of where a model is."""

    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def variant(self) -> str | None: ...

    @property
    def local_files_only(self) -> bool: ...


@dataclass(frozen=True)
class _Place:
    """A ``Source`` that no component's settings are."""

    model: str
    revision: str | None
    variant: str | None
    local_files_only: bool


def load_pipeline(
    settings: Source,
    family: Family,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    without: Collection[str] = (),
) -> tuple[Any, bool]:
    """Read a model of this family from a folder, a file or the hub; safetensors and JSON only, nothing is run.

    Args:
        settings: where it is. For a model in one file they may say ``layouts``, those that the file can have (see
            ``file_layouts``), and ``encoders``, a folder or hub model with the parts that the file has not got.
        family: what it is made of.
        dtypes: part -> the number format that its weights are read in, float32 by default.
        without: optional parts that are left out.

    Returns:
        Its diffusers pipeline, and whether its scheduler says what the noise predictor returns.

    Raises:
        InputError: no such model, one of another kind, or one that is damaged or has files missing.
    """
    import diffusers

    named = f"backbone.model = {settings.model!r}"
    place = resolved_path(settings.model, "backbone.model")
    encoders = getattr(settings, "encoders", None)
    parts: dict[str, Any] = dict.fromkeys(family.parts)
    wanted = [part for part in family.parts if part not in without]
    source, told = None, True
    with quiet():
        if place.is_file():
            found, index, told = _from_file(place, settings, encoders, family, wanted, dtypes, named)
        else:
            if encoders is not None:
                raise InputError(
                    f"backbone.encoders = {encoders!r}: it is for a model in one file, and {named} is none"
                )
            found, index, folder = _from_folder(settings, family, wanted, dtypes, named)
            source = str(folder) if _is_local(settings.model) else settings.model
        told_by_index = {option: index[option] for option in family.told if isinstance(index.get(option), bool)}
        options = {**family.options, **told_by_index}
        try:
            pipeline = getattr(diffusers, family.pipeline)(**{**parts, **found}, **options)
        except Exception as error:  # it looks into the configurations, and brings old ones up to date
            raise InputError(f"{named}: its parts do not make a pipeline: {one_line(error)}") from error
    pipeline.register_to_config(_name_or_path=source)
    return pipeline, told


def _from_folder(
    settings: Source, family: Family, wanted: Sequence[str], dtypes: Mapping[str, torch.dtype], named: str
) -> tuple[dict[str, Any], Mapping[str, Any], Path]:
    """Of a model in diffusers' format those of these parts that it has, its index, and its folder on this machine."""
    folder = _folder(settings, family, wanted, named)
    index = read_json(folder / "model_index.json", named)
    classes = _check_index(index, family, wanted, named)
    _check_parts(folder, family, classes, settings.variant, named)
    parts: dict[str, Any] = {}
    for name, kind in classes.items():
        try:
            dtype = dtypes.get(name, torch.float32)
            parts[name] = _load_part(folder, family, name, kind, settings.variant, dtype)
        except MemoryError:
            raise
        except Exception as error:  # diffusers, transformers, torch: each fails in its own way
            if isinstance(error, InputError):
                raise InputError(f"{named}: {error}") from error
            raise InputError(
                f"{named}: its {name} cannot be loaded from safetensors files: {one_line(error)}"
            ) from error
    return parts, index, folder


def _from_file(
    file: Path,
    settings: Source,
    encoders: str | None,
    family: Family,
    wanted: Sequence[str],
    dtypes: Mapping[str, torch.dtype],
    named: str,
) -> tuple[dict[str, Any], Mapping[str, Any], bool]:
    """Of a model in one file these parts, its index, and whether it is known what its noise predictor returns.

    A text encoder, its tokenizer and the autoencoder come from ``encoders`` where the file has not got them.
    """
    if file.suffix.lower() != ".safetensors":
        raise InputError(f"{named}: {_no_safetensors(file.suffix)}")
    layout = layout_of(file, getattr(settings, "layouts", ()), named)
    if layout.pipeline != family.pipeline:
        raise InputError(f"{named}: it is made for {layout.pipeline}; supported is {family.pipeline} ({family.name})")
    own, others = divided(layout, file, family, wanted, named)
    check_whole(file, layout, [part for part in own if part in family.weights], named)
    parts: dict[str, Any] = {}
    lacking = [part for part in others if part not in family.optional]
    if encoders is not None and others:
        place = _Place(encoders, None, None, settings.local_files_only)
        parts, *_ = _from_folder(place, family, others, dtypes, f"backbone.encoders = {encoders!r}")
    elif lacking:
        raise InputError(
            f"{named}: the file has no {', '.join(lacking)}: name a model of the same family that has, a folder in "
            f"diffusers' format or an id of the hub, with {wording.settings({'backbone': {'encoders': 'FOLDER'}})}"
        )
    with tempfile.TemporaryDirectory(prefix="icekit-") as folder:
        told = write_configurations(layout, file, Path(folder))
        for part in own:
            try:
                if part in family.weights:
                    parts[part] = load_from_file(file, layout, part, Path(folder), dtypes.get(part, torch.float32))
                else:
                    parts[part] = _load_part(Path(folder), family, part, layout.index[part][1], None, torch.float32)
            except MemoryError:
                raise
            except Exception as error:  # diffusers, transformers, torch: each fails in its own way
                raise InputError(
                    f"{named}: its weights cannot be read as those of {family.name}: {one_line(error)}"
                ) from error
    return parts, layout.index, told


def divided(
    layout: Layout, file: Path, family: Family, wanted: Sequence[str], named: str
) -> tuple[list[str], list[str]]:
    """Which of these parts a model in one file has, and which it has not got.

    A tokenizer belongs to its text encoder, and a scheduler to the layout.
    """
    there = layout.names_in(shapes_in(file, named)).keys() | {"scheduler"}

    def owner(part: str) -> str:
        return part.replace("tokenizer", "text_encoder")

    own = [part for part in wanted if owner(part) in there]
    return own, [part for part in wanted if part not in own]


def _no_safetensors(suffix: str) -> str:
    """Why a file of this kind is not read, and the way out."""
    if suffix.lower() in PICKLED:
        return f"a {suffix} file is a pickle, which can run code when it is read: take the model's .safetensors file"
    return f"a model in one file is a .safetensors file, not {suffix or 'one without an ending'}"


def _is_local(model: str) -> bool:
    return model.startswith(PREFIX) or resolved_path(model, "backbone.model").is_dir()


def _folder(settings: Source, family: Family, wanted: Sequence[str], named: str) -> Path:
    """Where these parts of a model are on this machine; those of a hub model are fetched into the hub's cache."""
    folder = resolved_path(settings.model, named.partition(" = ")[0])
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise InputError(f"{named}: the folder has no model_index.json, so it is no model in diffusers' format")
        return folder
    if not HUB_ID.fullmatch(settings.model):
        raise InputError(f"{named}: there is no such folder or file, and it is no id of a hub model (owner/name)")
    hub = Hub(
        settings.model,
        "model_index.json",
        f"{named}: there is no such folder, and",
        ways_out(),
        revision=settings.revision,
        local_files_only=settings.local_files_only,
    )
    classes = _check_index(read_json(hub.first, named), family, wanted, named)
    stems = {part: stem for part, stem in family.weights.items() if part in classes}
    files = [f"{part}/*.{ending}" for part in classes for ending in ("json", "txt")]
    folder = hub.folder([*files, *_weights(stems, settings.variant)])
    plain = {
        part: stem
        for part, stem in stems.items()
        if settings.variant and not _has_variant(folder / part, stem, settings.variant)
    }
    return hub.folder([*files, *_weights(plain, None)]) if plain else folder


def _weights(stems: Mapping[str, str], variant: str | None) -> list[str]:
    """The weights of parts, as patterns; stems: what each part's files are called."""
    ending = f".{variant}" if variant else ""
    shards = ("", "-?????-of-?????")
    return [f"{part}/{stem}{ending}{shard}.safetensors" for part, stem in stems.items() for shard in shards]


def _has_variant(place: Path, stem: str, variant: str) -> bool:
    return any(
        (place / f"{stem}.{ending}").exists()
        for ending in (f"{variant}.safetensors", f"safetensors.index.{variant}.json")
    )


def _check_index(index: Mapping[str, Any], family: Family, wanted: Sequence[str], named: str) -> dict[str, str]:
    """The class of each of these parts that the model has, by ``model_index.json``."""
    kind = index.get("_class_name")
    if kind != family.pipeline:
        made_for = kind if isinstance(kind, str) else f"a pipeline of its own ({one_line(ValueError(kind), 100)})"
        raise InputError(f"{named}: it is made for {made_for}; supported is {family.pipeline} ({family.name})")
    classes: dict[str, str] = {}
    for part in wanted:
        library, names = family.parts[part]
        entry = index.get(part)
        if part in family.optional and entry in (None, [None, None]):
            continue
        right = f"[{library!r}, {' or '.join(map(repr, names)) or 'a scheduler'}]".replace("'", '"')
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == library and isinstance(entry[1], str)):
            given = one_line(ValueError(repr(entry)), 100)
            raise InputError(f"{named}: model_index.json: {part} is {given}; it should be {right}")
        if names and entry[1] not in names:
            raise InputError(f"{named}: model_index.json: {part} is a {entry[1]}; it should be {right}")
        classes[part] = entry[1]
    return classes


def _check_parts(folder: Path, family: Family, parts: Collection[str], variant: str | None, named: str) -> None:
    """Read the configurations of these parts, and the headers of their weights."""
    stems = {part: stem for part, stem in family.weights.items() if part in parts}
    if variant and not any(_has_variant(folder / part, stem, variant) for part, stem in stems.items()):
        raise InputError(f"{named}: backbone.variant = {variant!r}: it has no safetensors files of this variant")
    for part in parts:
        _, names = family.parts[part]
        place = folder / part
        if not place.is_dir():
            raise InputError(f"{named}: the folder has no {part}/ in it")
        check_folder(place, named)
        if part.startswith("tokenizer"):
            if not (
                (place / "tokenizer.json").exists() or all((place / n).exists() for n in ("vocab.json", "merges.txt"))
            ):
                raise InputError(f"{named}: {part}/ has no tokenizer.json, and no vocab.json with a merges.txt")
            continue
        if part == "scheduler":
            steps = read_json(place / "scheduler_config.json", named).get("num_train_timesteps", 1000)
            if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MOST_STEPS:
                raise InputError(
                    f"{named}: scheduler/scheduler_config.json: num_train_timesteps is {steps!r}; "
                    f"it should be a whole number from 1 to {MOST_STEPS}, usually 1000"
                )
            continue
        configuration, where = read_json(place / "config.json", named), f"{named}: {part}/config.json"
        kind = configuration.get("_class_name", names[0])
        if kind not in names and "_class_name" in configuration:
            raise InputError(f"{where} is made for {kind}; it should be for {names[0]}")
        if "quantization_config" in configuration:
            raise InputError(f"{where}: quantised weights are not supported; take the model's plain ones")
        check_counts(configuration, count_weights(place, family.weights[part], variant, named), where)


def _load_part(
    folder: Path, family: Family, part: str, class_name: str, variant: str | None, dtype: torch.dtype
) -> Any:
    """One part of a model, all of whose weights were found.

    Raises:
        InputError: some were not.
        Exception: what the libraries raise.
    """
    import diffusers
    import transformers

    library, names = family.parts[part]
    kind: Any = getattr(diffusers if library == "diffusers" else transformers, class_name, None)
    place = folder / part
    if part == "scheduler":
        return _load_scheduler(kind, class_name, place, any_of_ddpm=not names)
    if part.startswith("tokenizer"):
        return kind.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
    options: dict[str, Any] = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
    chosen = variant if variant and _has_variant(place, family.weights[part], variant) else None
    return from_safetensors(kind, place, f"{part}/", variant=chosen, **options)


def _load_scheduler(kind: Any, class_name: str, place: Path, *, any_of_ddpm: bool) -> Any:
    from diffusers import DDPMScheduler, SchedulerMixin

    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"model_index.json: scheduler: diffusers has no scheduler {class_name!r} here")
    scheduler = cast(Any, kind).from_pretrained(str(place), local_files_only=True)
    if any_of_ddpm and not isinstance(scheduler, DDPMScheduler) and DDPMScheduler not in scheduler.compatibles:
        raise InputError(
            f"model_index.json: a model with {class_name} is of another family; those of Stable Diffusion are "
            "trained with the noise schedule of DDPMScheduler (DDIM, PNDM, Euler, DPM-Solver++, ...)"
        )
    return scheduler
