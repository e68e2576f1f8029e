"""The retriever of stage one: CLIP compares what is still visible with every word of a vocabulary.

ICE (Cendra and Han, CVPR 2025) decomposes CLIP's image embedding sparsely and re-ranks with a second CLIP (``splice``);
here the words are ranked by one CLIP alone, against words for the background, which end the loop when they win.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from icekit.builtin.words import WordList
from icekit.protocols import Backbone, Candidate, ComponentSettings, InputError, RunError, View

TEXT_BATCH = 256
"""Prompts encoded at once."""
CROP_MARGIN = 0.1
"""A crop is wider than the visible part by this share of its side, on every side."""


def one_or_more(value: Any) -> Any:
    """``"a {}"`` -> ``["a {}"]``: a setting that takes a list takes a single value, too."""
    return [value] if isinstance(value, str) else value


class ClipRetriever:
    """Ranks words by the cosine similarity of CLIP's embeddings of image and prompt (Radford et al., 2021).

    Raises:
        InputError: no such model, weights, folder or vocabulary file, or a vocabulary without a usable word.
        RunError: the weights cannot be fetched.
    """

    class Settings(ComponentSettings):
        """Settings of the ``clip`` retriever."""

        model: str = Field("ViT-B-32", description="open_clip name, hf-hub:OWNER/NAME, or a folder (local-dir:PATH)")
        pretrained: str = Field(
            "laion2b_s34b_b79k", description="open_clip's name of the weights, or a .safetensors file; not for folders"
        )
        vocabulary: str | tuple[str, ...] | None = Field(
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

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        self.settings = settings
        check_templates("templates", settings.templates)
        background = [word.lower() for word in settings.background]
        self._stop_words = frozenset(word.lower() for word in settings.stop_words)
        words = read_vocabulary(settings.vocabulary)
        known = [word for word in words if backbone.knows(word) and word not in background]
        if not known:
            raise InputError(
                f"retriever.vocabulary: the backbone knows none of its {len(words)} words"
                f" (they begin {', '.join(words[:3])})"
            )
        self._clip = ClipModel(settings.model, settings.pretrained, backbone.device)
        self._words, self._background = known, background
        self._knows = backbone.knows
        self._plain: dict[str, Tensor] = {}
        self._prompted = self._clip.embed_words(known + background, settings.templates)

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        """Words that describe the view better than any word for the background, best first, at most ``top``.

        Words equal to one in ``used``, or as similar as ``max_similarity``, are not among them, nor are
        ``stop_words``. Scores are cosine similarities of image and prompt, in [-1, 1].
        """
        return self._unused(self._ranked(view), used, self.settings.top)

    def describe(self, view: View, noun: str, words: Sequence[str]) -> dict[str, float]:
        """Softmax over the prompts of "<word> <noun>", at CLIP's own temperature; see ``protocols.Describer``."""
        known = [word for word in words if self._knows(word)]
        if not known:
            return {}
        texts = self._clip.embed_words([f"{word} {noun}" for word in known], self.settings.templates)
        likely = (self._clip.sharpness * (texts @ self._embed_view(view, self._clip))).softmax(dim=0)
        return dict(zip(known, likely.tolist(), strict=True))

    def _ranked(self, view: View) -> list[Candidate]:
        """The words that outdo the background, best first."""
        return self._above_background((self._prompted @ self._embed_view(view, self._clip)).tolist())

    def _above_background(self, scores: Sequence[float], floor: float = -1.0) -> list[Candidate]:
        """Words with a score above those of all words for the background, ``min_score`` and ``floor``; best first.

        Stop-words were scored with the others, and are left out now.
        """
        floor = max(floor, self.settings.min_score, *scores[len(self._words) :])
        ranked = sorted(zip(self._words, scores, strict=False), key=lambda pair: -pair[1])
        return [Candidate(word, score) for word, score in ranked if score > floor and word not in self._stop_words]

    def _unused(self, ranked: Sequence[Candidate], used: Sequence[str], count: int) -> list[Candidate]:
        """The first ``count`` that are neither one of the words used nor too similar to one."""
        found: list[Candidate] = []
        for candidate in ranked:
            if len(found) == count:
                break
            word = candidate.word
            if not any(word.casefold() == one.casefold() or self._too_similar(word, one) for one in used):
                found.append(candidate)
        return found

    def similarity(self, one: str, other: str) -> float:
        """Cosine similarity of CLIP's text embeddings of two words, without a template, in [-1, 1]."""
        return float(self._text(one) @ self._text(other))

    def _too_similar(self, one: str, other: str) -> bool:
        return self.similarity(one, other) >= self.settings.max_similarity

    def _text(self, word: str) -> Tensor:
        """A plain word's embedding ``[D]``, computed when first asked for: few words come into question."""
        if word not in self._plain:
            self._plain[word] = self._clip.embed_texts([word])[0]
        return self._plain[word]

    def _embed_view(self, view: View, model: ClipModel) -> Tensor:
        return model.embed_view(view, self.settings.crop_below if self.settings.crop else 0.0)


class ClipModel:
    """A frozen CLIP model with its tokenizer. Embeddings are float32 on the CPU, L2-normalised.

    Args:
        model: as ``load_clip`` takes it.
        pretrained: likewise.
        device: where it runs.
        prefix: of the settings ``model`` and ``pretrained`` in messages.

    Raises:
        InputError: no such model, weights or folder.
        RunError: the weights cannot be fetched.
    """

    def __init__(self, model: str, pretrained: str, device: torch.device, prefix: str = "") -> None:
        self._model, self._tokenizer = load_clip(model, pretrained, device, prefix)
        self._device = device

    @property
    def sharpness(self) -> float:
        """What cosines are multiplied by before the softmax: the inverse of the learned temperature."""
        return float(self._model.logit_scale.exp())

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> ``[N, D]``."""
        batches = [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]
        embedded = [self._model.encode_text(self._tokenizer(list(batch)).to(self._device)) for batch in batches]
        return F.normalize(torch.cat(embedded).float(), dim=-1).cpu()

    def embed_words(self, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Words -> ``[N, D]``: the mean of each word's embeddings in these prompts."""
        embeddings = self.embed_texts([template.format(word) for word in words for template in templates])
        return F.normalize(embeddings.unflatten(0, (-1, len(templates))).mean(dim=1), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Tensor]) -> Tensor:
        """Square images ``[3, S, S]`` in [0, 1], of any sizes -> ``[N, D]``."""
        batch = torch.stack([preprocess(image, self._model) for image in images])
        return F.normalize(self._model.encode_image(batch.to(self._device)).float(), dim=-1).cpu()

    def embed_view(self, view: View, crop_below: float) -> Tensor:
        """Mean of the whole view's embedding and, if what is visible is small, of its crop's: ``[D]``.

        Small is a bounding square of less than ``crop_below`` of the image.
        """
        images = [view.pixels]
        if crop_below > 0 and bool(view.visible.any()):
            top, left, side = visible_square(view.visible, CROP_MARGIN)
            if side * side < crop_below * view.visible.numel():
                images.append(view.pixels[:, top : top + side, left : left + side])
        return F.normalize(self.embed_images(images).mean(dim=0), dim=-1)


def check_templates(setting: str, templates: Sequence[str]) -> None:
    """Whether each prompt of this setting has one place for the word.

    Raises:
        InputError: one has none, or several.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"retriever.{setting}: {template!r} has no single {{}} for the word")


def visible_square(visible: Tensor, margin: float) -> tuple[int, int, int]:
    """The smallest square around what is visible, wider by ``margin`` of its side all around, inside the image.

    Args:
        visible: bool ``[S, S]``, not all False.
        margin: share of the side.

    Returns:
        top, left, side: pixels.
    """
    size = visible.shape[-1]
    rows, columns = visible.any(dim=1).nonzero()[:, 0], visible.any(dim=0).nonzero()[:, 0]
    first_row, last_row, first_column, last_column = (int(i) for i in (rows[0], rows[-1], columns[0], columns[-1]))
    extent = max(last_row - first_row, last_column - first_column) + 1
    side = min(size, round(extent * (1 + 2 * margin)))
    top = (first_row + last_row + 1 - side) // 2
    left = (first_column + last_column + 1 - side) // 2
    return min(max(top, 0), size - side), min(max(left, 0), size - side), side


def preprocess(image: Tensor, model: Any) -> Tensor:
    """A square image ``[3, S, S]`` in [0, 1] as the CLIP model expects it: resized (antialiased) and normalised."""
    from open_clip import get_model_preprocess_cfg
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as transform

    config = get_model_preprocess_cfg(model)
    size = config.get("size", 224)
    sides = [size, size] if isinstance(size, int) else list(size)
    bilinear = config.get("interpolation") == "bilinear"
    mode = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
    resized = transform.resize(image, sides, interpolation=mode, antialias=True).clamp(0, 1)
    return transform.normalize(resized, list(config["mean"]), list(config["std"]))


def read_vocabulary(vocabulary: str | Sequence[str] | None) -> list[str]:
    """The words of a list, of a text file (one a line, ``#`` begins a comment), or the built-in nouns; each once.

    Raises:
        InputError: no such file, not text, or no word in it.
    """
    if vocabulary is None:
        lines = files("icekit.builtin").joinpath("vocabulary", "nouns.txt").read_text(encoding="utf-8").splitlines()
    elif isinstance(vocabulary, str):
        try:
            lines = Path(vocabulary).expanduser().read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise InputError(f"retriever.vocabulary: no such file: {vocabulary}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"retriever.vocabulary: {vocabulary} is not a text file with one word a line") from error
    else:
        lines = list(vocabulary)
    words = list(dict.fromkeys(word for line in lines if (word := line.partition("#")[0].strip().lower())))
    if not words:
        source = vocabulary if isinstance(vocabulary, str) else "the list"
        raise InputError(f"retriever.vocabulary: no word in {source}: it needs one or more, one a line")
    return words


def load_clip(model: str, pretrained: str, device: torch.device, prefix: str = "") -> tuple[Any, Any]:
    """A frozen open_clip model and its tokenizer. Weights are read as tensors only, never as pickled programs.

    Args:
        model: a name of ``open_clip.list_models()``, ``hf-hub:OWNER/NAME``, ``local-dir:PATH`` or a folder.
        pretrained: a tag of that name's weights, or a ``.safetensors`` file; ignored for folders and the hub.
        device: where it runs.
        prefix: of the settings ``model`` and ``pretrained`` in messages.

    Raises:
        InputError: no such model, weights or folder.
        RunError: the weights cannot be fetched.
    """
    import open_clip

    setting = f"retriever.{prefix}"
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    local = model.startswith("local-dir:") or (folder.is_dir() and model not in open_clip.list_models())
    if local:
        _check_folder(f"{setting}model", model, folder)
        name, weights = f"local-dir:{folder}", None
    elif model.startswith("hf-hub:"):
        name, weights = model, None
    else:
        _check_name(setting, model, pretrained)
        name, weights = model, pretrained
    try:
        loaded = open_clip.create_model_from_pretrained(
            name, pretrained=weights, device=device, weights_only=True, return_transform=False
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, the hub, the file system: each fails in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        if local:
            raise InputError(f"{setting}model: {model} is not a folder that open_clip can load: {reason}") from error
        raise RunError(f"CLIP model {model} ({weights or 'its weights'}) cannot be loaded: {reason}") from error
    return loaded.requires_grad_(False).eval(), tokenizer


def _check_folder(setting: str, model: str, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{setting}: no such folder: {model}")
    if not (folder / "open_clip_config.json").is_file():
        raise InputError(f"{setting}: {model} is no open_clip folder: it has no open_clip_config.json")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{setting}: {model} has no weights as .safetensors (pickled weights are not loaded)")


def _check_name(setting: str, model: str, pretrained: str) -> None:
    import open_clip

    names = open_clip.list_models()
    if model.replace("/", "-") not in names:
        hint = _nearest(model, names) or "a folder, hf-hub:OWNER/NAME or a name of open_clip.list_models()"
        raise InputError(f"{setting}model: there is no {model!r}; it can be {hint}")
    tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    if pretrained in tags or (Path(pretrained).is_file() and Path(pretrained).suffix == ".safetensors"):
        return
    hint = _nearest(pretrained, tags) or ", ".join(tags) or "a .safetensors file: open_clip has no weights for it"
    raise InputError(f"{setting}pretrained: {model} has no weights {pretrained!r}; they can be {hint}")


def _nearest(given: str, known: Sequence[str]) -> str:
    lower = {name.lower(): name for name in known}
    return " or ".join(lower[name] for name in difflib.get_close_matches(given.lower(), lower, n=3, cutoff=0.5))
