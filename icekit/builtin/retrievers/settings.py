"""Settings of the retrievers. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from icekit.clip_names import ClipName, ClipWeights
from icekit.paths import PLACE, stored_place
from icekit.protocols import ComponentSettings
from icekit.protocols.strict import Stored
from icekit.words import WordList, one_or_more


class ClipSettings(ComponentSettings):
    """Settings of the ``clip`` retriever."""

    model: ClipName = Field(
        "ViT-B-32",
        description="open_clip name, hf-hub:OWNER/NAME, a folder (local-dir:PATH), or one inside an installed "
        "package (package:NAME/FOLDER)",
    )
    pretrained: ClipWeights = Field(
        "laion2b_s34b_b79k", description="open_clip's name of the weights, or a .safetensors file; not for folders"
    )
    vocabulary: Annotated[str | tuple[str, ...] | None, PLACE] = Field(
        None, description="words to choose from: a list, or a text file with one a line; none: the built-in nouns"
    )
    templates: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        ("a photo of a {}",),
        min_length=1,
        description="prompts a word is put into, their embeddings averaged; each costs a pass over the vocabulary",
    )
    # No "table" or "wall" by default: they are in most photographs, and would win while objects are still there.
    background: WordList = Field(
        ("background", "blurred background", "nothing"),
        description="words for what is no object; when one of them describes the rest best, the search ends",
    )
    stop_words: WordList = Field(
        (),
        description="words of the vocabulary that are never proposed: those that name pictures rather than what is "
        "in them, say",
    )
    max_similarity: float = Field(
        0.85,
        gt=0,
        le=1,
        description="a word whose text similarity to a used one is this or more is dropped; which count as used "
        "is the run's to say (reuse)",
    )
    min_score: float = Field(
        -1.0,
        ge=-1,
        le=1,
        description="a word whose score is not above this is not proposed, whatever else there is",
    )
    crop: bool = Field(True, description="look at the bounding box of a small visible part as well as at the whole")
    crop_below: float = Field(
        0.5, ge=0, le=1, description="small: the visible part's square covers less than this share of the image"
    )
    top: int = Field(5, ge=1, description="words returned at most")


def _stored_mean(source: str) -> str:
    return stored_place(source, names=("photographs", "none"))


class SpliceSettings(ClipSettings):
    """Settings of the ``splice`` retriever."""

    templates: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        ("{}",), min_length=1, description="prompts a word is put into, their embeddings averaged"
    )
    l1_penalty: float = Field(
        0.2,
        gt=0,
        description="lambda of |C^T w - z|^2 + lambda |w|_1 (published: 0.2; a Lasso that divides by the dimension "
        "alone calls this 0.1): the larger, the fewer words, none less similar to the image than half of it",
    )
    image_mean: Annotated[str, Stored(_stored_mean)] = Field(
        "photographs",
        description="mean image embedding, taken off first: photographs (a dozen of scikit-image's), a folder of "
        "images like yours, a .safetensors file, or none (similarities and fit penalties are smaller then)",
    )
    rerank: bool = Field(False, description="let a second CLIP rank all words with a weight anew (published)")
    rerank_model: ClipName = Field("ViT-H-14", description="the second CLIP, as model (published: ViT-H-14)")
    rerank_pretrained: ClipWeights = Field(
        "laion2b_s32b_b79k", description="open_clip's name of the second CLIP's weights"
    )
    rerank_templates: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        ("{}",), min_length=1, description="prompts of the second CLIP (published: bare words)"
    )


class WordsSettings(ComponentSettings):
    """Settings of the ``words`` retriever."""

    words: WordList = Field((), description="what to look for, in this order: cup,ball")
