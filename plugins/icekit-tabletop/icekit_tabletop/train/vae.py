"""The `vae` stage: a diffusers `AutoencoderKL` that shrinks 64-pixel pictures to 4-channel latents of 16x16; and the
`decoder` stage, which trains its decoder on while the latents, and so the UNet, stay what they are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from icekit_tabletop.train.checkpoint import Run, load_state
from icekit_tabletop.train.data import load_scenes, mirror
from icekit_tabletop.train.perceptual import ImageFeatures, perceptual_distance
from icekit_tabletop.train.settings import IMAGE_SIZE, Settings, autocast

BATCH = 16
PEAK_RATE = 2e-3
DECODER_RATE = 1e-3
WARMUP_STEPS = 100
KL_WEIGHT = 1e-5

PERCEPTUAL_WEIGHT = 0.5
"""Weight of `perceptual_distance` in the decoder's loss: gloss, grain and speckle, which tell materials apart, are
small in the error of pixels.
"""


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """The untrained autoencoder. `scaling_factor` times a latent has unit variance."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
    )


def load_vae(settings: Settings) -> AutoencoderKL:
    """The averaged autoencoder of the latest checkpoints, in evaluation mode, its scaling factor set."""
    weights, info = load_state(settings.work / "vae.safetensors", "average/")
    decoder = settings.work / "decoder.safetensors"
    if decoder.exists():
        weights |= load_state(decoder, "average/")[0]
    vae = build_vae(float(info["extra"].get("scaling_factor", 1.0)))
    vae.load_state_dict(weights)
    return vae.eval()


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def _picture_loss(decoded: Tensor, pixels: Tensor) -> tuple[Tensor, float]:
    """Absolute and squared error, and the error of the edges. Also returns the PSNR in dB; pixels in -1..1."""
    error = decoded.float() - pixels
    squared = error.square().mean()
    edges = sum(part.abs().mean() for part in _edges(error))
    # Pixels span 2, hence the factor 4.
    return error.abs().mean() + squared + 0.25 * edges, 10 * math.log10(4 / max(1e-8, squared.item()))


def train_decoder(settings: Settings) -> None:
    """Trains the decoder on `settings.decoder_images` samples; weights go to `<work>/decoder.safetensors`."""
    device = settings.torch_device
    torch.manual_seed(settings.seed)
    scenes = load_scenes(settings.work)
    latents = np.load(settings.work / "latents.npy", mmap_mode="r", allow_pickle=False)
    vae = load_vae(settings).to(device).to(memory_format=torch.channels_last)
    scale = float(vae.config.scaling_factor)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    features = ImageFeatures(settings).to(device)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=DECODER_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    with Run(settings, "decoder", decoder, optimiser, settings.decoder_images, 0.998) as run:
        rng = np.random.default_rng([settings.seed, run.step, 5])
        decoder.train()
        while not run.finished:
            run.set_cosine_rate(DECODER_RATE, WARMUP_STEPS)
            rows = np.sort(rng.integers(len(scenes.images), size=BATCH))
            flips = rng.random(BATCH) < 0.5
            pixels = torch.from_numpy(mirror(scenes.images[rows], flips)).to(device).float().div_(127.5).sub_(1)
            codes = torch.from_numpy(latents[flips.astype(int), rows].astype(np.float32)).to(device) / scale
            with autocast(device):
                decoded = vae.decode(codes.contiguous(memory_format=torch.channels_last)).sample
                with torch.no_grad():
                    true = features(pixels)
                perceptual = perceptual_distance(features(decoded.float()), true)
            picture, psnr = _picture_loss(decoded, pixels)
            loss = picture + PERCEPTUAL_WEIGHT * perceptual
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimiser.step()
            run.advance(BATCH, {"loss": loss.item(), "psnr": psnr, "perceptual": perceptual.item()})


def train_vae(settings: Settings) -> None:
    """Trains the autoencoder on `settings.vae_images` samples; weights go to `<work>/vae.safetensors`."""
    device = settings.torch_device
    torch.manual_seed(settings.seed)
    scenes = load_scenes(settings.work)
    vae = build_vae().to(device).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    with Run(settings, "vae", vae, optimiser, settings.vae_images, 0.995) as run:
        rng = np.random.default_rng([settings.seed, run.step, 2])
        vae.train()
        first = run.step
        while not run.finished:
            run.set_cosine_rate(PEAK_RATE, WARMUP_STEPS)
            rows = rng.integers(len(scenes.images), size=BATCH)
            batch = mirror(scenes.images[rows], rng.random(BATCH) < 0.5)
            pixels = torch.from_numpy(batch).to(device).float().div_(127.5).sub_(1)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            with autocast(device):
                posterior = vae.encode(pixels).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            picture, psnr = _picture_loss(decoded, pixels)
            kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
            # The clamp keeps one bad early batch from an outsized step.
            loss = picture + KL_WEIGHT * kl.clamp(max=1e4)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimiser.step()
            deviation = float(posterior.mean.detach().float().std())
            kept = run.extra.get("scaling_factor")
            run.extra["scaling_factor"] = 1 / deviation if kept is None else 0.99 * kept + 0.01 / deviation
            run.advance(BATCH, {"loss": loss.item(), "psnr": psnr, "kl": kl.item()})
        if run.step > first:  # else the latents in use keep their scale
            run.extra["scaling_factor"] = measure_scaling(vae, run.average.state, scenes.images, rng)


@torch.no_grad()
def measure_scaling(
    vae: AutoencoderKL, weights: dict[str, Tensor], images: np.ndarray, rng: np.random.Generator
) -> float:
    """1 / standard deviation of the latents of some images (uint8 [N, 3, H, W]) under the given weights."""
    measured = build_vae().to(next(vae.parameters()).device)
    measured.load_state_dict(weights)
    rows = rng.integers(len(images), size=256)
    pixels = torch.from_numpy(images[rows]).to(next(measured.parameters()).device).float().div_(127.5).sub_(1)
    means = torch.cat([measured.eval().encode(part).latent_dist.mean for part in pixels.split(64)])
    return 1.0 / float(means.std())


def image_quality(decoded: Tensor, pixels: Tensor) -> float:
    """Mean PSNR in dB over a batch of images in -1..1, [B, 3, H, W]."""
    error = F.mse_loss(decoded.clamp(-1, 1), pixels, reduction="none").mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())
