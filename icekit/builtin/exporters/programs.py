"""The exporters: which models a program knows, where its files go, and how tokens are named in its prompts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from icekit.builtin.exporters.layouts import (
    ROW_LENGTHS,
    Rows,
    by_encoder,
    by_token,
    kohya_lora,
    name_in_prompts,
    single_or_by_encoder,
    told_apart,
)
from icekit.builtin.exporters.settings import TokenFilesSettings
from icekit.protocols import InputError, is_instance
from icekit.protocols.values import bounded

if TYPE_CHECKING:
    from icekit.run.extraction import Concept, Extraction

log = logging.getLogger(__name__)

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
SD3, FLUX, SANA, Z_IMAGE = "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline", "ZImagePipeline"
FLUX2_KLEIN = "Flux2KleinPipeline"
FAMILIES = {
    SD: "Stable Diffusion 1 and 2",
    SDXL: "Stable Diffusion XL",
    SD3: "Stable Diffusion 3",
    FLUX: "FLUX.1",
    SANA: "Sana",
    FLUX2_KLEIN: "FLUX.2-klein",
    Z_IMAGE: "Z-Image",
}
"""Pipelines of diffusers, by which a run says of which family its model is, and what people call them."""
PREFIX_BYTES = 40


@dataclass(frozen=True)
class Embedding:
    """One file to be: a token, or all rows of an instance.

    part: of the concept that it stands for. name: the file's, without its ending. rows: float32 ``[n, dim]`` each.
    """

    part: str
    name: str
    rows: Rows


class TokenFiles:
    """What these exporters share: a file for each token, a LoRA adapter where there is one, prompts to paste."""

    Settings = TokenFilesSettings
    own_folder = True

    title: ClassVar[str]
    """What people call the program."""
    families: ClassVar[Sequence[str]]
    """Pipelines whose models it reads tokens for; of all where none is named."""
    embeddings: ClassVar[str] = "embeddings"
    """The folder of embeddings."""
    loras: ClassVar[str] = "loras"
    """The folder of LoRA adapters."""

    def __init__(self, settings: TokenFilesSettings) -> None:
        self.settings = settings

    def in_prompt(self, name: str) -> str:
        """How a prompt names an embedding."""
        return name

    def lora_in_prompt(self, name: str) -> str:
        """What a prompt ends with to use a LoRA adapter; empty where the program has another place for it."""
        return ""

    def tensors(self, name: str, rows: Rows) -> Mapping[str, Tensor]:
        """What is in the file of an embedding."""
        return single_or_by_encoder(rows)

    def files(self, extraction: Extraction) -> Sequence[str]:
        """The tokens' files, the adapter's, and the prompts.

        Raises:
            InputError: the program does not know such models, or cannot use what was trained of them.
        """
        self._check(extraction)
        names = [self._embedding(one.name) for own in self._embeddings(extraction) for one in own]
        return [*names, *self._tuning(extraction), self._prompts_file(extraction)]

    def export(self, extraction: Extraction, folder: Path) -> None:
        """Write them.

        Raises:
            InputError: see ``files``.
        """
        self._check(extraction)
        for own in self._embeddings(extraction):
            for one in own:
                tensors = {key: row.contiguous() for key, row in self.tensors(one.name, one.rows).items()}
                _write(folder / self._embedding(one.name), save(tensors, {"format": "pt"}))
        self._write_tuning(extraction, folder)
        prompts = "".join(f"{line}\n" for line in self._prompts(extraction))
        _write(folder / self._prompts_file(extraction), prompts.encode())
        self._warn(extraction)

    # --- What the program knows ---------------------------------------------------------------------------------------

    def _check(self, extraction: Extraction) -> None:
        family = _family(extraction)
        if strange := self._strange(extraction):
            raise InputError(
                f"{extraction.home} cannot go to {self.title}: its tokens have rows for {', '.join(strange)}, which "
                f"{self.title} does not read"
            )
        if self.families and family not in self.families:
            known = " and ".join(FAMILIES[one] for one in self.families)
            raise InputError(
                f"{extraction.home} cannot go to {self.title}: its tokens are of {FAMILIES.get(family, family)}, and "
                f"{self.title} reads those of {known}"
            )
        self._check_tuning(extraction)

    def _strange(self, extraction: Extraction) -> list[str]:
        """What a token has rows for, and the program no text encoder."""
        return [name for name in _encoders(extraction) if name not in ROW_LENGTHS]

    def _check_tuning(self, extraction: Extraction) -> None:
        if any(name != "lora.safetensors" for name in extraction.tuning_files()):
            raise InputError(
                f"{extraction.home} cannot go to {self.title}: its learner trained all weights of the model, which "
                "diffusers alone reads as they are (--format diffusers)"
            )

    def _warn(self, extraction: Extraction) -> None:
        """Say of rows of a length that no model of the program has that they will be passed over."""
        lengths = {encoder: rows.shape[-1] for encoder, rows in self._embeddings(extraction)[0][0].rows.items()}
        for encoder, length in lengths.items():
            if length != ROW_LENGTHS[encoder]:
                log.warning(
                    "%s: the rows for %s have %d numbers, and the models that %s reads have %d: it will not use them",
                    extraction.home,
                    encoder,
                    length,
                    self.title,
                    ROW_LENGTHS[encoder],
                )

    # --- Tokens -------------------------------------------------------------------------------------------------------

    def _prefix(self, extraction: Extraction) -> str:
        if self.settings.prefix is not None:
            return f"{self.settings.prefix}-" if self.settings.prefix else ""
        return f"{bounded(name_in_prompts(extraction.home.resolve().name), PREFIX_BYTES)}-"

    def _embeddings(self, extraction: Extraction) -> list[list[Embedding]]:
        """For each concept its files to be."""
        prefix = self._prefix(extraction)
        stacked = [_stacked(concept) for concept in extraction.concepts]
        stems = [name_in_prompts(token.strip("<>")) for own in stacked for _, token, _ in own]
        names = iter(told_apart([f"{prefix}{stem}" for stem in stems]))
        return [[Embedding(part, next(names), rows) for part, _, rows in own] for own in stacked]

    def _embedding(self, name: str) -> str:
        return f"{self.embeddings}/{name}.safetensors"

    # --- What was trained of the model --------------------------------------------------------------------------------

    def _lora_name(self, extraction: Extraction) -> str:
        return f"{self._prefix(extraction)}lora"

    def _tuning(self, extraction: Extraction) -> list[str]:
        """The files of what was trained of the model."""
        return [f"{self.loras}/{self._lora_name(extraction)}.safetensors"] if extraction.tuning_files() else []

    def _write_tuning(self, extraction: Extraction, folder: Path) -> None:
        for name in self._tuning(extraction):
            lora = extraction.tuning().lora
            try:
                tensors = kohya_lora(lora) if _family(extraction) in (SD, SDXL) else dict(lora)
            except ValueError as error:
                raise InputError(
                    f"{extraction.home} cannot go to {self.title}: its lora.safetensors has the key {error}, which is "
                    "none of an adapter of attention layers"
                ) from error
            _write(folder / name, save(tensors, {"format": "pt"}))

    # --- Prompts ------------------------------------------------------------------------------------------------------

    def _prompts_file(self, extraction: Extraction) -> str:
        return f"{self._prefix(extraction)}prompts.txt"

    def _prompts(self, extraction: Extraction) -> list[str]:
        """A prompt a line: each concept, each of its attributes on its own kind of thing, and all on another's."""
        lines = []
        nouns = [concept.label.replace("-", " ") for concept in extraction.concepts]
        for place, own in enumerate(self._embeddings(extraction)):
            named = {one.part: self.in_prompt(one.name) for one in own}
            attributes = [part for part in named if part not in ("instance", "category")]
            lines.append(f"a photo of a {' '.join(named[part] for part in ('instance', 'category') if part in named)}")
            lines += [f"a photo of a {named.get('category', nouns[place])} {named[part]}" for part in attributes]
            if attributes:
                other = nouns[(place + 1) % len(nouns)]
                lines.append(f"a photo of a {other}, {' '.join(named[part] for part in reversed(attributes))}")
        end = self.lora_in_prompt(self._lora_name(extraction)) if extraction.tuning_files() else ""
        return [f"{line} {end}".rstrip() for line in lines]


class Diffusers(TokenFiles):
    """For diffusers: ``load_textual_inversion``, ``load_lora_weights`` and ``from_pretrained``.

    A token of several text encoders is handed to each by its key, as the model card of the run (README.md) shows.
    """

    title = "diffusers"
    families = ()

    def in_prompt(self, name: str) -> str:
        """The token, which is the file's key where there is one text encoder."""
        return f"<{name}>"

    def tensors(self, name: str, rows: Rows) -> Mapping[str, Tensor]:
        """See ``by_token``."""
        return by_token(f"<{name}>", rows)

    def _strange(self, extraction: Extraction) -> list[str]:
        """Any text encoder will do that the pipeline has."""
        backbone, encoders = extraction.record.backbone, _encoders(extraction)
        known = {*ROW_LENGTHS, *(backbone.pipeline_encoders if backbone else ())}
        return [name for name in encoders if name not in known] if len(encoders) > 1 else []

    def _check_tuning(self, extraction: Extraction) -> None:
        """Both kinds are diffusers' own."""

    def _warn(self, extraction: Extraction) -> None:
        """Rows of any length are right: diffusers loads any model."""

    def _tuning(self, extraction: Extraction) -> list[str]:
        names = extraction.tuning_files()
        return ["pytorch_lora_weights.safetensors" if name == "lora.safetensors" else name for name in names]

    def _write_tuning(self, extraction: Extraction, folder: Path) -> None:
        for name, (_, file) in zip(self._tuning(extraction), extraction.tuning_files().items(), strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)


class A1111(TokenFiles):
    """For AUTOMATIC1111's web UI and Forge: copy the folders into the program's, or export there with ``--out``."""

    title = "A1111"
    families = (SD, SDXL)
    loras = "models/Lora"

    def lora_in_prompt(self, name: str) -> str:
        """``<lora:name:1>``."""
        return f"<lora:{name}:1>"


class ComfyUI(TokenFiles):
    """For ComfyUI: copy the folders into its ``models``, or export there with ``--out``."""

    title = "ComfyUI"
    families = (SD, SDXL, SD3, FLUX, FLUX2_KLEIN, Z_IMAGE)
    loras = "loras"

    def in_prompt(self, name: str) -> str:
        """``embedding:name``."""
        return f"embedding:{name}"

    def tensors(self, name: str, rows: Rows) -> Mapping[str, Tensor]:
        """See ``by_encoder``."""
        return by_encoder(rows)

    def _warn(self, extraction: Extraction) -> None:
        super()._warn(extraction)
        if _family(extraction) == Z_IMAGE:
            log.warning(
                "%s: ComfyUI read no embeddings with Z-Image when this exporter was written: see that a prompt with "
                "one gives another picture",
                extraction.home,
            )


class InvokeAI(TokenFiles):
    """For InvokeAI, whose model manager imports the folders where they are."""

    title = "InvokeAI"
    families = (SD, SDXL)
    loras = "loras"

    def in_prompt(self, name: str) -> str:
        """``<name>``."""
        return f"<{name}>"


def _stacked(concept: Concept) -> list[tuple[str, str, Rows]]:
    """A concept's embeddings: part, token and rows. All rows of the instance are one."""
    instance = [part for part in concept.tokens if is_instance(part)]
    groups = {part: instance if part in instance else [part] for part in concept.tokens if part not in instance[1:]}
    made: list[tuple[str, str, Rows]] = []
    for part, own in groups.items():
        encoders = concept.embeddings[part]
        rows = {name: torch.stack([concept.embeddings[one][name] for one in own]).float() for name in encoders}
        made.append(("instance" if is_instance(part) else part, concept.tokens[part], rows))
    return made


def _encoders(extraction: Extraction) -> list[str]:
    return list(next(iter(extraction.concepts[0].embeddings.values()))) if extraction.concepts else []


def _family(extraction: Extraction) -> str:
    """The pipeline of the run's model; where the run does not say it, what its text encoders belong to."""
    backbone = extraction.record.backbone
    if backbone and backbone.pipeline_class:
        return backbone.pipeline_class
    encoders = _encoders(extraction)
    known = (
        (SD, {"clip_l"}),
        (SD, {"clip_h"}),
        (SDXL, {"clip_l", "clip_g"}),
        (SD3, {"clip_l", "clip_g", "t5xxl"}),
        (FLUX, {"clip_l", "t5xxl"}),
        (SANA, {"gemma2_2b"}),
        (Z_IMAGE, {"qwen3_4b"}),
        (FLUX2_KLEIN, {"qwen3_8b"}),
    )
    found = next((family for family, names in known if names == {*encoders}), None)
    return found or f"a model with the text encoders {', '.join(encoders)}"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
