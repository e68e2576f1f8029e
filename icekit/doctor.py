"""What an installation is made of and what it can run: the facts behind ``icekit doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from icekit.foreign import aside, guarded, said
from icekit.plugins import KINDS, Plugins, own_version
from icekit.protocols import InputError

LIBRARIES = (
    "torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "peft", "accelerate", "huggingface_hub",
    "tokenizers", "safetensors", "POT", "scikit-image", "scikit-learn", "scipy", "numpy", "pillow", "pydantic",
    "pluggy", "click",
)  # fmt: skip
"""Distributions whose versions matter in a report of a fault."""
VARIABLES = (
    "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "ICEKIT_PLUGINS", "ICEKIT_PLUGINS_DIR",
)  # fmt: skip
"""Environment variables that change what happens; no other is looked at, for some hold secrets."""


def examine(found: Plugins) -> dict[str, Any]:
    """All facts, JSON-able; whatever cannot be found out says why instead.

    Returns:
        ``versions``, ``environment``, ``machine``, ``devices``, ``disk``, ``cache`` (models of the hub on this machine)
        and ``plugins``.
    """
    return {
        "versions": _versions(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "machine": _machine(),
        "devices": _devices(),
        "disk": _disk(),
        "cache": _cache(found),
        "plugins": _plugins(found),
    }


def _versions() -> dict[str, str]:
    versions = {"icekit": own_version(), "python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {"cores": os.cpu_count(), "memory": memory.total, "free_memory": memory.available}


def _devices() -> list[dict[str, Any]]:
    """Where models can run, the one that ``--device auto`` takes first."""
    devices: list[dict[str, Any]] = []
    try:
        with aside(), guarded():
            import torch

            for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                free, total = torch.cuda.mem_get_info(number)
                facts = torch.cuda.get_device_properties(number)
                one = {"device": f"cuda:{number}", "name": facts.name, "memory": total, "free_memory": free}
                devices.append(one | {"bfloat16": torch.cuda.is_bf16_supported()})
            if torch.backends.mps.is_available():
                devices.append({"device": "mps", "name": platform.processor() or "Apple"})
            devices.append({"device": "cpu", "name": platform.processor() or platform.machine()})
            devices[-1]["threads"] = torch.get_num_threads()
    except Exception as error:  # a torch that cannot be imported is what people come here for
        devices.append({"device": "none", "problem": said(error)})
    return devices


def _disk() -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"working directory": Path.cwd(), "cache of the hub": Path(HF_HUB_CACHE)}
    free = {}
    for name, place in places.items():
        there = next(one for one in (place, *place.parents) if one.exists())
        free[name] = {"path": str(place), "free": shutil.disk_usage(there).free}
    return free


def _cache(found: Plugins) -> list[dict[str, Any]]:
    """The hub's models that are on this machine: what each is, its size, and what its weights take in memory."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    takes = {
        pipeline: name
        for name, one in found.offered("backbone").items()
        for pipeline in getattr(one.settings, "pipelines", ())
    }
    models = []
    for one in sorted(repositories, key=lambda one: one.repo_id):
        if one.repo_type != "model":
            continue
        model: dict[str, Any] = {"id": one.repo_id, "size": one.size_on_disk}
        for revision in sorted(one.revisions, key=lambda each: -each.last_modified)[:1]:
            index = _json(revision.snapshot_path / "model_index.json")
            if index is not None:
                kind = str(index.get("_class_name"))
                model |= {"pipeline": kind, "backbone": takes.get(kind)}
                from icekit.backbones.estimate import weights_in

                model |= {"parameters": weights_in(revision.snapshot_path)}
                if model["backbone"] is not None:
                    model |= _needs(found, model["backbone"], one.repo_id)
        models.append(model)
    return models


def _needs(found: Plugins, backbone: str, model: str) -> dict[str, Any]:
    """What a run of a model would need of the device that ``auto`` takes, bytes, as it is and with ``--low-memory``."""
    try:
        with aside(), guarded():
            from icekit.run.machine import memory_needed
            from icekit.run.models import resolve_device
            from icekit.settings import Settings, validate

            values = {"backbone": {"model": model, "local_files_only": True}, "components": {"backbone": backbone}}
            settings = found.resolve(validate(Settings, values))
            device = resolve_device("auto")
            saving = {"backbone": {"low_memory": "on"}}
            needs = [memory_needed(found, settings, device, more) for more in (None, saving)]
    except Exception as error:  # a torch that cannot be imported, a plugin that is broken
        return {"needs_problem": said(error)}
    names = ("needs", "needs_low_memory")
    return {name: max(need.learning, need.drawing) for name, need in zip(names, needs, strict=True) if need is not None}


def _json(path: Path) -> Mapping[str, Any] | None:
    from icekit.model_files import read_json

    try:
        return read_json(path, "") if path.exists() else None
    except InputError:
        return {}


def _plugins(found: Plugins) -> dict[str, Any]:
    origins = {one.origin for kind in KINDS for one in found.offered(kind).values()}
    origins |= {origin for origin, _ in found.observers()}
    listed = sorted(origins, key=lambda origin: origin.plugin)
    return {
        "loaded": [vars(origin) for origin in listed],
        "broken": [{**vars(one.origin), "reason": one.reason} for one in found.broken],
        "executable": sys.executable,
    }
