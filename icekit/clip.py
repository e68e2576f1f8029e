"""A CLIP model of open_clip: what retrievers and metrics look at pictures with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.cache import cached, digest_of
from icekit.loaded import loaded
from icekit.model_files import (
    Hub,
    check_counts,
    check_finite,
    check_folder,
    check_vocabulary,
    count_tensors,
    one_line,
    read_json,
)
from icekit.paths import PREFIX, resolved_path
from icekit.protocols import InputError, RunError, View
from icekit.waiting import told

CONFIGURATION = "open_clip_config.json"
HUB_WEIGHTS = "open_clip_model.safetensors"
"""What open_clip calls safetensors weights on the hub, and looks for first in a folder."""
PICKLED = (".bin", ".pth", ".pt", ".ckpt")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
"""What a configuration may hand to its tokenizer."""
WAYS_OUT = (
    "give an open_clip folder, or a model that was downloaded before "
    "(HF_HUB_OFFLINE=1 in the environment then uses the cache alone)"
)

TEXT_BATCH = 256
"""Prompts encoded at once."""

CACHED_FROM = 1000
"""So many prompts are read once, and their embeddings kept; fewer are read in a second."""

FIRST_NUMBERS = 16
"""So many numbers of each weight tell a model from others: training changes them all."""

CROP_MARGIN = 0.1
"""A crop is wider than the visible part by this share of its side, on every side."""


class ClipModel:
    """A frozen CLIP model with its tokenizer. Embeddings are float32 on the CPU, L2-normalised.

    Args:
        model: as ``load_clip`` takes it.
        pretrained: likewise.
        device: where it runs.
        prefix: of the settings ``model`` and ``pretrained`` in messages.
        local_files_only: of the hub use the cache alone.

    Raises:
        InputError: no such model, weights or folder.
        RunError: the weights cannot be fetched.
    """

    def __init__(
        self, model: str, pretrained: str, device: torch.device, prefix: str = "", *, local_files_only: bool = False
    ) -> None:
        self._model, self._tokenizer = load_clip(model, pretrained, device, prefix, local_files_only)
        self._device = device

    @cached_property
    def space(self) -> str:
        """What tells the space of these embeddings from that of other weights: the first numbers of each of them."""
        weights = self._model.state_dict()
        parts = (part for name, one in weights.items() for part in (f"{name} {list(one.shape)}", _first_of(one)))
        return f"clip {digest_of(parts)[:32]}"

    @property
    def sharpness(self) -> float:
        """What cosines are multiplied by before the softmax: the inverse of the learned temperature."""
        return float(self._model.logit_scale.exp())

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> ``[N, D]``."""
        return self._embed(self._tokenizer(list(texts)))

    def embed_words(self, words: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Words -> ``[N, D]``: the mean of each word's embeddings in these prompts.

        A vocabulary is read once by a model: its embeddings are kept in icekit's cache.
        """
        ids = self._tokenizer([template.format(word) for word in words for template in templates])

        def embedded() -> Tensor:
            return F.normalize(self._embed(ids).unflatten(0, (-1, len(templates))).mean(dim=1), dim=-1)

        if len(ids) < CACHED_FROM:
            return embedded()
        weights = {name: value for name, value in self._model.state_dict().items() if not name.startswith("visual.")}
        follows_from = [ids, str(len(templates)), type(self._model).__name__, self._device.type]
        digest = digest_of([*follows_from, *(part for one in weights.items() for part in one)])
        return cached("words", digest, len(words), embedded)

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> Tensor:
        """Token ids ``[N, L]`` -> ``[N, D]``."""
        batches = list(ids.split(TEXT_BATCH))
        asked = told(batches, f"CLIP reads {len(ids)} texts, {TEXT_BATCH} at once")
        embedded = [encode_text(self._model, batch.to(self._device)) for batch in asked]
        return F.normalize(torch.cat(embedded).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Tensor]) -> Tensor:
        """Images ``[3, H, W]`` in [0, 1], of any sizes -> ``[N, D]``; see ``preprocess``."""
        batch = torch.stack([preprocess(image, self._model) for image in images])
        return F.normalize(self._model.encode_image(batch.to(self._device)).float(), dim=-1).cpu()

    def embed_view(self, view: View, crop_below: float) -> Tensor:
        """Mean of the whole view's embedding and, if what is visible is small, of its crop's: ``[D]``.

        Small is a window around it (``visible_window``) of less than ``crop_below`` of the image.
        """
        images = [view.pixels]
        if crop_below > 0 and bool(view.visible.any()):
            top, left, height, width = visible_window(view.visible, CROP_MARGIN)
            if height * width < crop_below * view.visible.numel():
                images.append(view.pixels[:, top : top + height, left : left + width])
        return F.normalize(self.embed_images(images).mean(dim=0), dim=-1)


def _first_of(weight: Tensor) -> Tensor:
    """The first numbers of a weight, in float32 whatever the model runs in."""
    return weight.detach().flatten()[:FIRST_NUMBERS].float()


def encode_text(model: Any, ids: Tensor) -> Tensor:
    """Token ids ``[N, L]`` -> ``[N, D]``, as the model's own ``encode_text``, up to rounding.

    In CLIP a position sees those before it alone, and a text is read at its end: what is behind the longest text of a
    batch changes nothing, and is cut off. Most prompts are a sixth of CLIP's 77 positions.
    """
    import open_clip

    used = int((ids != 0).any(dim=0).nonzero().max()) + 1
    mask = getattr(model, "attn_mask", None)
    ahead = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
    causal = mask is not None and torch.equal(mask.isneginf(), ahead)
    if mask is None or not (type(model) is open_clip.CLIP and causal and model.text_pool_type in ("argmax", "eos")):
        encoded: Tensor = model.encode_text(ids)
        return encoded
    shorter = {"positional_embedding": model.positional_embedding[:used], "attn_mask": mask[:used, :used]}
    found = torch.func.functional_call(model, shorter, (), {"text": ids[:, :used]})
    features: Tensor = found["text_features"] if isinstance(found, dict) else found[1]
    return features


def visible_window(visible: Tensor, margin: float) -> tuple[int, int, int, int]:
    """The smallest square around what is visible, wider by ``margin`` of its side all around, inside the image.

    Where the image is too narrow for it, it is a rectangle of the image's own side.

    Args:
        visible: bool ``[H, W]``, not all False.
        margin: share of the side.

    Returns:
        top, left, height, width: pixels.
    """
    ends = [places.aminmax() for places in (visible.any(dim=one).nonzero() for one in (1, 0))]
    extent = max(int(last - first) for first, last in ends) + 1
    side = round(extent * (1 + 2 * margin))
    starts, lengths = [], []
    for (first, last), size in zip(ends, visible.shape, strict=True):
        length = min(size, side)
        start = (int(first + last) + 1 - length) // 2
        starts.append(min(max(start, 0), size - length))
        lengths.append(length)
    return starts[0], starts[1], lengths[0], lengths[1]


def preprocess(image: Tensor, model: Any) -> Tensor:
    """An image ``[3, H, W]`` in [0, 1] as the CLIP model expects it: resized (antialiased) and normalised.

    Of an image that is not as wide as it is high nothing is cut off: it is squeezed.
    """
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


def load_clip(
    model: str, pretrained: str, device: torch.device, prefix: str = "", local_files_only: bool = False
) -> tuple[Any, Any]:
    """A frozen open_clip model and its tokenizer, of safetensors and JSON files; no code of theirs is run.

    Where models are kept loaded (``icekit.loaded``) it is loaded once.

    Args:
        model: a name of ``open_clip.list_models()``, ``hf-hub:OWNER/NAME``, ``local-dir:PATH``, a folder or
            ``package:NAME/FOLDER``, a folder inside an installed package.
        pretrained: a tag of that name's weights, or a ``.safetensors`` file; ignored for folders and the hub.
        device: where it runs.
        prefix: of the settings ``model`` and ``pretrained`` in messages.
        local_files_only: of the hub use the cache alone.

    Raises:
        InputError: no such model, weights or folder, damaged ones, or the hub does not give them.
        RunError: it cannot be built, or gives NaN or infinity.
    """
    key = ("clip", model, pretrained, str(device))
    return loaded(key, lambda: _load_clip(model, pretrained, device, prefix, local_files_only))


def _load_clip(model: str, pretrained: str, device: torch.device, prefix: str, local: bool) -> tuple[Any, Any]:
    import open_clip

    setting = f"retriever.{prefix}"
    found = _find(model, pretrained, setting, local)
    try:
        text = _checked_text(found)
        made = open_clip.create_model_from_pretrained(
            found.name,
            pretrained=found.weights,
            device=device,
            weights_only=True,
            return_transform=False,
            **found.preprocessing,
            **({"text_cfg": text} if text else {}),
        )
        made = made.requires_grad_(False).eval()
        tokenizer = _load_tokenizer(found)
        _try_out(made, tokenizer, device)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except RunError as error:
        raise RunError(f"CLIP model {model}: {error}") from error
    except Exception as error:  # open_clip, transformers, the file system: each fails in its own way
        reason = one_line(error)
        if isinstance(error, InputError):
            raise InputError(reason if reason.startswith(found.named) else f"{found.named}: {reason}") from error
        if found.folder:
            raise InputError(f"{found.named}: {reason}") from error
        raise RunError(f"CLIP model {model} ({found.weights}) cannot be loaded: {reason}") from error
    return made, tokenizer


@dataclass(frozen=True)
class _Found:
    """A CLIP model's files, checked.

    named: how messages begin.
    name: as open_clip takes it.
    configuration: its ``model_cfg``.
    folder: where its files are; None for an architecture that open_clip has itself.
    tokenizer: the folder of transformers' tokenizer; None for a tokenizer of open_clip's own, or one of the hub.
    weights: a safetensors file, where the name does not say.
    preprocessing: what the images of these weights are normalised with, where the name does not say.
    local: of the hub the cache alone is used.
    """

    named: str
    name: str
    configuration: dict[str, Any]
    folder: Path | None = None
    tokenizer: Path | None = None
    weights: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    local: bool = False

    @property
    def text(self) -> dict[str, Any]:
        text: dict[str, Any] = self.configuration["text_cfg"]
        return text


def _find(model: str, pretrained: str, setting: str, local_files_only: bool) -> _Found:
    """Where a CLIP model's files are, fetched and checked before open_clip sees them."""
    import open_clip

    hub = model.startswith("hf-hub:")
    folder = Path() if hub else resolved_path(model.removeprefix("local-dir:"), f"{setting}model")
    local = not hub and (
        model.startswith(("local-dir:", PREFIX)) or (model not in open_clip.list_models() and folder.is_dir())
    )
    if not (hub or local):
        return _find_named(model, pretrained, setting, local_files_only)
    if local:
        named = f"{setting}model: {model} is not a folder that open_clip can load"
        if not folder.is_dir():
            raise InputError(f"{setting}model: no such folder: {model}")
        if not (folder / CONFIGURATION).exists():
            raise InputError(f"{setting}model: {model} is no open_clip folder: it has no {CONFIGURATION}")
        weights = weights_in(folder, f"{setting}model: {model}")
    else:
        named = f"{setting}model: {model} cannot be loaded"
        named_at_first = f"{setting}model: {model}:"
        name = model.removeprefix("hf-hub:")
        repository = Hub(name, CONFIGURATION, named_at_first, WAYS_OUT, local_files_only=local_files_only)
        weights = repository.file(HUB_WEIGHTS)
        folder = repository.folder(TOKENIZER_FILES)
    check_folder(folder, named)
    configuration = read_json(folder / CONFIGURATION, named).get("model_cfg")
    where = f"{named}: {CONFIGURATION}"
    if not isinstance(configuration, dict):
        raise InputError(f"{where}: its model_cfg should be a JSON object")
    for part in ("text_cfg", "vision_cfg"):
        if not isinstance(configuration.get(part), dict):
            raise InputError(f"{where}: its model_cfg.{part} should be a JSON object")
    check_counts(configuration, count_tensors(weights, named), where)
    tokenizer = folder if local else None
    return _Found(named, f"local-dir:{folder}", configuration, folder, tokenizer, local=local_files_only)


def weights_in(folder: Path, named: str) -> Path:
    """The safetensors file that open_clip reads from a folder.

    Raises:
        InputError: there is none, or open_clip might read another: it prefers names to formats.
    """
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"):
        if (folder / name).exists():
            return folder / name
    weights = sorted(folder.glob("*.safetensors"))
    others = sorted(path.name for ending in PICKLED for path in folder.glob(f"*{ending}"))
    if not weights:
        raise InputError(f"{named} has no weights as .safetensors (pickled weights are not loaded)")
    if others or len(weights) > 1:
        raise InputError(
            f"{named} has several weights ({', '.join([*(path.name for path in weights), *others])}): "
            f"name the right .safetensors file {HUB_WEIGHTS}"
        )
    return weights[0]


def _find_named(model: str, pretrained: str, setting: str, local_files_only: bool) -> _Found:
    """A name of open_clip with a tag of its weights or a file."""
    import open_clip

    _check_name(setting, model, pretrained)
    configuration = open_clip.get_model_config(model.replace("/", "-"))
    named = f"{setting}pretrained: {model} with weights {pretrained!r}"
    tag = open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained)
    if not tag:
        file = resolved_path(pretrained, f"{setting}pretrained")
        count_tensors(file, named)
        return _Found(named, model, configuration, weights=str(file), local=local_files_only)
    place = safe_weights(tag)
    if place is None:
        raise InputError(f"{named}: they are pickled, and pickled weights are not loaded; take another tag")
    ways_out = f"{WAYS_OUT}; weights that are pickled alone are not loaded: take another tag then"
    hub = Hub(*place, f"{named}:", ways_out, local_files_only=local_files_only)
    count_tensors(hub.first, named)
    normalised = {f"image_{key}": tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key)}
    return _Found(named, model, configuration, weights=str(hub.first), preprocessing=normalised, local=local_files_only)


def safe_weights(tag: Mapping[str, Any]) -> tuple[str, str] | None:
    """Where on the hub a tag of open_clip has safetensors weights: repository and file; None where it has pickles.

    tag: open_clip's entry for it, whose ``hf_hub`` is ``OWNER/NAME/`` or ``OWNER/NAME/FILE``.
    """
    repository, _, name = str(tag.get("hf_hub") or "").rpartition("/")
    if not repository:
        return None
    if name in ("", "open_clip_pytorch_model.bin"):
        return repository, HUB_WEIGHTS
    return repository, str(Path(name).with_suffix(".safetensors"))


def _checked_text(found: _Found) -> dict[str, Any]:
    """The text encoder's configuration where it is a model of transformers, to be built of checked files alone.

    Empty for a text encoder of open_clip's own.
    """
    vision = found.configuration["vision_cfg"].get("timm_model_name")
    if vision is not None and not (isinstance(vision, str) and ":" not in vision):
        raise InputError(f"{CONFIGURATION}: vision_cfg.timm_model_name should be a name of timm's, and is {vision!r}")
    options = found.text.get("tokenizer_kwargs", {})
    unknown = sorted(set(options) - set(TOKENIZER_OPTIONS)) if isinstance(options, dict) else [repr(options)]
    if unknown:
        raise InputError(
            f"{CONFIGURATION}: text_cfg.tokenizer_kwargs can have {', '.join(TOKENIZER_OPTIONS)}, not {unknown[0]}"
        )
    name = found.text.get("hf_model_name")
    if not name:
        return {}
    if not isinstance(name, str) or Path(name).exists():
        raise InputError(f"{CONFIGURATION}: text_cfg.hf_model_name should be the owner/name of a hub model: {name!r}")
    named = f"{found.named}: its text encoder {name}:"
    file = Hub(name, "config.json", named, WAYS_OUT, local_files_only=found.local).first
    read_json(file, found.named)
    return {**found.text, "hf_model_name": str(file.parent), "hf_model_pretrained": False}


def _load_tokenizer(found: _Found) -> Any:
    """The model's tokenizer, whose files were looked at."""
    import open_clip

    name = found.text.get("hf_tokenizer_name")
    if not name:
        return open_clip.get_tokenizer(found.name)
    folder = found.tokenizer
    if folder is None:
        named = f"{found.named}: its tokenizer {name}"
        hub = Hub(str(name), "tokenizer_config.json", f"{named}:", WAYS_OUT, local_files_only=found.local)
        folder = hub.folder(TOKENIZER_FILES)
        check_folder(folder, named)
    return open_clip.tokenizer.HFTokenizer(
        str(folder),
        context_length=found.text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=found.text.get("tokenizer_mode"),
        trust_remote_code=False,
        local_files_only=True,
        **found.text.get("tokenizer_kwargs", {}),
    )


@torch.no_grad()
def _try_out(model: Any, tokenizer: Any, device: torch.device) -> None:
    """Embed a text and an image once: what does not fit together shows here.

    Raises:
        InputError: the tokenizer is another model's.
        RunError: it gives NaN or infinity.
    """
    tower = getattr(model, "text", model)
    embedding = getattr(tower, "token_embedding", None)
    rows = tower.vocab_size if embedding is None else embedding.num_embeddings
    size = len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size
    check_vocabulary(size, rows, *tokenizer(["cup", "ball"]).tolist())
    advice = "its weights are damaged: get the model again"
    check_finite(model.encode_text(tokenizer(["a cup"]).to(device)), "CLIP's text encoder", advice)
    image = preprocess(torch.zeros(3, 8, 8), model)[None].to(device)
    check_finite(model.encode_image(image), "CLIP's image encoder", advice)


def _check_name(setting: str, model: str, pretrained: str) -> None:
    import open_clip

    names = open_clip.list_models()
    if model.replace("/", "-") not in names:
        hint = _nearest(model, names) or "a folder, hf-hub:OWNER/NAME or a name of open_clip.list_models()"
        raise InputError(f"{setting}model: there is no {model!r}; it can be {hint}")
    tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    if open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained):
        return
    if pretrained.endswith(".safetensors") and resolved_path(pretrained, f"{setting}pretrained").is_file():
        return
    hint = _nearest(pretrained, tags) or ", ".join(tags) or "a .safetensors file: open_clip has no weights for it"
    raise InputError(f"{setting}pretrained: {model} has no weights {pretrained!r}; they can be {hint}")


def _nearest(given: str, known: Sequence[str]) -> str:
    lower = {name.lower(): name for name in known}
    return " or ".join(lower[name] for name in difflib.get_close_matches(given.lower(), lower, n=3, cutoff=0.5))
