"""Reading a Stable Diffusion 1.x or 2.x model: checked part by part before diffusers and transformers are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from icekit.backbones.common import quiet
from icekit.model_files import HUB_ID, Hub, check_counts, check_folder, count_weights, one_line, read_json
from icekit.paths import PREFIX, resolved_path
from icekit.protocols import InputError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PIPELINE = "StableDiffusionPipeline"
CLASSES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "scheduler": ("diffusers", ()),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
}
"""The parts of a model: the library of each, and its classes there; any scheduler that DDPM can stand in for."""
WEIGHTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
"""What the libraries call the files of weights."""
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


def load_pipeline(settings: Source) -> StableDiffusionPipeline:
    """Read a Stable Diffusion 1.x or 2.x model from a folder or the hub; safetensors and JSON only, nothing is run.

    Raises:
        InputError: no such model, one of another kind, or one that is damaged or has files missing.
    """
    from diffusers import StableDiffusionPipeline

    named = f"backbone.model = {settings.model!r}"
    folder = _folder(settings, named)
    with quiet():
        classes = _check_index(read_json(folder / "model_index.json", named), named)
        _check_parts(folder, settings.variant, named)
        parts: dict[str, Any] = {}
        for name in CLASSES:
            try:
                parts[name] = _load_part(folder, name, classes[name], settings.variant)
            except MemoryError:
                raise
            except Exception as error:  # diffusers, transformers, torch: each fails in its own way
                if isinstance(error, InputError):
                    raise InputError(f"{named}: {error}") from error
                raise InputError(
                    f"{named}: its {name} cannot be loaded from safetensors files: {one_line(error)}"
                ) from error
        try:
            pipeline = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        except Exception as error:  # it looks into the configurations, and brings old ones up to date
            raise InputError(f"{named}: its parts do not make a pipeline: {one_line(error)}") from error
    pipeline.register_to_config(_name_or_path=str(folder) if _is_local(settings.model) else settings.model)
    return pipeline


def _is_local(model: str) -> bool:
    return model.startswith(PREFIX) or resolved_path(model, "backbone.model").is_dir()


def _folder(settings: Source, named: str) -> Path:
    """Where the model's files are on this machine; those of a hub model are fetched into the hub's cache."""
    folder = resolved_path(settings.model, "backbone.model")
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise InputError(f"{named}: the folder has no model_index.json, so it is no model in diffusers' format")
        return folder
    if not HUB_ID.fullmatch(settings.model):
        raise InputError(f"{named}: there is no such folder, and it is no id of a hub model (owner/name) either")
    hub = Hub(
        settings.model,
        "model_index.json",
        f"{named}: there is no such folder, and",
        "give a folder in diffusers' format, or the owner/name of a model that was downloaded before "
        "(backbone.local_files_only=true, or HF_HUB_OFFLINE=1 in the environment, then uses the cache alone)",
        revision=settings.revision,
        local_files_only=settings.local_files_only,
    )
    _check_index(read_json(hub.first, named), named)
    files = [f"{part}/*.{ending}" for part in CLASSES for ending in ("json", "txt")]
    folder = hub.folder([*files, *_weights(WEIGHTS, settings.variant)])
    plain = [part for part in WEIGHTS if settings.variant and not _has_variant(folder / part, part, settings.variant)]
    return hub.folder([*files, *_weights(plain, None)]) if plain else folder


def _weights(parts: Iterable[str], variant: str | None) -> list[str]:
    """The weights of these parts, as patterns."""
    ending = f".{variant}" if variant else ""
    return [f"{part}/{WEIGHTS[part]}{ending}{shard}.safetensors" for part in parts for shard in ("", "-?????-of-?????")]


def _has_variant(place: Path, part: str, variant: str) -> bool:
    stem = WEIGHTS[part]
    return any(
        (place / f"{stem}.{ending}").exists()
        for ending in (f"{variant}.safetensors", f"safetensors.index.{variant}.json")
    )


def _check_index(index: Mapping[str, Any], named: str) -> dict[str, str]:
    """The class of each part, by ``model_index.json``."""
    kind = index.get("_class_name")
    if kind != PIPELINE:
        made_for = kind if isinstance(kind, str) else f"a pipeline of its own ({one_line(ValueError(kind), 100)})"
        raise InputError(f"{named}: it is made for {made_for}; supported is {PIPELINE} (Stable Diffusion 1.x and 2.x)")
    classes: dict[str, str] = {}
    for part, (library, names) in CLASSES.items():
        entry = index.get(part)
        right = f"[{library!r}, {' or '.join(map(repr, names)) or 'a scheduler'}]".replace("'", '"')
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == library and isinstance(entry[1], str)):
            given = one_line(ValueError(repr(entry)), 100)
            raise InputError(f"{named}: model_index.json: {part} is {given}; it should be {right}")
        if names and entry[1] not in names:
            raise InputError(f"{named}: model_index.json: {part} is a {entry[1]}; it should be {right}")
        classes[part] = entry[1]
    return classes


def _check_parts(folder: Path, variant: str | None, named: str) -> None:
    """Read all configurations, and the headers of all weights."""
    if variant and not any(_has_variant(folder / part, part, variant) for part in WEIGHTS):
        raise InputError(f"{named}: backbone.variant = {variant!r}: it has no safetensors files of this variant")
    for part, (_, names) in CLASSES.items():
        place = folder / part
        if not place.is_dir():
            raise InputError(f"{named}: the folder has no {part}/ in it")
        check_folder(place, named)
        if part == "tokenizer":
            if not (
                (place / "tokenizer.json").exists() or all((place / n).exists() for n in ("vocab.json", "merges.txt"))
            ):
                raise InputError(f"{named}: tokenizer/ has no tokenizer.json, and no vocab.json with a merges.txt")
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
        check_counts(configuration, count_weights(place, WEIGHTS[part], variant, named), where)


def _load_part(folder: Path, part: str, class_name: str, variant: str | None) -> Any:
    """One part of a model, all of whose weights were found.

    Raises:
        InputError: some were not.
        Exception: what the libraries raise.
    """
    import diffusers
    import transformers

    library, _ = CLASSES[part]
    kind: Any = getattr(diffusers if library == "diffusers" else transformers, class_name, None)
    place = folder / part
    if part == "scheduler":
        return _load_scheduler(kind, class_name, place)
    if part == "tokenizer":
        return kind.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
    options: dict[str, Any] = {"torch_dtype" if library == "diffusers" else "dtype": torch.float32}
    model, found = kind.from_pretrained(
        str(place),
        use_safetensors=True,
        local_files_only=True,
        variant=variant if variant and _has_variant(place, part, variant) else None,
        output_loading_info=True,
        **options,
    )
    missing = sorted(str(name) for name in found["missing_keys"])
    if missing:
        raise InputError(
            f"{part}/: {len(missing)} weights of its {class_name} are not in its safetensors files ({missing[0]}"
            f"{', ...' if len(missing) > 1 else ''}): they are of another part or model"
        )
    return model


def _load_scheduler(kind: Any, class_name: str, place: Path) -> Any:
    from diffusers import DDPMScheduler, SchedulerMixin

    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"model_index.json: scheduler: diffusers has no scheduler {class_name!r} here")
    scheduler = cast(Any, kind).from_pretrained(str(place), local_files_only=True)
    if not isinstance(scheduler, DDPMScheduler) and DDPMScheduler not in scheduler.compatibles:
        raise InputError(
            f"model_index.json: a model with {class_name} is of another family; Stable Diffusion 1.x and 2.x are "
            "trained with the noise schedule of DDPMScheduler (DDIM, PNDM, Euler, DPM-Solver++, ...)"
        )
    return scheduler
