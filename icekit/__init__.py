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
        FineTuning,
        InputError,
        Learned,
        Proposal,
        Region,
        RunError,
        Segmentation,
        Step,
        View,
    )
    from icekit.run.directory import Located
    from icekit.run.extraction import Concept, ConceptLibrary, Extraction
    from icekit.run.learning import learn
    from icekit.run.locating import locate
    from icekit.run.orchestrator import extract
    from icekit.run.showing import Sample, Shown, show
    from icekit.settings import Settings, load_settings

_HOMES = {
    "Attribute": "protocols",
    "Candidate": "protocols",
    "ComponentSettings": "protocols",
    "Concept": "run.extraction",
    "ConceptLibrary": "run.extraction",
    "Conditioning": "protocols",
    "Extraction": "run.extraction",
    "FineTuning": "protocols",
    "InputError": "protocols",
    "Learned": "protocols",
    "Located": "run.directory",
    "Proposal": "protocols",
    "Region": "protocols",
    "RunError": "protocols",
    "Sample": "run.showing",
    "Segmentation": "protocols",
    "Settings": "settings",
    "Shown": "run.showing",
    "Step": "protocols",
    "View": "protocols",
    "extract": "run.orchestrator",
    "learn": "run.learning",
    "load_settings": "settings",
    "locate": "run.locating",
    "show": "run.showing",
}

__all__ = [
    "Attribute",
    "Candidate",
    "ComponentSettings",
    "Concept",
    "ConceptLibrary",
    "Conditioning",
    "Extraction",
    "FineTuning",
    "InputError",
    "Learned",
    "Located",
    "Proposal",
    "Region",
    "RunError",
    "Sample",
    "Segmentation",
    "Settings",
    "Shown",
    "Step",
    "View",
    "extract",
    "hookimpl",
    "learn",
    "load_settings",
    "locate",
    "show",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'icekit' has no attribute {name!r}")
    return getattr(import_module(f"icekit.{_HOMES[name]}"), name)
