"""The `export` stage: the latest weights in the folder formats of open_clip and diffusers, in half precision."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

from icekit_tabletop.captions import WORDS
from icekit_tabletop.tokenizer import build_tokenizer, save_tokenizer
from icekit_tabletop.train.checkpoint import append_log, load_info, load_state
from icekit_tabletop.train.clip import clip_config
from icekit_tabletop.train.settings import Settings
from icekit_tabletop.train.text_tower import build_text_encoder
from icekit_tabletop.train.unet import SCHEDULE, build_painter
from icekit_tabletop.train.vae import load_vae

MAX_BYTES = 40_000_000

TRAINED = ("clip", "clip-image", "vae", "decoder", "unet", "clip-regions")
"""The stages that leave a checkpoint."""

REGION_SHARE = 0.4
"""How far the exported image tower goes from `clip-image` to `clip-regions`, in weights (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models"): almost all that the second learned of regions, and little lost of whole scenes.
"""

HISTORY = "history.json"
"""File of the models folder: training samples seen by stage."""


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler of the exported pipeline."""
    options: dict[str, Any] = {
        **SCHEDULE,
        "algorithm_type": "dpmsolver++",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    }
    return DPMSolverMultistepScheduler(**options)


def write_clip(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
    """An open_clip folder, for `open_clip.create_model_and_transforms("local-dir:<folder>")`, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in weights.items()}
    save_file(half, str(folder / "open_clip_model.safetensors"), metadata={"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps(config or clip_config(), indent=2) + "\n")
    save_tokenizer(folder, WORDS)


def write_diffusion(folder: Path, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """A Stable Diffusion folder, for `StableDiffusionPipeline.from_pretrained(<folder>)`, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(folder / "tokenizer", WORDS)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    # Transformers loads weights in the type its configuration names, diffusers in float32: one type, or the loaded
    # pipeline would mix two.
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text()) | {"dtype": "float32"}
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def _swap(fresh: Path, target: Path) -> None:
    """Puts a finished folder in the place of an older one."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    for path in fresh.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes for the owner alone
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def _image_tower(work: Path) -> dict[str, Tensor]:
    """The image tower's weights as the last of its stages left it; none when it had no stage of its own."""
    before, after = work / "clip-image.safetensors", work / "clip-regions.safetensors"
    if not before.exists():
        return {}
    tower, _ = load_state(before, "average/")
    if not after.exists():
        return tower
    seen_regions, _ = load_state(after, "average/")
    return {
        name: tensor.lerp(seen_regions[name], REGION_SHARE) if tensor.is_floating_point() else seen_regions[name]
        for name, tensor in tower.items()
    }


def export_models(settings: Settings) -> None:
    """Writes `<models>/open-clip`, and `<models>/stable-diffusion` once all its parts have a checkpoint.

    Raises ``FileNotFoundError`` when not even the image-text model has one.
    """
    clip_path = settings.work / "clip.safetensors"
    if not clip_path.exists():
        raise FileNotFoundError(f"nothing to export: {clip_path} does not exist")
    clip_weights, _ = load_state(clip_path, "average/")
    clip_weights |= {f"visual.{name}": tensor for name, tensor in _image_tower(settings.work).items()}
    settings.models.mkdir(parents=True, exist_ok=True)
    fresh = settings.models / f".fresh-{os.getpid()}"
    try:
        write_clip(fresh, clip_weights)
        _swap(fresh, settings.models / "open-clip")
        unet_path = settings.work / "unet.safetensors"
        if unet_path.exists():
            painter = build_painter(build_text_encoder(clip_weights, build_tokenizer())).eval()
            painter.load_state_dict(load_state(unet_path, "average/")[0])
            with torch.no_grad():
                write_diffusion(fresh, painter["text"], load_vae(settings), painter["unet"])
            _swap(fresh, settings.models / "stable-diffusion")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    size = sum(path.stat().st_size for path in settings.models.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise RuntimeError(f"the models take {size} bytes, more than the {MAX_BYTES} the package may hold")
    checkpoints = {stage: settings.work / f"{stage}.safetensors" for stage in TRAINED}
    seen = {stage: load_info(path)["seen"] for stage, path in checkpoints.items() if path.exists()}
    history = settings.models / HISTORY
    earlier = json.loads(history.read_text()) if history.exists() else {}
    history.write_text(json.dumps(earlier | seen, indent=2) + "\n")
    append_log(settings.work, stage="export", bytes=size, **seen)
    print(f"exported to {settings.models}: {size / 1e6:.1f} MB, samples seen: {seen}", file=sys.stderr)
