"""A CLIP model of open_clip: the eyes of retrievers and metrics."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.package_paths import PREFIX, package_path
from icekit.protocols import InputError, RunError, View

TEXT_BATCH = 256
"""Prompts encoded at once."""

CROP_MARGIN = 0.1
"""A crop is wider than the visible part by this share of its side, on every side."""


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


def load_clip(model: str, pretrained: str, device: torch.device, prefix: str = "") -> tuple[Any, Any]:
    """A frozen open_clip model and its tokenizer. Weights are read as tensors only, never as pickled programs.

    Args:
        model: a name of ``open_clip.list_models()``, ``hf-hub:OWNER/NAME``, ``local-dir:PATH``, a folder or
            ``package:NAME/FOLDER``, a folder inside an installed package.
        pretrained: a tag of that name's weights, or a ``.safetensors`` file; ignored for folders and the hub.
        device: where it runs.
        prefix: of the settings ``model`` and ``pretrained`` in messages.

    Raises:
        InputError: no such model, weights or folder.
        RunError: the weights cannot be fetched.
    """
    import open_clip

    setting = f"retriever.{prefix}"
    folder = Path(package_path(model.removeprefix("local-dir:"), f"{setting}model")).expanduser()
    local = model.startswith(("local-dir:", PREFIX)) or (folder.is_dir() and model not in open_clip.list_models())
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
