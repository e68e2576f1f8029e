"""A node of ComfyUI that takes a token of an icekit run: its embedding, its mask and the run's picture.

It needs what ComfyUI has and nothing of icekit: a run directory is JSON, safetensors and PNG. Runs are looked for in
the folders that ComfyUI calls ``icekit``, ``models/icekit`` by default; a workflow names a run and a token by what is
listed there, never by a path, and no file is read that leads out of its run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import folder_paths  # ComfyUI's own
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

KIND = "icekit"
"""What ComfyUI calls the folders with runs, and the folder of embeddings that are written."""
OBJECT = "object"
"""A concept as a whole: its instance and its category."""
NONE = "no runs: put run directories into models/icekit, press R"
MAX_JSON, MAX_EMBEDDINGS, MAX_PICTURE = 2**26, 2**28, 2**28
"""Largest files, bytes."""
CLIP_BY_LENGTH = {1024: "clip_h", 1280: "clip_g"}
"""The text encoder of a run that does not name it, by the length of its rows; ``clip_l`` else."""

folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))


class IcekitToken:
    """A token of a run: text for a prompt that uses it, the mask of its concept, and the run's picture."""

    CATEGORY = "icekit"
    FUNCTION = "load"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("STRING", "MASK", "IMAGE")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("text", "mask", "image")
    DESCRIPTION = "A concept of an icekit run, or one of its attributes, as an embedding in a prompt."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Every token of every run, and the text around it."""
        return {
            "required": {
                "token": ([*choices()] or [NONE],),
                "text": ("STRING", {"default": "a photo of a {}", "multiline": True}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, token: str, text: str) -> str:
        """Something else when the run is another one by now."""
        found = choices().get(token)
        return hashlib.sha256(_read(found[0], "embeddings.safetensors", MAX_EMBEDDINGS)).hexdigest() if found else ""

    def load(self, token: str, text: str) -> tuple[str, Tensor, Tensor]:
        """Write the embedding where ComfyUI finds it, and read the mask.

        Args:
            token: as listed: ``run / cup-0 / colour``.
            text: ``{}`` is where the embedding comes; at the end where there is none.

        Returns:
            The text with ``embedding:icekit/name`` in it; the mask, float ``[1, H, W]``, 1 is the concept; the run's
            picture, float ``[1, H, W, 3]`` in [0, 1].

        Raises:
            ValueError: there is no such token, or the run is damaged; one line.
        """
        found = choices().get(token)
        if found is None:
            raise ValueError(f"icekit: there is no {token!r} in the folders {', '.join(_roots())}")
        run, concept, part = found
        manifest = read_manifest(run)
        tokens = concept["tokens"]
        wanted = [part]
        if part == OBJECT:
            wanted = [one for one in ("instance", "category") if one in tokens]
        names = " ".join(f"embedding:{KIND}/{write_embedding(run, manifest, tokens, one)}" for one in wanted)
        placed = text.replace("{}", names) if "{}" in text else f"{text} {names}".strip()
        size = int(manifest["image"]["width"]), int(manifest["image"]["height"])
        mask = np.asarray(_picture(run, concept["mask"], size).convert("L")) > 127
        picture = np.asarray(_picture(run, "image.png", size).convert("RGB"))
        return (
            placed,
            torch.from_numpy(mask.astype(np.float32))[None],
            torch.from_numpy(picture.astype(np.float32) / 255)[None],
        )


NODE_CLASS_MAPPINGS = {"IcekitToken": IcekitToken}
NODE_DISPLAY_NAME_MAPPINGS = {"IcekitToken": "icekit token"}


# --- Runs -------------------------------------------------------------------------------------------------------------


def choices() -> dict[str, tuple[Path, dict[str, Any], str]]:
    """``run / cup-0 / colour`` -> the run, its concept and the part, of all runs that can be read."""
    found: dict[str, tuple[Path, dict[str, Any], str]] = {}
    for root in _roots():
        for run in sorted(Path(root).iterdir()) if os.path.isdir(root) else ():
            if run.name.startswith(".") or not (run / "manifest.json").is_file():
                continue
            try:
                manifest = read_manifest(run)
            except ValueError:
                continue  # somebody else's, or damaged: it is not offered
            for concept in manifest["concepts"]:
                parts = [part for part in concept["tokens"] if not _further_row(part)]
                for part in (OBJECT, *parts):
                    key = f"{run.name} / {concept['label']}-{concept['index']} / {part}"
                    found.setdefault(key, (run, concept, part))
    return found


def read_manifest(run: Path) -> dict[str, Any]:
    """A run's manifest, as far as it is needed here.

    Raises:
        ValueError: it is not there, or not as icekit writes it.
    """
    try:
        manifest = json.loads(_read(run, "manifest.json", MAX_JSON).decode("utf-8"))
        right = isinstance(manifest["icekit_version"], str) and all(
            isinstance(manifest["image"][side], int) for side in ("width", "height")
        )
        for concept in manifest["concepts"]:
            right = right and isinstance(concept["label"], str) and isinstance(concept["index"], int)
            right = right and isinstance(concept["mask"], str) and bool(concept["tokens"])
            right = right and all(isinstance(one, str) for pair in concept["tokens"].items() for one in pair)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"icekit: {run.name} is damaged: manifest.json: {error!r}") from error
    if not right:
        raise ValueError(f"icekit: {run.name} is damaged: manifest.json is not as icekit writes it")
    return manifest


def _further_row(part: str) -> bool:
    """Whether this is a row of the instance after its first, which are one embedding."""
    return re.fullmatch(r"instance\d+", part) is not None


def _roots() -> list[str]:
    return list(folder_paths.get_folder_paths(KIND))


def _read(run: Path, name: str, limit: int) -> bytes:
    """A file of a run.

    Raises:
        ValueError: it is not there, no plain file, too large, or a link that leads out of the run.
    """
    try:
        real = (run / name).resolve(strict=True)
        if not real.is_relative_to(run.resolve()):
            raise ValueError(f"icekit: {name!r} of {run.name} leads out of the run, and is not read")
        if not stat.S_ISREG(real.stat().st_mode):
            raise ValueError(f"icekit: {name!r} of {run.name} is no plain file")
        with real.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"icekit: {run.name} is damaged: {name!r} cannot be read ({error})") from error
    if len(data) > limit:
        raise ValueError(f"icekit: {run.name} is damaged: {name!r} is larger than {limit // 2**20} MiB")
    return data


def _picture(run: Path, name: str, size: tuple[int, int]) -> Image.Image:
    """A PNG of a run, of this (width, height)."""
    from io import BytesIO

    data = _read(run, name, MAX_PICTURE)
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != size:
                raise ValueError(f"it is {picture.size}, and should be {size}")
            picture.load()
            return picture.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"icekit: {run.name} is damaged: {name!r}: {error}") from error


# --- Embeddings -------------------------------------------------------------------------------------------------------


def rows_of(run: Path, manifest: Mapping[str, Any], tokens: Mapping[str, str], part: str) -> dict[str, Tensor]:
    """What stands for a part of a concept: text encoder, by ComfyUI's key -> float32 ``[n, dim]``.

    Raises:
        ValueError: the run is damaged.
    """
    try:
        everything = load(_read(run, "embeddings.safetensors", MAX_EMBEDDINGS))
        encoders = list((manifest.get("backbone") or {}).get("rows") or [""])
        names = [part, *([one for one in tokens if _further_row(one)] if part == "instance" else [])]
        keys = {encoder: [tokens[one] + (f".{encoder}" if len(encoders) > 1 else "") for one in names]
                for encoder in encoders}  # fmt: skip
        rows = {encoder: torch.stack([everything[key] for key in own]).float() for encoder, own in keys.items()}
    except ValueError:
        raise
    except Exception as error:  # safetensors' own, torch's, what a manifest of somebody else leads to
        raise ValueError(f"icekit: {run.name} is damaged: embeddings.safetensors: {error}") from error
    return {encoder or CLIP_BY_LENGTH.get(one.shape[-1], "clip_l"): one for encoder, one in rows.items()}


def write_embedding(run: Path, manifest: Mapping[str, Any], tokens: Mapping[str, str], part: str) -> str:
    """Write the file of an embedding where ComfyUI looks for them, in the folder ``icekit``.

    Returns:
        Its name without the ending.

    Raises:
        ValueError: the run is damaged, or the file cannot be written.
    """
    data = save(rows_of(run, manifest, tokens, part), {"format": "pt"})
    name = f"{_name(run.name)}-{_name(tokens[part].strip('<>'))}"
    folder = Path(folder_paths.get_folder_paths("embeddings")[0]) / KIND
    file = folder / f"{name}.safetensors"
    try:
        if file.is_file() and file.read_bytes() == data:
            return name
        folder.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(number, "wb") as half:
                half.write(data)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ValueError(f"icekit: {file} cannot be written: {error}") from error
    return name


def _name(text: str) -> str:
    """Text as part of a name that a prompt can have: ASCII letters, digits, ``_`` and ``-``."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    short = re.sub(r"[^A-Za-z0-9_]+", "-", plain).strip("-")
    if short and short == text and len(short) <= 100:
        return short
    return f"{short[:90]}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".strip("-")
