"""The default plugins: ICE in parts, registered through the public hooks and nothing else.

Components are declared by their place, with their settings: they are imported when they are used, torch with them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from icekit.hookspecs import hookimpl

if TYPE_CHECKING:
    from icekit.hookspecs import Register
    from icekit.protocols import Attribute

HERE = "icekit.builtin"


@hookimpl
def register_backbones(register: Register) -> None:
    """Stable Diffusion 1.x, 2.x and XL."""
    from icekit.backbones.settings import StableDiffusionSettings, StableDiffusionXLSettings

    register(
        "sd21",
        "icekit.backbones.stable_diffusion:StableDiffusion",
        settings=StableDiffusionSettings,
        summary="Any Stable Diffusion 1.x or 2.x model, from the hub or a folder in diffusers' format.",
    )
    register(
        "sdxl",
        "icekit.backbones.stable_diffusion_xl:StableDiffusionXL",
        settings=StableDiffusionXLSettings,
        summary="Any Stable Diffusion XL model, from the hub or a folder in diffusers' format.",
    )


@hookimpl
def register_retrievers(register: Register) -> None:
    """CLIP alone, its sparse decomposition, and the user's own words."""
    from icekit.builtin.retrievers.settings import ClipSettings, SpliceSettings, WordsSettings

    register(
        "clip",
        f"{HERE}.retrievers.clip:ClipRetriever",
        settings=ClipSettings,
        summary="Ranks words by the cosine similarity of CLIP's embeddings of image and prompt (Radford et al., 2021).",
    )
    register(
        "splice",
        f"{HERE}.retrievers.splice:SpliceRetriever",
        settings=SpliceSettings,
        summary="Words by their weight in a sparse decomposition of CLIP's image embedding.",
    )
    register(
        "words",
        f"{HERE}.retrievers.words:WordsRetriever",
        settings=WordsSettings,
        summary="The user's own words, in their order, each given once, with score 1.",
    )


@hookimpl
def register_segmentors(register: Register) -> None:
    """Cross-attention, clustered self-attention, and the user's own masks."""
    from icekit.builtin.segmentors.settings import CrossAttentionSettings, DiffSegSettings, MaskFilesSettings

    register(
        "xattn",
        f"{HERE}.segmentors.xattn:CrossAttentionSegmentor",
        settings=CrossAttentionSettings,
        summary="A word's mask from the backbone's attention, without training.",
    )
    register(
        "diffseg",
        f"{HERE}.segmentors.diffseg:DiffSegSegmentor",
        settings=DiffSegSettings,
        summary="The segments of the image that are the word's, without training.",
    )
    register(
        "masks",
        f"{HERE}.segmentors.masks:MaskFilesSegmentor",
        settings=MaskFilesSettings,
        summary="The user's own masks, from files: white (128 of 255 or more) is the object.",
    )


@hookimpl
def register_learners(register: Register) -> None:
    """ICE's structured concept learning; described and plain words and random rows, which learn nothing."""
    from icekit.builtin.learners import settings

    register(
        "ice",
        f"{HERE}.learners.ice:IceLearner",
        settings=settings.IceSettings,
        summary="ICE's structured concept learning: a category, an instance and one token an attribute for every "
        "object.",
    )
    register(
        "described",
        f"{HERE}.learners.word_tokens:DescribedTokens",
        settings=settings.DescribedTokenSettings,
        summary="The words that the retriever sees in each region (``naming = described``): nothing is learned.",
    )
    register(
        "words",
        f"{HERE}.learners.word_tokens:WordTokens",
        settings=settings.WordTokenSettings,
        summary="Plain words in place of learned tokens: what a run would be worth if learning found just these words.",
    )
    register(
        "random",
        f"{HERE}.learners.word_tokens:RandomTokens",
        settings=settings.RandomTokenSettings,
        summary="Random rows in place of learned tokens, each as long as the row of the concept's word.",
    )


@hookimpl
def register_attributes(register: Callable[[Attribute], None]) -> None:
    """Colour, material and pattern."""
    from icekit.builtin.attributes import COLOUR, MATERIAL, PATTERN

    register(COLOUR)
    register(MATERIAL)
    register(PATTERN)


@hookimpl
def register_presets(register: Callable[[str, Path], None]) -> None:
    """ICE as it was published: as its code does it, and as its paper says; what made it learn on the tabletop; UCE."""
    folder = Path(__file__).parents[1] / "presets"
    for name in ("published", "paper", "weighed", "uce"):
        register(name, folder / f"{name}.toml")


@hookimpl
def register_datasets(register: Register) -> None:
    """The user's own pictures, and those of the UCE benchmark."""
    from icekit.builtin.datasets.settings import FolderSettings, UceSettings

    register(
        "folder",
        f"{HERE}.datasets.folder:FolderDataset",
        settings=FolderSettings,
        summary="The user's own pictures from a folder, with their masks where there are some.",
    )
    register(
        "uce",
        f"{HERE}.datasets.uce:UceDataset",
        settings=UceSettings,
        summary="The UCE benchmark (ConceptExpress, ECCV 2024): photographs with masks, beside published figures.",
    )


@hookimpl
def register_exporters(register: Register) -> None:
    """The report, and files for other programs."""
    from icekit.builtin.exporters.settings import TokenFilesSettings
    from icekit.report.settings import ReportSettings

    register(
        "report",
        "icekit.report.exporter:Report",
        settings=ReportSettings,
        summary="A page for people, report.html: a run's concepts, samples and attention maps, and what to type next.",
    )
    for name, component, whom in (
        ("diffusers", "Diffusers", "diffusers: load_textual_inversion, load_lora_weights"),
        ("a1111", "A1111", "AUTOMATIC1111's web UI and Forge (SD 1, 2, XL)"),
        ("comfyui", "ComfyUI", "ComfyUI (SD 1, 2, XL, 3, FLUX.1, FLUX.2-klein, Z-Image)"),
        ("invokeai", "InvokeAI", "InvokeAI (SD 1, 2, XL)"),
    ):
        register(
            name,
            f"{HERE}.exporters.programs:{component}",
            settings=TokenFilesSettings,
            summary=f"A file a token, a run's LoRA adapter and prompts to paste, for {whom}.",
        )


@hookimpl
def register_executors(register: Register) -> None:
    """Processes of this machine."""
    from icekit.builtin.executors.settings import LocalSettings

    register(
        "local",
        f"{HERE}.executors.local:LocalExecutor",
        settings=LocalSettings,
        summary="Processes of this machine: one for each GPU, or several on the CPU.",
    )


@hookimpl
def register_metrics(register: Register) -> None:
    """The UCE protocol's metrics, with CLIP and with DINO, and those of masks and words."""
    from icekit.builtin.metrics import mask_metrics
    from icekit.builtin.metrics.settings import AttributeClipSettings, ClipSettings, DinoSettings

    of_pictures = {
        "sim_i": ("Identity", "SIM^I: cosine of images made with a concept's tokens to the source image masked to it"),
        "sim_c": ("Composition", "SIM^C: cosine of images made with all concepts' tokens together to the source image"),
        "acc1": ("Accuracy", "ACC^1: share of a concept's images that are nearer to it than to any other concept"),
        "acc3": ("Accuracy3", "ACC^3: share of a concept's images that have it among the three nearest concepts"),
    }
    place = f"{HERE}.metrics.similarity"
    for name, (component, summary) in of_pictures.items():
        register(name, f"{place}:{component}", settings=ClipSettings, summary=f"{summary} (CLIP).")
    for name, (component, summary) in of_pictures.items():
        register(f"{name}_dino", f"{place}:Dino{component}", settings=DinoSettings, summary=f"{summary} (DINO).")
    register(
        "attribute_clip",
        f"{HERE}.metrics.attributes:AttributeClip",
        settings=AttributeClipSettings,
        summary="Share of an attribute's images in which CLIP ranks the word it was named with first; needs no truth.",
    )
    register("miou", mask_metrics.MeanIou)
    register("mask_recall", mask_metrics.MaskRecall)
    register("mask_precision", mask_metrics.MaskPrecision)
    register("recall", mask_metrics.Recall)
    register("word_accuracy", mask_metrics.WordAccuracy)
