"""The methods next to ICE, to compare it with: all but HyperExpress learn one token a concept, and no attribute."""

from __future__ import annotations

from collections.abc import Callable

from icekit import hookimpl


@hookimpl
def register_segmentors(register: Callable[[str, type], None]) -> None:
    """ConceptExpress's localisation, which needs no word."""
    from icekit_neighbours.localisation import ConceptExpressSegmentor

    register("conceptexpress", ConceptExpressSegmentor)


@hookimpl
def register_learners(register: Callable[[str, type], None]) -> None:
    """Textual Inversion, DreamBooth, Break-A-Scene, HyperExpress and ConceptExpress's optimisation."""
    from icekit_neighbours.break_a_scene import BreakASceneLearner
    from icekit_neighbours.conceptexpress import ConceptExpressLearner
    from icekit_neighbours.dreambooth import DreamBoothLearner
    from icekit_neighbours.hyperexpress import HyperExpressLearner
    from icekit_neighbours.textual_inversion import TextualInversionLearner

    register("textual-inversion", TextualInversionLearner)
    register("dreambooth", DreamBoothLearner)
    register("break-a-scene", BreakASceneLearner)
    register("conceptexpress", ConceptExpressLearner)
    register("hyperexpress", HyperExpressLearner)
