"""The default plugins: ICE in parts, registered through the public hooks and nothing else.

Each hook imports what it registers, so that a command which needs no model does not wait for one to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from icekit.hookspecs import hookimpl

if TYPE_CHECKING:
    from icekit.protocols import Attribute


@hookimpl
def register_backbones(register: Callable[[str, type], None]) -> None:
    """Stable Diffusion 1.x and 2.x."""
    from icekit.backbones.stable_diffusion import StableDiffusion

    register("sd21", StableDiffusion)


@hookimpl
def register_retrievers(register: Callable[[str, type], None]) -> None:
    """CLIP alone, its sparse decomposition, and the user's own words."""
    from icekit.builtin.retrievers.clip import ClipRetriever
    from icekit.builtin.retrievers.splice import SpliceRetriever
    from icekit.builtin.retrievers.words import WordsRetriever

    register("clip", ClipRetriever)
    register("splice", SpliceRetriever)
    register("words", WordsRetriever)


@hookimpl
def register_segmentors(register: Callable[[str, type], None]) -> None:
    """Cross-attention, clustered self-attention, and the user's own masks."""
    from icekit.builtin.segmentors.diffseg import DiffSegSegmentor
    from icekit.builtin.segmentors.masks import MaskFilesSegmentor
    from icekit.builtin.segmentors.xattn import CrossAttentionSegmentor

    register("xattn", CrossAttentionSegmentor)
    register("diffseg", DiffSegSegmentor)
    register("masks", MaskFilesSegmentor)


@hookimpl
def register_learners(register: Callable[[str, type], None]) -> None:
    """ICE's structured concept learning; described and plain words and random rows, which learn nothing."""
    from icekit.builtin.learners.ice import IceLearner
    from icekit.builtin.learners.word_tokens import DescribedTokens, RandomTokens, WordTokens

    register("ice", IceLearner)
    register("described", DescribedTokens)
    register("words", WordTokens)
    register("random", RandomTokens)


@hookimpl
def register_attributes(register: Callable[[Attribute], None]) -> None:
    """Colour and material."""
    from icekit.builtin.attributes import COLOUR, MATERIAL

    register(COLOUR)
    register(MATERIAL)


@hookimpl
def register_presets(register: Callable[[str, Path], None]) -> None:
    """ICE as it was published: as its code does it, and as its paper says; and what made it learn on the tabletop."""
    folder = Path(__file__).parents[1] / "presets"
    for name in ("published", "paper", "weighed"):
        register(name, folder / f"{name}.toml")


@hookimpl
def register_datasets(register: Callable[[str, type], None]) -> None:
    """The user's own pictures."""
    from icekit.builtin.datasets.folder import FolderDataset

    register("folder", FolderDataset)


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    """The UCE protocol's metrics, with CLIP and with DINO, and those of masks and words."""
    from icekit.builtin.metrics import mask_metrics, similarity

    register("sim_i", similarity.Identity)
    register("sim_c", similarity.Composition)
    register("acc1", similarity.Accuracy)
    register("acc3", similarity.Accuracy3)
    register("sim_i_dino", similarity.DinoIdentity)
    register("sim_c_dino", similarity.DinoComposition)
    register("acc1_dino", similarity.DinoAccuracy)
    register("acc3_dino", similarity.DinoAccuracy3)
    register("miou", mask_metrics.MeanIou)
    register("recall", mask_metrics.Recall)
    register("word_accuracy", mask_metrics.WordAccuracy)
