"""The methods next to ICE, to compare it with: all but HyperExpress learn one token a concept, and no attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icekit import hookimpl

if TYPE_CHECKING:
    from icekit.hookspecs import Register


@hookimpl
def register_segmentors(register: Register) -> None:
    """ConceptExpress's localisation, which needs no word."""
    from icekit_neighbours.settings import LocalisationSettings

    register(
        "conceptexpress",
        "icekit_neighbours.localisation:ConceptExpressSegmentor",
        settings=LocalisationSettings,
        summary="The regions of an image by its self-attention; words are the retriever's to find.",
    )


@hookimpl
def register_learners(register: Register) -> None:
    """Textual Inversion, DreamBooth, Break-A-Scene, HyperExpress and ConceptExpress's optimisation."""
    from icekit_neighbours import settings

    register(
        "textual-inversion",
        "icekit_neighbours.textual_inversion:TextualInversionLearner",
        settings=settings.TextualInversionSettings,
        summary="One token a concept, learned by the denoising loss of the whole picture (Gal et al., 2023).",
    )
    register(
        "dreambooth",
        "icekit_neighbours.dreambooth:DreamBoothLearner",
        settings=settings.DreamBoothSettings,
        summary="The noise predictor learns to draw the object at a rare word of its own (Ruiz et al., 2023).",
    )
    register(
        "break-a-scene",
        "icekit_neighbours.break_a_scene:BreakASceneLearner",
        settings=settings.BreakASceneSettings,
        summary="One token a concept, from random subsets of the concepts, then the weights (Avrahami et al., 2023).",
    )
    register(
        "conceptexpress",
        "icekit_neighbours.conceptexpress:ConceptExpressLearner",
        settings=settings.ConceptExpressSettings,
        summary="One token a concept, which starts as several that are merged into their mean (Hao et al., 2024).",
    )
    register(
        "hyperexpress",
        "icekit_neighbours.hyperexpress:HyperExpressLearner",
        settings=settings.HyperExpressSettings,
        summary="ICE's category, instance and attribute tokens, with losses in the Poincare ball instead of triplets.",
    )
