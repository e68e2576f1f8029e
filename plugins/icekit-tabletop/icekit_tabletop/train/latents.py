"""The `latents` stage: every training picture and its mirror image encoded once."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
from tqdm import tqdm

from icekit_tabletop.train.checkpoint import append_log
from icekit_tabletop.train.data import load_scenes
from icekit_tabletop.train.settings import Settings, autocast
from icekit_tabletop.train.vae import load_vae

BATCH = 100


@torch.no_grad()
def encode_latents(settings: Settings) -> None:
    """Writes `<work>/latents.npy`: float16 [2, N, 4, 16, 16], posterior means times the scaling factor; first the
    pictures, then their mirror images. Skipped when the file has as many scenes as there are.

    A mirror image is encoded for itself: the autoencoder is not exactly symmetric.
    """
    device = settings.torch_device
    scenes = load_scenes(settings.work)
    count = len(scenes.images)
    path = settings.work / "latents.npy"
    if path.exists() and np.load(path, mmap_mode="r", allow_pickle=False).shape[1] == count:
        return
    vae = load_vae(settings).to(device).to(memory_format=torch.channels_last)
    scale = float(vae.config.scaling_factor)
    latents = np.empty((2, count, 4, 16, 16), dtype=np.float16)
    with tqdm(total=2 * count, desc="latents", unit="img", file=sys.stderr, mininterval=5) as bar:
        for start in range(0, count, BATCH):
            pixels = torch.from_numpy(scenes.images[start : start + BATCH]).to(device).float().div_(127.5).sub_(1)
            for side in range(2):
                view = (pixels if side == 0 else pixels.flip(-1)).contiguous(memory_format=torch.channels_last)
                with autocast(device):
                    mean = vae.encode(view).latent_dist.mean
                latents[side, start : start + BATCH] = (mean.float() * scale).cpu().numpy().astype(np.float16)
                bar.update(len(view))
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as out:
        np.save(out, latents, allow_pickle=False)
    os.replace(temporary, path)
    append_log(settings.work, stage="latents", seen=count, deviation=round(float(latents.astype(np.float32).std()), 4))
