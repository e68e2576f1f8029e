"""Reading a model of transformers: its files are checked first, and none of them is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icekit.backbones.common import quiet
from icekit.model_files import (
    HUB_ID,
    Hub,
    check_counts,
    check_finite,
    check_folder,
    check_vocabulary,
    count_weights,
    from_safetensors,
    one_line,
    read_json,
)
from icekit.paths import PREFIX, resolved_path
from icekit.protocols import InputError, RunError

CONFIGURATION = "config.json"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""What says how pictures are prepared: as transformers writes it now, and as it did before."""
LONGEST_SIDE = 8192
"""Longest side of the pictures that a model may ask for, pixels: the published ones have 352 to 1333."""
HUB_FILES = ("*.json", "*.txt", "model*.safetensors")
WAYS_OUT = (
    "give a folder in transformers' format, or a model that was downloaded before "
    "(HF_HUB_OFFLINE=1 in the environment then uses the cache alone)"
)
OTHER_MODELS = ("backbone", "use_timm_backbone", "use_pretrained_backbone")
"""Keys of a configuration by which a part of it comes from another model or library."""


@dataclass(frozen=True)
class Family:
    """A class of models of transformers.

    name: as people call it.
    kind: ``model_type`` in its configuration.
    model: the class.
    processor: the class that prepares pictures and text.
    vocabularies: the files of its tokenizer, any of these sets; none where it reads no text.
    """

    name: str
    kind: str
    model: str
    processor: str
    vocabularies: tuple[tuple[str, ...], ...] = ()


CLIPSEG = Family(
    "CLIPSeg",
    "clipseg",
    "CLIPSegForImageSegmentation",
    "CLIPSegProcessor",
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
)
GROUNDING_DINO = Family(
    "Grounding DINO",
    "grounding-dino",
    "GroundingDinoForObjectDetection",
    "GroundingDinoProcessor",
    (("tokenizer.json",), ("vocab.txt",)),
)
SAM = Family("SAM", "sam", "SamModel", "SamProcessor")


@dataclass(frozen=True)
class Loaded:
    """A frozen model in float32, and what prepares its pictures and text.

    named: how messages begin: the setting and what it was given.
    """

    family: Family
    named: str
    model: Any
    processor: Any

    def check_numbers(self, values: Tensor) -> None:
        """Refuse NaN and infinity in what the model gave.

        Raises:
            RunError: there are some.
        """
        try:
            check_finite(values, f"{self.family.name} model", "its weights are damaged: get it again")
        except RunError as error:
            raise RunError(f"{self.named}: {error}") from error

    @contextmanager
    def tried_out(self) -> Iterator[None]:
        """Around the first use of a model: what does not fit together shows there, and is the model's.

        Raises:
            InputError: it failed.
        """
        try:
            yield
        except (InputError, RunError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever transformers and torch run into
            raise InputError(f"{self.named}: its files do not fit together: {one_line(error)}") from error


def load(family: Family, model: str, setting: str, device: torch.device) -> Loaded:
    """Read a model from a folder or the hub.

    Args:
        family: of what class it must be.
        model: a folder, ``package:NAME/FOLDER`` or OWNER/NAME of the hub.
        setting: its key, for messages.
        device: where it runs.

    Raises:
        InputError: there is no such model, it is of another class, files are missing or damaged, or ask for code.
    """
    named = f"{setting} = {model!r}"
    folder = _folder(family, model, setting, named)
    _check(family, folder, named)
    import transformers

    try:
        with quiet():
            processor = getattr(transformers, family.processor).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            loaded = from_safetensors(
                getattr(transformers, family.model), folder, named, trust_remote_code=False, dtype=torch.float32
            )
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, torch, the file system: each fails in its own way
        raise InputError(f"{named}: it cannot be loaded as {family.name}: {one_line(error)}") from error
    _check_sizes(processor.image_processor, named)
    if family.vocabularies:
        _check_tokenizer(processor.tokenizer, loaded, named)
    return Loaded(family, named, loaded.to(device).requires_grad_(False).eval(), processor)


def _folder(family: Family, model: str, setting: str, named: str) -> Path:
    """Where the model's files are on this machine; those of a hub model are fetched into the hub's cache."""
    folder = resolved_path(model, setting)
    if folder.is_dir():
        return folder
    if model.startswith(PREFIX) or not HUB_ID.fullmatch(model):
        raise InputError(f"{named}: there is no such folder, and it is no id of a hub model (owner/name) either")
    hub = Hub(model, CONFIGURATION, f"{named}: there is no such folder, and", WAYS_OUT)
    _check_class(family, read_json(hub.first, named), named)  # before gigabytes are fetched
    return hub.folder(HUB_FILES)


def _check(family: Family, folder: Path, named: str) -> None:
    """Read all configurations, and the headers of all weights."""
    if not (folder / CONFIGURATION).exists():
        raise InputError(f"{named}: the folder has no {CONFIGURATION}, so it is no model in transformers' format")
    check_folder(folder, named)
    configuration = read_json(folder / CONFIGURATION, named)
    _check_class(family, configuration, named)
    if not any((folder / name).exists() for name in PROCESSORS):
        raise InputError(f"{named}: the folder has no {' and no '.join(PROCESSORS)}: how pictures are prepared")
    if family.vocabularies and not any(
        all((folder / name).exists() for name in names) for names in family.vocabularies
    ):
        wanted = ", and no ".join(" with ".join(names) for names in family.vocabularies)
        raise InputError(f"{named}: the folder has no {wanted}: its tokenizer")
    check_counts(configuration, count_weights(folder, "model", None, named), f"{named}: {CONFIGURATION}")


def _check_class(family: Family, configuration: Mapping[str, Any], named: str) -> None:
    """Whether a configuration is of this class, and of nothing but it."""
    where = f"{named}: {CONFIGURATION}"
    classes, kind = configuration.get("architectures"), configuration.get("model_type")
    found = classes[0] if isinstance(classes, list) and len(classes) == 1 else kind
    if kind != family.kind or (classes and found != family.model):
        raise InputError(f"{where} is made for {one_line(ValueError(found), 100)}; it should be for {family.model}")
    if "quantization_config" in configuration:
        raise InputError(f"{where}: quantised weights are not supported; take the model's plain ones")
    inner = configuration.get("backbone_config")
    parts = [configuration, inner] if isinstance(inner, dict) else [configuration]
    for part in parts:
        others = [key for key in OTHER_MODELS if part.get(key)]
        if others or str(part.get("model_type")).startswith("timm"):
            raise InputError(f"{where}: {(others or ['model_type'])[0]} takes a part from another model or library")


def _check_sizes(pictures: Any, named: str) -> None:
    """Whether the pictures that it is to be given can be made: one wrong digit, and no memory would suffice."""
    for key in ("size", "pad_size"):
        for side, pixels in dict(getattr(pictures, key, None) or {}).items():
            if "pixels" not in side and pixels > LONGEST_SIDE:
                raise InputError(
                    f"{named}: how pictures are prepared: {key}.{side} is {pixels}, at most {LONGEST_SIDE} can be"
                )


def _check_tokenizer(tokenizer: Any, model: Any, named: str) -> None:
    """Whether the tokenizer is the one that the text encoder was trained with."""
    rows = model.config.text_config.vocab_size
    try:
        check_vocabulary(len(tokenizer), rows, tokenizer("cup")["input_ids"], tokenizer("ball")["input_ids"])
    except InputError as error:
        raise InputError(f"{named}: {error}") from error


def eight_bit(pixels: Tensor) -> Tensor:
    """A picture ``[3, H, W]`` in [0, 1] as picture files have it, uint8: what these models were trained on."""
    return (pixels * 255).round().clamp(0, 255).byte()
