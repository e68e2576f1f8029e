"""The default plugins: ICE in parts, registered through the public hooks and nothing else.

Each hook imports what it registers, so that a command which needs no model does not wait for one to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from icekit.hookspecs import hookimpl

if TYPE_CHECKING:
    from icekit.protocols import Attribute


@hookimpl
def register_backbones(register: Callable[[str, type], None]) -> None:
    """Stable Diffusion 1.x and 2.x."""
    from icekit.builtin.stable_diffusion import StableDiffusion

    register("sd21", StableDiffusion)


@hookimpl
def register_retrievers(register: Callable[[str, type], None]) -> None:
    """CLIP, and the user's own words."""
    from icekit.builtin.clip import ClipRetriever
    from icekit.builtin.words import WordsRetriever

    register("clip", ClipRetriever)
    register("words", WordsRetriever)


@hookimpl
def register_segmentors(register: Callable[[str, type], None]) -> None:
    """Cross-attention, and the user's own masks."""
    from icekit.builtin.masks import MaskFilesSegmentor
    from icekit.builtin.xattn import CrossAttentionSegmentor

    register("xattn", CrossAttentionSegmentor)
    register("masks", MaskFilesSegmentor)


@hookimpl
def register_learners(register: Callable[[str, type], None]) -> None:
    """ICE's structured concept learning."""
    from icekit.builtin.ice import IceLearner

    register("ice", IceLearner)


@hookimpl
def register_attributes(register: Callable[[Attribute], None]) -> None:
    """Colour and material."""
    from icekit.builtin.attributes import COLOUR, MATERIAL

    register(COLOUR)
    register(MATERIAL)
