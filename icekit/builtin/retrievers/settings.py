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
        None,
        description="words to choose from: a list, or a text file with one word a line; none: icekit's own, 9,150 "
        "names of things that can be seen. A model reads a vocabulary once: its embeddings are kept in icekit's cache",
    )
    templates: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        ("a photo of a {}",),
        min_length=1,
        description="prompts that each word is put into; their embeddings are averaged, and each takes a pass over "
        "the vocabulary",
    )
    # No "table" or "wall" by default: they are in most photographs, and would win while objects are still there.
    background: WordList = Field(
        ("background", "blurred background", "nothing"),
        description="words for what is no object; when one of them fits what is left better than any object, the "
        "search ends",
    )
    stop_words: WordList = Field(
        (),
        description="words of the vocabulary that are never proposed, such as those for pictures (photo, background)",
    )
    max_similarity: float = Field(
        0.85,
        gt=0,
        le=1,
        description="a word is dropped if the cosine of its text embedding with that of a word found before is this "
        "or more; the run's setting reuse says which of those count",
    )
    min_score: float = Field(
        -1.0,
        ge=-1,
        le=1,
        description="a word is proposed only if its score (cosine with the picture) is above this",
    )
    crop: bool = Field(
        True, description="when little is visible, look at its bounding box as well as at the whole picture"
    )
    crop_below: float = Field(
        0.5,
        ge=0,
        le=1,
        description="with crop: little is visible if the square around it covers less than this share of the picture",
    )
    top: int = Field(5, ge=1, description="largest number of words that are proposed, best first")


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
        description="lambda in |C^T w - z|^2 + lambda |w|_1, the sparsity of the decomposition: the larger, the fewer "
        "words (published: 0.2; a Lasso that divides the first term by the dimension alone calls this "
        "0.1)",
    )
    image_mean: Annotated[str, Stored(_stored_mean)] = Field(
        "photographs",
        description="mean image embedding that is subtracted first: photographs (of a dozen photographs of "
        "scikit-image), a folder of pictures like yours, a .safetensors file, or none",
    )
    rerank: bool = Field(False, description="let a second CLIP rank anew all words that have a weight (published)")
    rerank_model: ClipName = Field("ViT-H-14", description="the second CLIP, named as in model (published: ViT-H-14)")
    rerank_pretrained: ClipWeights = Field(
        "laion2b_s32b_b79k", description="open_clip's name of the second CLIP's weights"
    )
    rerank_templates: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        ("{}",), min_length=1, description="prompts for the second CLIP (published: the bare word)"
    )


class WordsSettings(ComponentSettings):
    """Settings of the ``words`` retriever."""

    words: WordList = Field((), description="words to look for, in this order: cup,ball")
