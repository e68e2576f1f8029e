"""icekit finds the concepts of one image and learns tokens for them and for their intrinsic attributes.

The public API. Names that need torch are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from icekit.hookspecs import hookimpl

if TYPE_CHECKING:
    from icekit.protocols import (
        Attribute,
        Candidate,
        ComponentSettings,
        Conditioning,
        InputError,
        Learned,
        Proposal,
        Region,
        RunError,
        Segmentation,
        Step,
        View,
    )
    from icekit.run.directory import Concept, ConceptLibrary, Extraction
    from icekit.run.orchestrator import extract
    from icekit.settings import Settings, load_settings

_HOMES = {
    "Attribute": "protocols",
    "Candidate": "protocols",
    "ComponentSettings": "protocols",
    "Concept": "library",
    "ConceptLibrary": "library",
    "Conditioning": "protocols",
    "Extraction": "library",
    "InputError": "protocols",
    "Learned": "protocols",
    "Proposal": "protocols",
    "Region": "protocols",
    "RunError": "protocols",
    "Segmentation": "protocols",
    "Settings": "settings",
    "Step": "protocols",
    "View": "protocols",
    "extract": "extraction",
    "load_settings": "settings",
}

__all__ = [
    "Attribute",
    "Candidate",
    "ComponentSettings",
    "Concept",
    "ConceptLibrary",
    "Conditioning",
    "Extraction",
    "InputError",
    "Learned",
    "Proposal",
    "Region",
    "RunError",
    "Segmentation",
    "Settings",
    "Step",
    "View",
    "extract",
    "hookimpl",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'icekit' has no attribute {name!r}")
    return getattr(import_module(f"icekit.{_HOMES[name]}"), name)
