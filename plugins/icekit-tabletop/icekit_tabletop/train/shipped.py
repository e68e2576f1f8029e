"""The `continue` stage: the shipped weights as checkpoints, so that more training starts where the last ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel

from icekit_tabletop.train.alignment import build_eyes
from icekit_tabletop.train.checkpoint import append_log, save_state
from icekit_tabletop.train.export import HISTORY
from icekit_tabletop.train.settings import Settings


def _checkpoint(path: Path, weights: dict[str, Tensor], seen: int, **extra: float) -> None:
    whole = {name: (t.float() if t.is_floating_point() else t) for name, t in weights.items()}
    state = {f"{part}/{name}": tensor for part in ("weights", "average") for name, tensor in whole.items()}
    save_state(path, state, {"seen": seen, "step": 0, "minutes": 0.0, "extra": extra})


def continue_models(settings: Settings) -> None:
    """Writes `<work>/<stage>.safetensors` of every stage from `<models>`, where they do not exist yet. The optimisers
    start afresh; the samples seen are carried on.

    Raises ``FileNotFoundError`` when the models folder is not complete.
    """
    torch.manual_seed(settings.seed)
    folder = settings.models / "stable-diffusion"
    seen = json.loads((settings.models / HISTORY).read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    clip = load_file(str(settings.models / "open-clip" / "open_clip_model.safetensors"))
    painter = {
        "unet": load_file(str(folder / "unet" / "diffusion_pytorch_model.safetensors")),
        "text": CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict(),
        "eyes": build_eyes().state_dict(),  # not shipped: they start afresh
    }
    autoencoder = load_file(str(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    tower = {n.removeprefix("visual."): t for n, t in clip.items() if n.startswith("visual.")}
    weights = {
        "clip": clip,
        "clip-image": tower,
        "clip-regions": tower,
        "vae": autoencoder,
        "decoder": {n: t for n, t in autoencoder.items() if n.startswith(("decoder.", "post_quant_conv."))},
        "unet": {f"{part}.{n}": t for part, tensors in painter.items() for n, t in tensors.items()},
    }
    for stage, tensors in weights.items():
        target = settings.work / f"{stage}.safetensors"
        if target.exists():
            print(f"continue: {target} exists and stays", file=sys.stderr)
            continue
        extra = {"scaling_factor": vae["scaling_factor"]} if stage == "vae" else {}
        _checkpoint(target, tensors, seen.get(stage, 0), **extra)
        append_log(settings.work, stage="continue", model=stage, seen=seen.get(stage, 0))
