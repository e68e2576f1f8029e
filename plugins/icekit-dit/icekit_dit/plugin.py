"""What the plugin brings, declared without the modules that load models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icekit import hookimpl
from icekit_dit import llm_settings, modulation_settings, settings

if TYPE_CHECKING:
    from icekit.hookspecs import Register


@hookimpl
def register_backbones(register: Register) -> None:
    """Stable Diffusion 3.x, FLUX.1, Sana, FLUX.2-klein and Z-Image."""
    register(
        "sd3",
        "icekit_dit.sd3:StableDiffusion3",
        settings=settings.StableDiffusion3Settings,
        summary="Any Stable Diffusion 3.x model, from the hub or a folder; also one without T5.",
    )
    register(
        "flux",
        "icekit_dit.flux:Flux",
        settings=settings.FluxSettings,
        summary="Any FLUX.1 model, dev or schnell, from the hub or a folder.",
    )
    register(
        "sana",
        "icekit_dit.sana:Sana",
        settings=llm_settings.SanaSettings,
        summary="Any Sana model, from the hub or a folder.",
    )
    register(
        "flux2-klein",
        "icekit_dit.flux2_klein:Flux2Klein",
        settings=llm_settings.Flux2KleinSettings,
        summary="Any FLUX.2-klein model, distilled or base, from the hub or a folder.",
    )
    register(
        "z-image",
        "icekit_dit.z_image:ZImage",
        settings=llm_settings.ZImageSettings,
        summary="Any Z-Image model, from the hub or a folder.",
    )
    register(
        "flux-modulation",
        "icekit_dit.modulated:ModulatedFlux",
        settings=modulation_settings.ModulatedFluxSettings,
        summary="FLUX.1, with an offset of the modulation in every token; for the learner modulation.",
    )
    register(
        "sd3-modulation",
        "icekit_dit.modulated:ModulatedStableDiffusion3",
        settings=modulation_settings.ModulatedStableDiffusion3Settings,
        summary="Stable Diffusion 3.x, with an offset of the modulation in every token; for the learner modulation.",
    )


@hookimpl
def register_learners(register: Register) -> None:
    """Offsets of the modulation, for families whose rows carry little."""
    register(
        "modulation",
        "icekit_dit.modulation_learner:ModulationLearner",
        settings=modulation_settings.ModulationSettings,
        summary="An offset of the modulation for every token, by ICE's losses; after TokenVerse (Garibi et al., 2025).",
    )


@hookimpl
def register_segmentors(register: Register) -> None:
    """ConceptAttention."""
    register(
        "conceptattention",
        "icekit_dit.conceptattention:ConceptAttentionSegmentor",
        settings=settings.ConceptAttentionSettings,
        summary="What a diffusion transformer's attention gives out, the word against rivals (Helbling et al., 2025).",
    )
