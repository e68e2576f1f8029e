"""The `unet` stage: a small Stable Diffusion UNet that denoises latents under the words of a caption.

CLIP's text tower learns along. Contrastive training reads a caption at its end token alone, so the states of the words
themselves, which the UNet reads, were never asked to say whose colour a colour is; the end token's state, which icekit
compares phrases by, is held where CLIP put it.

Beside the denoising loss there are three for what it teaches late: `grounding.py`, `contrast.py`, `alignment.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from icekit_tabletop.captions import Caption, caption_scene
from icekit_tabletop.tokenizer import MAX_LENGTH, build_tokenizer
from icekit_tabletop.train.alignment import Middle, alignment_loss, build_eyes
from icekit_tabletop.train.checkpoint import Run, load_state
from icekit_tabletop.train.contrast import contrast_loss, mistake
from icekit_tabletop.train.data import SceneWords, TrainingScenes, caption_truth, load_scenes, mirror
from icekit_tabletop.train.grounding import Queries, build_word_bank, grounding_loss
from icekit_tabletop.train.perceptual import ImageFeatures
from icekit_tabletop.train.settings import Settings, autocast
from icekit_tabletop.train.text_tower import build_text_encoder

BATCH = 24  # few samples are affordable on a processor: more, smaller steps learn more from them
PEAK_RATE = 3e-4
WARMUP_STEPS = 200
DECAY_SHARE = 0.15
"""Share of the training, at its end, over which the learning rate falls to nearly zero."""

TEXT_RATE = 0.3
"""The text tower's learning rate, as a share of the UNet's."""

HELD_WEIGHT = 1.0
"""Weight of the distance that the end token's states moved from CLIP's."""

CAPTION_DROPOUT = 0.15
"""Share of samples trained with the empty prompt, for classifier-free guidance."""

WORDS_ONLY = 0.8
"""Share of batches whose end token and padding are hidden from the UNet; see `audible`."""

SINGLES_SHARE = 0.3
"""Share of the training, at its start, that sees hardly more than one object a picture."""

GROUP_SHARES = (0.02, 0.38, 0.4, 0.17, 0.03)
"""Shares of pictures with 0 to 4 objects from then on."""

ONE_OF_MANY = 0.1
"""Share of the pictures with several objects whose caption names one of them alone: its words must find their own. When
it is larger, pictures painted of one object's name hold several."""

GROUNDING_WEIGHT = 0.02
"""Weight of `grounding_loss` beside the denoising loss."""

CONTRAST_WEIGHT = 2e-3
"""Weight of `contrast_loss`: the denoising loss is a mean over 1024 numbers, and that one is of a sum."""

CONTRASTED = 12
"""How many pictures of a batch, at most, are denoised under a wrong caption, too."""

CONTRASTED_FROM = 250
"""Timestep from which on. Where a picture can be seen, its words change nothing that a denoiser should do."""

ALIGNMENT_WEIGHT = 0.2
"""Weight of `alignment_loss`."""

GROUNDED_BELOW = 500
"""Timesteps at which a picture can be seen well enough for its words to be judged."""

CLEAR_SHARE = 0.15
"""Share of samples drawn uniformly from the timesteps below 450, for the sake of that loss."""

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build_unet() -> UNet2DConditionModel:
    """The untrained UNet: cross-attention at 16x16 and 8x8, heads of 32 channels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=(2, 4),  # diffusers reads this as the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )


def learning_rate(fraction: float, step: int) -> float:
    """Warm-up, then constant, then a linear fall at the end: thanks to the moving average it can stop anytime."""
    fall = min(1.0, (1.0 - fraction) / DECAY_SHARE)
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, fall)


def draw_timesteps(size: int, generator: torch.Generator) -> Tensor:
    """int64 [size], 0 to 999; later (noisier) ones more often, for there the words decide. But see `CLEAR_SHARE`."""
    noisy = (1000 * torch.rand(size, generator=generator) ** 0.7).long().clamp_(max=999)
    clear = (450 * torch.rand(size, generator=generator)).long()
    return torch.where(torch.rand(size, generator=generator) < CLEAR_SHARE, clear, noisy)


def draw_caption(scene: SceneWords, rng: random.Random, drop: float) -> tuple[Caption, Caption | None]:
    """A caption to denoise a scene under: none, of all its objects, or of one of them; and one in the same wording in
    which something is wrong, if it can be made. `drop`: as `caption_scene`'s.
    """
    if rng.random() < CAPTION_DROPOUT:
        return Caption(""), None
    objects = scene.objects
    if len(objects) > 1 and rng.random() < ONE_OF_MANY:
        objects = (rng.choice(objects),)
    wrong = mistake(objects, rng)
    twin = random.Random()
    twin.setstate(rng.getstate())
    caption = caption_scene(objects, rng, drop, table=scene.table, wall=scene.wall)
    if wrong is None:
        return caption, None
    return caption, caption_scene(wrong, twin, drop, table=scene.table, wall=scene.wall)


def choose_contrasts(
    pairs: Sequence[tuple[Caption, Caption | None]], timesteps: Tensor, scenes: TrainingScenes, rows: np.ndarray
) -> dict[int, str]:
    """Places of the batch whose wrong caption says something that is not true of the scene, with that caption."""
    chosen: dict[int, str] = {}
    for place, (caption, wrong) in enumerate(pairs):
        if len(chosen) == CONTRASTED:
            break
        if wrong is None or wrong.text == caption.text or timesteps[place] < CONTRASTED_FROM:
            continue
        if not caption_truth([wrong], scenes, rows[[place]])[0, 0]:
            chosen[place] = wrong.text
    return chosen


def audible(ids: Tensor, words_only: bool) -> Tensor:
    """Which positions of a prompt the UNet may attend to: all of them, or the start token and the words alone.

    The text tower is causal: the end token, and the padding after it, have read the whole prompt. A UNet that listens
    to them learns from there what to paint and hardly looks at the words; but it is the words' attention that says
    where a thing is. So for most samples these positions are hidden, and for the rest not: diffusers' own pipeline has
    no mask for them.

    Args:
        ids: int64 [B, L], tokens; the end token, which is the padding too, has the highest id.
        words_only: whether end and padding are hidden.

    Returns:
        bool [B, L].
    """
    end = ids.argmax(dim=1, keepdim=True)
    return (torch.arange(ids.shape[1], device=ids.device) < end) | (not words_only)


def without_padding(ids: Tensor) -> Tensor:
    """Tokens int64 [B, L], cut after the last end token."""
    return ids[:, : int(ids.argmax(dim=1).max()) + 1]


def end_states(states: Tensor, ids: Tensor) -> Tensor:
    """The end token's states [B, D], of all positions' [B, L, D] and the tokens int64 [B, L]; it has the highest id."""
    return states[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]


def build_painter(encoder: CLIPTextModel) -> nn.ModuleDict:
    """What the stage trains: `unet`; `text`, the encoder, whose embeddings stay, for prompts are made of them; and
    `eyes`, which are not exported.
    """
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("embedding" not in name)
    return nn.ModuleDict({"unet": build_unet(), "text": encoder, "eyes": build_eyes()})


def train_unet(settings: Settings) -> None:
    """Trains the UNet on `settings.unet_images` samples; weights go to `<work>/unet.safetensors`."""
    device = settings.torch_device
    torch.manual_seed(settings.seed)
    scenes = load_scenes(settings.work)
    latents = np.load(settings.work / "latents.npy", allow_pickle=False)
    tokenizer = build_tokenizer()
    clip_weights, _ = load_state(settings.work / "clip.safetensors", "average/")
    clip_text = build_text_encoder(clip_weights, tokenizer).to(device).requires_grad_(False)
    features = ImageFeatures(settings).to(device)
    scheduler = DDPMScheduler(**SCHEDULE)
    bank = build_word_bank(tokenizer, random.Random(settings.seed), device)
    painter = build_painter(build_text_encoder(clip_weights, tokenizer)).to(device)
    unet: UNet2DConditionModel = painter["unet"].to(memory_format=torch.channels_last)
    encoder: CLIPTextModel = painter["text"]
    if device.type == "cpu":  # there plain products of matrices are faster than the fused kernel
        unet.set_attn_processor(AttnProcessor())
        encoder.set_attn_implementation("eager")
    learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [*unet.parameters(), *painter["eyes"].parameters()]},
        {"params": learning, "scale": TEXT_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    with (
        Run(settings, "unet", painter, optimiser, settings.unet_images, 0.999) as run,
        Queries(unet) as queries,
        Middle(unet) as middle,
    ):
        rng = np.random.default_rng([settings.seed, run.step, 3])
        words = random.Random(int(rng.integers(2**32)))
        generator = torch.Generator().manual_seed(int(rng.integers(2**32)))
        painter.train()
        while not run.finished:
            fraction = run.fraction
            run.set_rate(learning_rate(fraction, run.step))
            early = fraction < SINGLES_SHARE
            rows = scenes.sample_indices(rng, BATCH, (0.02, 0.85, 0.13, 0.0, 0.0) if early else GROUP_SHARES)
            drop = 0.15 if fraction < 0.2 else 0.4
            pairs = [draw_caption(scenes.words[row], words, drop) for row in rows]
            timesteps = draw_timesteps(BATCH, generator)
            contrasted = choose_contrasts(pairs, timesteps, scenes, rows)
            captions = [*(caption.text for caption, _ in pairs), *contrasted.values()]
            ids = tokenizer(
                captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
            )["input_ids"].to(device)
            words_only = words.random() < WORDS_ONLY
            ids = without_padding(ids) if words_only else ids
            mirrored = rng.integers(2, size=BATCH)
            clean = torch.from_numpy(latents[mirrored, rows].astype(np.float32))
            noise = torch.randn(clean.shape, generator=generator)
            target = scheduler.get_velocity(clean, noise, timesteps).to(device)
            every = [*range(BATCH), *contrasted]  # the rows of the batch, some twice
            noisy = scheduler.add_noise(clean, noise, timesteps)[every].to(device, memory_format=torch.channels_last)
            pixels = torch.from_numpy(mirror(scenes.images[rows], mirrored == 1)).to(device).float().div_(127.5).sub_(1)
            phrases = bank.draw(generator)
            seen = (timesteps < GROUNDED_BELOW).nonzero()[:, 0]
            with autocast(device):
                text = encoder(ids).last_hidden_state
                short = encoder(phrases.ids).last_hidden_state
                with torch.no_grad():
                    ends = [end_states(clip_text(each).last_hidden_state, each) for each in (ids, phrases.ids)]
                    looks = features(pixels)[-1]
                predicted = unet(
                    noisy,
                    timesteps[every].to(device),
                    encoder_hidden_states=text,
                    encoder_attention_mask=audible(ids, words_only),
                ).sample.float()
                shares = queries.shares(phrases.states(short.detach()), bank.families, seen.to(device))
                alignment = alignment_loss(painter["eyes"](middle.places[:BATCH]), looks)
            predicted, contradicted = predicted.split([BATCH, len(contrasted)])
            denoising = F.mse_loss(predicted, target)
            doubled = list(contrasted)
            contrast = contrast_loss(predicted[doubled], contradicted, target[doubled])
            moved = F.mse_loss(torch.cat([end_states(text, ids), end_states(short, phrases.ids)]), torch.cat(ends))
            present = bank.present(scenes.codes[rows])[seen].to(device)
            grounding = torch.stack([grounding_loss(grid, present, bank.families) for grid in shares.values()]).sum()
            loss = (
                denoising
                + CONTRAST_WEIGHT * contrast
                + GROUNDING_WEIGHT * grounding
                + ALIGNMENT_WEIGHT * alignment
                + HELD_WEIGHT * moved
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
            optimiser.step()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the UNet's loss is {loss.item()} at step {run.step}")
            losses = {
                "denoising": denoising,
                "contrast": contrast,
                "grounding": grounding,
                "alignment": alignment,
                "moved": moved,
                "gradient": norm,
            }
            run.advance(BATCH, {name: value.item() for name, value in losses.items()})
