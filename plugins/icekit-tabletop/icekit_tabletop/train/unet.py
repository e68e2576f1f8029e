"""The `unet` stage: a small Stable Diffusion UNet that denoises latents under the words of a caption.

CLIP's text tower learns along. Contrastive training reads a caption at its end token alone, so the states of the words
themselves, which the UNet reads, were never asked to say whose colour a colour is; the end token's state, which icekit
compares phrases by, is held where CLIP put it.

Beside the denoising loss there are three for what it teaches late: `grounding.py`, `contrast.py`, `alignment.py`.
"""

from __future__ import annotations

import math
import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from icekit_tabletop.tokenizer import build_tokenizer
from icekit_tabletop.train.alignment import Middle, alignment_loss, build_eyes
from icekit_tabletop.train.batches import Batch, Batches
from icekit_tabletop.train.checkpoint import Run, load_state
from icekit_tabletop.train.contrast import contrast_loss
from icekit_tabletop.train.data import TrainingScenes, load_scenes
from icekit_tabletop.train.grounding import Phrases, Queries, build_word_bank, grounding_loss
from icekit_tabletop.train.perceptual import ImageFeatures
from icekit_tabletop.train.settings import Settings, autocast
from icekit_tabletop.train.text_tower import build_text_encoder

WARMUP_STEPS = 200
DECAY_SHARE = 0.4
"""Share of the training, at its end, over which the learning rate falls to nearly zero."""

TEXT_RATE = 0.3
"""The text tower's learning rate, as a share of the UNet's."""

WEIGHTS = {"denoising": 1.0, "contrast": 2e-3, "grounding": 0.02, "alignment": 0.2, "moved": 1.0}
"""Weight of each loss. The denoising loss is a mean over the 1024 numbers of a picture, the contrast's are sums;
`moved` is the distance of the end token's states from CLIP's.
"""

GROUNDED_BELOW = 500
"""Timesteps at which a picture can be seen well enough for its words to be judged."""

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


def learning_rate(peak: float, fraction: float, step: int) -> float:
    """Warm-up, then constant, then a linear fall at the end: thanks to the moving average it can stop anytime."""
    fall = min(1.0, (1.0 - fraction) / DECAY_SHARE)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, fall)


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


class Lesson:
    """The losses of a batch, and the frozen things that they need. A context manager: it looks into the UNet."""

    def __init__(self, painter: nn.ModuleDict, scenes: TrainingScenes, settings: Settings) -> None:
        self.device, self.scenes = settings.torch_device, scenes
        self.unet: UNet2DConditionModel = painter["unet"]
        self.encoder: CLIPTextModel = painter["text"]
        self.eyes = painter["eyes"]
        self.tokenizer = build_tokenizer()
        self.clip_text = clip_text_encoder(settings).to(self.device).requires_grad_(False)
        self.features = ImageFeatures(settings).to(self.device)
        self.scheduler = DDPMScheduler(**SCHEDULE)
        self.bank = build_word_bank(self.tokenizer, random.Random(settings.seed), self.device)
        self.queries, self.middle = Queries(self.unet), Middle(self.unet)

    def __enter__(self) -> Lesson:
        self.queries.__enter__()
        self.middle.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.middle.__exit__(kind, error, trace)
        self.queries.__exit__(kind, error, trace)

    def losses(self, batch: Batch, phrases: Phrases) -> dict[str, Tensor]:
        """As in `WEIGHTS`. `phrases`: around all words that attention is judged by."""
        device, size = self.device, len(batch.rows)
        ids = (without_padding(batch.ids) if batch.words_only else batch.ids).to(device)
        every = [*range(size), *batch.doubled]
        timesteps = batch.timesteps.to(device)
        noisy = self.scheduler.add_noise(batch.clean, batch.noise, batch.timesteps)[every]
        target = self.scheduler.get_velocity(batch.clean, batch.noise, batch.timesteps).to(device)
        visible = (batch.timesteps < GROUNDED_BELOW).nonzero()[:, 0]
        with autocast(device):
            text = self.encoder(ids).last_hidden_state
            short = self.encoder(phrases.ids).last_hidden_state
            with torch.no_grad():
                ends = [end_states(self.clip_text(each).last_hidden_state, each) for each in (ids, phrases.ids)]
                looks = self.features(batch.pixels.to(device).float() / 127.5 - 1)[-1]
            predicted = self.unet(
                noisy.to(device, memory_format=torch.channels_last),
                timesteps[every],
                encoder_hidden_states=text,
                encoder_attention_mask=audible(ids, batch.words_only),
            ).sample.float()
            shares = self.queries.shares(phrases.states(short.detach()), self.bank.families, visible.to(device))
            sights = self.eyes(self.middle.places[:size])
        predicted, contradicted = predicted.split([size, len(batch.doubled)])
        present = self.bank.present(self.scenes.codes[batch.rows[visible.numpy()]]).to(device)
        return {
            "denoising": F.mse_loss(predicted, target),
            "contrast": contrast_loss(predicted[batch.doubled], contradicted, target[batch.doubled]),
            "grounding": torch.stack(
                [grounding_loss(grid, present, self.bank.families) for grid in shares.values()]
            ).sum(),
            "alignment": alignment_loss(sights, looks),
            "moved": F.mse_loss(torch.cat([end_states(text, ids), end_states(short, phrases.ids)]), torch.cat(ends)),
        }


def clip_text_encoder(settings: Settings) -> CLIPTextModel:
    """CLIP's text tower as the `clip` stage left it."""
    return build_text_encoder(load_state(settings.work / "clip.safetensors", "average/")[0], build_tokenizer())


def train_unet(settings: Settings) -> None:
    """Trains the UNet on `settings.unet_images` samples; weights go to `<work>/unet.safetensors`."""
    device = settings.torch_device
    torch.manual_seed(settings.seed)
    scenes = load_scenes(settings.work)
    latents = np.load(settings.work / "latents.npy", allow_pickle=False)
    painter = build_painter(clip_text_encoder(settings)).to(device)
    unet: UNet2DConditionModel = painter["unet"].to(memory_format=torch.channels_last)
    encoder: CLIPTextModel = painter["text"]
    if device.type == "cpu":  # there plain products of matrices are faster than the fused kernel
        unet.set_attn_processor(AttnProcessor())
        encoder.set_attn_implementation("eager")
    groups: list[dict[str, Any]] = [
        {"params": [*unet.parameters(), *painter["eyes"].parameters()]},
        {"params": [each for each in encoder.parameters() if each.requires_grad], "scale": TEXT_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.unet_rate, betas=(0.9, 0.99), weight_decay=0.01)
    with (
        Run(settings, "unet", painter, optimiser, settings.unet_images, 0.999) as run,
        Lesson(painter, scenes, settings) as lesson,
    ):
        generator = torch.Generator().manual_seed(int(np.random.default_rng([settings.seed, run.step]).integers(2**32)))
        batches = Batches(scenes, latents, settings.unet_batch, settings.seed, run.step, run.seen)
        painter.train()
        for batch in batches.load(settings.unet_workers):
            if run.finished:
                break
            run.set_rate(learning_rate(settings.unet_rate, run.fraction, run.step))
            losses = lesson.losses(batch, lesson.bank.draw(generator))
            loss = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            losses["gradient"] = torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
            optimiser.step()
            values = dict(
                zip(losses, torch.stack([value.detach().float() for value in losses.values()]).tolist(), strict=True)
            )
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(f"the UNet's losses are {values} at step {run.step}")
            run.advance(settings.unet_batch, values)
