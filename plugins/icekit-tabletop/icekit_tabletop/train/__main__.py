"""`python -m icekit_tabletop.train [STAGE...] --work DIR`: trains the tabletop's models, one stage after the other."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from icekit_tabletop.train.settings import MODELS_FOLDER, Settings

STAGES: dict[str, tuple[str, str]] = {
    "data": ("data", "render_data"),
    "clip": ("clip", "train_clip"),
    "clip-image": ("image_tower", "train_image_tower"),
    "vae": ("vae", "train_vae"),
    "latents": ("latents", "encode_latents"),
    "decoder": ("vae", "train_decoder"),
    "unet": ("unet", "train_unet"),
    "regions": ("regions", "find_regions"),
    "clip-regions": ("image_tower", "train_on_regions"),
    "export": ("export", "export_models"),
}
"""Each stage's module and function, in the order of a full training."""

CONTINUE = {"continue": ("shipped", "continue_models")}
"""The stage that takes the shipped weights as a beginning; only by name."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = Settings(work=Path())
    parser = argparse.ArgumentParser(
        prog="python -m icekit_tabletop.train",
        description="Train the tabletop's models. Every stage continues where it was stopped.",
    )
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"of {', '.join(STAGES)}; none: all, in this order. `continue` first starts from the shipped weights",
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of data, checkpoints and log")
    parser.add_argument("--models", type=Path, default=MODELS_FOLDER, help="folder the export writes to")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="processor threads of a stage")
    parser.add_argument("--processes", type=int, default=defaults.processes, help="processes that render")
    parser.add_argument("--images", type=int, default=defaults.images, help="scenes to render")
    parser.add_argument("--clip-images", type=int, default=defaults.clip_images, help="samples clip sees")
    parser.add_argument(
        "--clip-tower-images", type=int, default=defaults.clip_tower_images, help="samples clip-image sees"
    )
    parser.add_argument("--vae-images", type=int, default=defaults.vae_images, help="samples vae sees")
    parser.add_argument("--decoder-images", type=int, default=defaults.decoder_images, help="samples decoder sees")
    parser.add_argument("--unet-images", type=int, default=defaults.unet_images, help="samples unet sees")
    parser.add_argument("--unet-batch", type=int, default=defaults.unet_batch, help="samples a step of unet")
    parser.add_argument("--unet-rate", type=float, default=defaults.unet_rate, help="learning rate of unet")
    parser.add_argument("--unet-workers", type=int, default=defaults.unet_workers, help="processes that draw for unet")
    parser.add_argument(
        "--region-scenes", type=int, default=defaults.region_scenes, help="scenes whose objects regions finds"
    )
    parser.add_argument(
        "--clip-region-images", type=int, default=defaults.clip_region_images, help="samples clip-regions sees"
    )
    parser.add_argument("--minutes", type=float, help="stop a stage after this much training, restarts included")
    parser.add_argument("--until", metavar="HH:MM", help="stop a stage at this time of day (UTC)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the stages asked for. Returns the exit status; 130 after Ctrl-C, with everything saved."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    stages = options.pop("stages") or list(STAGES)
    known = STAGES | CONTINUE
    unknown = [stage for stage in stages if stage not in known]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}: choose of {', '.join(known)}")
    settings = Settings(**options)
    settings.work.mkdir(parents=True, exist_ok=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        for stage in stages:
            module, function = known[stage]
            getattr(importlib.import_module(f"icekit_tabletop.train.{module}"), function)(settings)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
