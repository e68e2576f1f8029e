"""The `clip` stage: an open_clip model (a small ResNet, a small text transformer) trained on pictures and captions."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from icekit_tabletop.captions import WORDS, Caption, caption_scene
from icekit_tabletop.tokenizer import MAX_LENGTH, build_tokenizer, build_vocabulary
from icekit_tabletop.train.checkpoint import Run
from icekit_tabletop.train.data import COUNT_SHARES, TrainingScenes, caption_truth, load_scenes
from icekit_tabletop.train.settings import Settings, autocast

CLIP_SIZE = 128
"""Pixels along each side of what the image tower sees: it halves five times, and objects must stay apart."""

BATCH = 256
PEAK_RATE = 2e-3
WARMUP_STEPS = 60


def clip_config() -> dict[str, Any]:
    """Contents of `open_clip_config.json`: the model and its preprocessing."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": CLIP_SIZE, "layers": [1, 1, 1, 1], "width": 24, "patch_size": None},
            "text_cfg": {
                "context_length": MAX_LENGTH,
                "vocab_size": len(build_vocabulary(WORDS)[0]),
                "hf_tokenizer_name": ".",
                "width": 128,
                "heads": 4,
                "layers": 4,
            },
        },
        "preprocess_cfg": {
            "size": CLIP_SIZE,
            "mode": "RGB",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def build_clip() -> open_clip.CLIP:
    """The untrained model."""
    return open_clip.CLIP(**clip_config()["model_cfg"])


def encode_captions(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Normalised text embeddings, [B, 128], of int64 tokens [B, 40].

    Columns that hold only padding in every row are left out: attention is causal, so they cannot change the rest.
    """
    length = int((tokens != tokens[:, -1:].max()).sum(1).max()) + 1
    tokens = tokens[:, : min(length, tokens.shape[1])]
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    x = model.transformer(x, attn_mask=model.attn_mask[: tokens.shape[1], : tokens.shape[1]])
    x = model.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(-1)]
    return F.normalize((x @ model.text_projection).float(), dim=-1)


def augment(images: np.ndarray, rng: np.random.Generator, *, erase_rate: float = 0.2) -> np.ndarray:
    """Flips, shifts by up to five pixels and, at `erase_rate`, a rectangle wiped out, so that a picture with an erased
    region is nothing foreign. uint8 [B, 3, H, W] to the same. Colours stay.
    """
    size = images.shape[-1]
    padded = np.pad(images, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="edge")
    out = np.empty_like(images)
    offsets = rng.integers(0, 11, size=(len(images), 2))
    flips = rng.random(len(images)) < 0.5
    for place, (down, across) in enumerate(offsets.tolist()):
        view = padded[place, :, down : down + size, across : across + size]
        out[place] = view[:, :, ::-1] if flips[place] else view
    for index in np.flatnonzero(rng.random(len(images)) < erase_rate).tolist():
        height, width = rng.integers(10, 30, size=2).tolist()
        top, left = int(rng.integers(0, size - height)), int(rng.integers(0, size - width))
        patch = out[index, :, top : top + height, left : left + width]
        kind = rng.integers(4)
        if kind == 0:
            patch[:] = 0
        elif kind == 1:
            patch[:] = 127
        elif kind == 2:
            patch[:] = out[index].mean((1, 2), keepdims=True).astype(np.uint8)
        else:  # what surrounds the hole, spread over it
            rim = out[index, :, max(0, top - 2) : top + height + 2, max(0, left - 2) : left + width + 2]
            patch[:] = np.median(rim.reshape(3, -1), axis=1).astype(np.uint8)[:, None, None]
    return out


def enlarge(images: Tensor) -> Tensor:
    """Images in -1..1, [B, 3, H, W], at the image tower's size."""
    return F.interpolate(images, size=CLIP_SIZE, mode="bicubic", align_corners=False).clamp_(-1, 1)


def _captions(scenes: TrainingScenes, rows: np.ndarray, rng: random.Random, fraction: float) -> list[Caption]:
    """Two captions of every row: first one that tends to be complete, then one that tends to leave things out."""
    full = [caption_scene(scenes.words[row], rng, 0.25) for row in rows]
    return full + [caption_scene(scenes.words[row], rng, 0.95 if fraction < 0.5 else 0.85) for row in rows]


def contrastive_loss(image: Tensor, text: Tensor, truth: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss of images [B, D] against k captions of each, [k*B, D], caption i being of image i modulo B.

    `truth`: bool [k*B, B], captions that are true of an image; a true pair that is not the drawn one is no negative.
    """
    batch = len(image)
    own = torch.arange(len(text), device=image.device) % batch
    logits = scale * text.float() @ image.float().T
    spurious = truth.clone()
    spurious[torch.arange(len(text), device=image.device), own] = False
    logits = logits.masked_fill(spurious, -1e4)
    to_image = F.cross_entropy(logits, own)
    target = torch.arange(batch, device=image.device)
    to_text = [F.cross_entropy(part.T, target) for part in logits.split(batch)]
    return 0.5 * to_image + 0.5 * sum(to_text) / len(to_text)


def train_clip(settings: Settings) -> None:
    """Trains the model on `settings.clip_images` samples; weights go to `<work>/clip.safetensors`."""
    device = settings.torch_device
    torch.manual_seed(settings.seed)
    scenes = load_scenes(settings.work)
    tokenizer = build_tokenizer()
    model = build_clip().to(device)
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "positional" in name or "token_emb" in name]
    plain_ids = {id(p) for p in plain}
    decayed = [p for p in model.parameters() if id(p) not in plain_ids]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    with Run(settings, "clip", model, optimiser, settings.clip_images, 0.998) as run:
        rng = np.random.default_rng([settings.seed, run.step, 1])
        words = random.Random(int(rng.integers(2**32)))
        model.train()
        while not run.finished:
            fraction = run.fraction
            run.set_cosine_rate(PEAK_RATE, WARMUP_STEPS)
            shares = (0.02, 0.9, 0.08, 0.0, 0.0) if fraction < 0.3 else COUNT_SHARES
            rows = scenes.sample_indices(rng, BATCH, shares)
            captions = _captions(scenes, rows, words, fraction)
            truth = torch.from_numpy(caption_truth(captions, scenes, rows)).to(device)
            encoded = tokenizer(
                [caption.text for caption in captions],
                padding="max_length",
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            )
            pixels = enlarge(torch.from_numpy(augment(scenes.images[rows], rng)).to(device).float().div_(127.5).sub_(1))
            with autocast(device):
                image = F.normalize(model.encode_image(pixels).float(), dim=-1)
                text = encode_captions(model, encoded["input_ids"].to(device))
            loss = contrastive_loss(image, text, truth, model.logit_scale.exp())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, math.log(100.0))
            run.advance(BATCH, {"loss": loss.item(), "scale": model.logit_scale.exp().item()})
