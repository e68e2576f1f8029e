"""Image encoders that metrics compare pictures with: CLIP through open_clip, DINO through transformers."""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icekit.clip import ClipModel
from icekit.model_files import (
    HUB_ID,
    Hub,
    check_counts,
    check_folder,
    count_weights,
    from_safetensors,
    one_line,
    read_json,
)
from icekit.paths import resolved_path
from icekit.protocols import InputError

REMEMBERED = 4096
"""Embeddings kept: several metrics look at the same pictures."""
BATCH = 32


class ImageEncoder:
    """Pictures -> embeddings. ``encode``: float32 ``[B, 3, H, W]`` in [0, 1] -> ``[B, D]``."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self._encode = encode
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    @torch.no_grad()
    def embed(self, images: Sequence[Tensor]) -> Tensor:
        """Pictures, float32 ``[3, H, W]`` in [0, 1] each -> float32 ``[N, D]`` on the CPU, each of length one."""
        keys = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._known}
        embedded = dict(self._known)
        for start in range(0, len(new), BATCH):
            part = list(new)[start : start + BATCH]
            rows = F.normalize(self._encode(torch.stack([new[key] for key in part])).float(), dim=-1).cpu()
            embedded |= dict(zip(part, rows, strict=True))
        for key in new:
            self._known[key] = embedded[key]
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return torch.stack([embedded[key] for key in keys])


@functools.lru_cache(maxsize=4)
def clip_model(model: str, pretrained: str, device: torch.device) -> ClipModel:
    """A CLIP model (Radford et al., 2021), loaded once for all metrics.

    Raises:
        InputError: no such model, weights or folder.
        RunError: the weights cannot be fetched.
    """
    try:
        return ClipModel(model, pretrained, device)
    except InputError as error:  # the retriever calls these settings by other names
        message = str(error).replace("retriever.model", "metric.clip")
        raise InputError(message.replace("retriever.pretrained", "metric.pretrained")) from error


@functools.lru_cache(maxsize=4)
def clip_encoder(model: str, pretrained: str, device: torch.device) -> ImageEncoder:
    """Its image encoder. Raises as ``clip_model``."""
    clip = clip_model(model, pretrained, device)
    return ImageEncoder(lambda images: clip.embed_images(list(images)))


@functools.lru_cache(maxsize=4)
def dino_encoder(model: str, device: torch.device) -> ImageEncoder:
    """A DINO vision transformer's class token (Caron et al., 2021; Oquab et al., 2023), loaded once for all metrics.

    Args:
        model: an id of the hub or a folder in transformers' format, with safetensors weights.
        device: where it runs.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoImageProcessor, AutoModel

    named = f"metric.dino: {model}"
    folder = resolved_path(model, "metric.dino")
    if not folder.is_dir():
        if not HUB_ID.fullmatch(model):
            raise InputError(f"{named} is no vision transformer's folder, and no id of a hub model (owner/name)")
        ways_out = (
            "give a folder, or the id of a model that was downloaded before (HF_HUB_OFFLINE=1 then uses the cache)"
        )
        hub = Hub(model, "config.json", f"{named}: there is no such folder, and", ways_out)
        folder = hub.folder(("config.json", "preprocessor_config.json", "model*.safetensors", "model*.json"))
    check_folder(folder, named)
    configuration = read_json(folder / "config.json", named)
    check_counts(configuration, count_weights(folder, "model", None, named), f"{named}: config.json")
    try:
        processor: Any = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        # Its pooler is not looked at.
        loaded = from_safetensors(AutoModel, folder, named, without="pooler", trust_remote_code=False)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # transformers, torch, the file system: each fails in its own way
        raise InputError(
            f"{named} is no vision transformer's folder or hub id that can be loaded: {one_line(error)}"
        ) from error
    loaded = loaded.to(device).requires_grad_(False).eval()

    def encode(images: Tensor) -> Tensor:
        inputs = processor(images=list(images), do_rescale=False, return_tensors="pt")
        embedded: Tensor = loaded(pixel_values=inputs["pixel_values"].to(device)).last_hidden_state[:, 0]
        return embedded

    return ImageEncoder(encode)
