"""A run's models: the settings' components, built on one device, and kernels that give the same bits each time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from icekit import plugins
from icekit.plugins import Plugins
from icekit.protocols import Backbone, InputError, ShapedBackbone
from icekit.run.border import check_backbone
from icekit.run.machine import check_memory, enough_memory
from icekit.settings import Role, Settings


def load_backbone(found: Plugins, settings: Settings, device: torch.device, *, learns: bool = True) -> Backbone:
    """The settings' backbone, loaded; it is said before if it will not fit.

    learns: whether tokens are learned with it, or pictures drawn alone.
    """
    name = settings.name_of("backbone")
    values = found.component_settings("backbone", name, settings.values_of("backbone"))
    with (
        enough_memory("load", found, lambda: settings),
        found.naming("load", [("backbone", name)], by=("backbone", name)),
    ):
        check_memory(found, settings, device, learns=learns)
        backbone: Backbone = found.component("backbone", name)(values, device)
        check_backbone(("backbone", name), backbone)
    return backbone


def load_model(settings: Settings | None = None, installed: Plugins | None = None) -> Backbone:
    """The settings' backbone, loaded: several calls of ``extract`` and ``compose`` can be handed the same.

    Args:
        settings: ``icekit.Settings``; the defaults if None.
        installed: the plugins to use; those of this Python environment if None.

    Raises:
        InputError: the settings are wrong, or the model cannot be loaded.
    """
    found = installed or plugins.installed()
    resolved = found.resolve(settings or Settings())
    return load_backbone(found, resolved, resolve_device(resolved.device))


def in_shape_of(picture: tuple[int, int], found: Plugins, settings: Settings, backbone: Backbone) -> Backbone:
    """The backbone for a picture of this (width, height), where it works with more than one shape; else as it is."""
    if not isinstance(backbone, ShapedBackbone):
        return backbone
    name = settings.name_of("backbone")
    with found.naming("load", [("backbone", name)], by=("backbone", name)):
        shaped = backbone.for_picture(picture[1], picture[0])
        check_backbone(("backbone", name), shaped)
    return shaped


def pipeline_facts(backbone: Backbone) -> dict[str, Any]:
    """How a backbone's model is loaded without icekit, where it says so, JSON-able: see ``protocols.Backbone``.

    A model that was read from one file says its pipeline, and not what ``from_pretrained`` of it would take.
    """
    kind, source = getattr(backbone, "pipeline_class", None), getattr(backbone, "pipeline_source", None)
    if not kind:
        return {}
    encoders = getattr(backbone, "pipeline_encoders", {})
    facts = {
        "pipeline_class": str(kind),
        "pipeline_source": str(source) if source else None,
        "pipeline_encoders": {name: [str(part) for part in parts] for name, parts in encoders.items()},
        "pipeline_loads_tokens": bool(getattr(backbone, "pipeline_loads_tokens", True)),
        "pipeline_takes_space": bool(getattr(backbone, "pipeline_takes_space", False)),
        "pipeline_without": [str(part) for part in getattr(backbone, "pipeline_without", ())],
    }
    return {name: value for name, value in facts.items() if value is not None}


# Any, for a retriever and a segmentor both: what a component must offer was checked at registration.
def build_component(found: Plugins, settings: Settings, role: Role, backbone: Backbone) -> Any:
    """The settings' retriever, segmentor or learner on this backbone."""
    name = settings.name_of(role)
    values = found.component_settings(role, name, settings.values_of(role))
    with found.naming("load", [(role, name), ("backbone", settings.name_of("backbone"))], by=(role, name)):
        return found.component(role, name)(values, backbone)


def check_picture(found: Plugins, settings: Settings, source: str, size: tuple[int, int]) -> None:
    """Whether the segmentor's files are of this picture, where it has some: see ``protocols.Segmentor``.

    size: the picture's (width, height), pixels, upright.

    Raises:
        InputError: they are not.
    """
    name = settings.name_of("segmentor")
    check = getattr(found.component("segmentor", name), "check_picture", None)
    if check is not None:
        own = found.component_settings("segmentor", name, settings.values_of("segmentor"))
        with found.naming("settings", [("segmentor", name)], by=("segmentor", name)):
            check(own, source, size)


def resolve_device(name: str) -> torch.device:
    """``"auto"`` becomes the best device there is.

    Raises:
        InputError: the device asked for is not there.
    """
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    available = [device for device, is_there in there.items() if is_there()]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise InputError(f"device {name!r} is not available here: choose auto or {' or '.join(available)}")
    return torch.device(name)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic kernels for the length of the block: the same seed on the same machine gives the same bits.

    An operation that has none on this device only warns: rather a run that may differ in its last bits than none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read when CUDA is first used
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # torch.use_deterministic_algorithms imports its compiler: seconds
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
