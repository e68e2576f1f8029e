"""The `clip-image` stage: the image tower alone, trained on against the text tower's finished embeddings.

Locked tuning (Zhai et al. 2022, "LiT", with the roles turned round): the text tower stays as the `clip` stage left it,
and with it everything the UNet was trained on. What is gained: texts are embedded once and for all, so that every
picture can be held against a whole bank of phrases in each step, and not against a handful of captions.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from icekit_tabletop.captions import PREFIXES
from icekit_tabletop.tokenizer import MAX_LENGTH, build_tokenizer
from icekit_tabletop.train.checkpoint import Run, load_state
from icekit_tabletop.train.clip import augment, build_clip, encode_captions, enlarge
from icekit_tabletop.train.data import VALUES, load_scenes
from icekit_tabletop.train.region_views import RegionViews
from icekit_tabletop.train.regions import load_regions
from icekit_tabletop.train.settings import Settings, autocast
from icekit_tabletop.world import is_held_out

BATCH = 64
PEAK_RATE = 1e-3
ALONE, ERASED = 16, 10
"""Of a batch of `clip-regions`: regions seen alone, and scenes with something erased. The others are whole scenes."""
REGION_RATE = 5e-4
"""The peak rate of `clip-regions`, which goes on from trained weights."""
WARMUP_STEPS = 100
COUNT_SHARES = (0.08, 0.33, 0.31, 0.22, 0.06)
"""Shares of pictures with 0 to 4 objects."""

NOTHING = ("an empty table", "a photo of an empty table", "there is nothing on the table", "nothing but a table")
"""What is said of a picture without objects: a rival of all shapes, so that a retriever knows when to stop."""

NO_OBJECT = -3
"""In place of a shape's index, the code of those phrases."""

SCALE = 40.0
"""Factor of the cosines in the loss. Fixed: the text embeddings do not move, so neither need their distances."""

VARIANTS = 6
"""Wordings of every phrase."""

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("shape",),
    ("colour",),
    ("material",),
    ("texture",),
    ("colour", "shape"),
    ("material", "shape"),
    ("texture", "shape"),
    ("colour", "material", "shape"),
)
"""Attributes that the phrases of a family name; a family's phrases are each other's rivals."""

WEIGHTS = (4.0, 1.0, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0)
"""Weight of each family's loss: shapes and materials are the hardest to see."""

Samples = tuple[NDArray[np.uint8], NDArray[np.int16]]
"""Pictures [B, 3, H, W] and what is in them, codes [B, 4, 4] as in `TrainingScenes`."""

_ATTRIBUTES = ("shape", "colour", "material", "texture")


@dataclass(frozen=True)
class PhraseBank:
    """The phrases of one family. `embeddings`: [V, P, D], V wordings of P phrases, normalised. `codes`: int64 [P, 4],
    what each says of shape, colour, material and texture, as indices, -1 where it says nothing; or `NO_OBJECT`.
    """

    embeddings: Tensor
    codes: Tensor

    def truth(self, scenes: Tensor) -> Tensor:
        """Whether each phrase is true of some object: bool [B, P], of scenes' codes int64 [B, 4 objects, 4]."""
        fits = (self.codes[None, :, None] == -1) | (self.codes[None, :, None] == scenes[:, None])
        there = scenes[:, None, :, 0] >= 0
        return torch.where(self.codes[:, 0] == NO_OBJECT, ~there.any(-1), (fits.all(-1) & there).any(-1))


def _wordings(values: dict[str, str], rng: random.Random) -> list[str]:
    adjectives = " ".join(values[key] for key in ("colour", "texture", "material") if key in values)
    noun = values.get("shape", "")
    if not noun:
        attribute, value = next(iter(values.items()))
        thing = rng.choice(("thing", "object"))
        forms: tuple[str, ...] = ("{value}", "{value} {attribute}", "the {attribute} {value}", "a {value} {attribute}")
        forms += ("a {value} {thing}", "a photo of a {value} {thing}", "a {thing} made of {value}")[
            : 3 if attribute == "material" else 2
        ]
        return [form.format(value=value, attribute=attribute, thing=thing) for form in forms]
    phrase = f"{adjectives} {noun}".strip()
    openings = [prefix if prefix.endswith((" one", " my")) else f"{prefix} a" for prefix in PREFIXES]
    return [
        phrase,
        f"a {phrase}",
        f"a photo of a {phrase}",
        *(f"{opening} {phrase}" for opening in rng.sample(openings, 4)),
    ]


@torch.no_grad()
def build_bank(model: open_clip.CLIP, family: tuple[str, ...], rng: random.Random) -> PhraseBank:
    """Embeds all phrases of a family that name no held-out combination."""
    tokenizer = build_tokenizer()
    codes, texts = [], []
    for combination in itertools.product(*(VALUES[key] for key in family)):
        values = dict(zip(family, combination, strict=True))
        if len(family) == 3 and is_held_out(values["shape"], values["colour"], values["material"]):
            continue
        codes.append([VALUES[key].index(values[key]) if key in values else -1 for key in _ATTRIBUTES])
        texts += rng.choices(_wordings(values, rng), k=VARIANTS)
    if family == ("shape",):
        codes.append([NO_OBJECT, -1, -1, -1])
        texts += rng.choices(NOTHING, k=VARIANTS)
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")[
        "input_ids"
    ]
    embeddings = torch.cat([encode_captions(model, part) for part in ids.split(512)])
    return PhraseBank(embeddings.view(len(codes), VARIANTS, -1).transpose(0, 1).contiguous(), torch.tensor(codes))


def bank_loss(images: Tensor, bank: PhraseBank, variant: Tensor, scenes: Tensor, scale: float = SCALE) -> Tensor:
    """Contrastive loss of images against all phrases of a bank: every true phrase against all that are not true.

    `images`: [B, D], normalised. `variant`: int64 [P], the wording to use of each phrase. `scenes`: int64 [B, 4, 4],
    objects by (shape, colour, material, texture), -2 where there is none. `scale`: factor of the cosines.

    Returns the mean over the pictures with a true phrase of the mean over their true phrases of
    -log(exp(true) / (exp(true) + sum of exp(not true))).
    """
    text = bank.embeddings[variant, torch.arange(len(variant), device=variant.device)]
    logits = scale * images @ text.T
    true = bank.truth(scenes)
    rivals = logits.masked_fill(true, -math.inf).logsumexp(1, keepdim=True)
    each = F.softplus(rivals - logits).masked_fill(~true, 0.0)
    counts = true.sum(1)
    return (each.sum(1)[counts > 0] / counts[counts > 0]).mean()


def train_image_tower(settings: Settings) -> None:
    """Trains the image tower on `settings.clip_tower_images` samples; weights go to `<work>/clip-image.safetensors`."""
    scenes = load_scenes(settings.work)

    def draw(rng: np.random.Generator) -> Samples:
        rows = scenes.sample_indices(rng, BATCH, COUNT_SHARES)
        return augment(scenes.images[rows], rng), scenes.codes[rows]

    clip = _frozen(settings.work)
    _train(settings, "clip-image", settings.clip_tower_images, PEAK_RATE, clip, draw)


def train_on_regions(settings: Settings) -> None:
    """Trains it on with what stage one looks at, on `settings.clip_region_images` samples more; weights go to
    `<work>/clip-regions.safetensors`. The `regions` stage must have been there.
    """
    scenes = load_scenes(settings.work)
    views = RegionViews(scenes, load_regions(settings.work, scenes))

    def draw(rng: np.random.Generator) -> Samples:
        rows = scenes.sample_indices(rng, BATCH - ALONE - ERASED, COUNT_SHARES)
        parts = [(augment(scenes.images[rows], rng), scenes.codes[rows])]
        parts += [views.alone(rng, ALONE), views.erased(rng, ERASED)]
        return np.concatenate([images for images, _ in parts]), np.concatenate([codes for _, codes in parts])

    clip = _frozen(settings.work)
    clip.visual.load_state_dict(load_state(settings.work / "clip-image.safetensors", "average/")[0])
    _train(settings, "clip-regions", settings.clip_region_images, REGION_RATE, clip, draw)


def _frozen(work: Path) -> open_clip.CLIP:
    """The model as the `clip` stage left it."""
    clip = build_clip()
    clip.load_state_dict(load_state(work / "clip.safetensors", "average/")[0])
    return clip.eval().requires_grad_(False)


def _train(
    settings: Settings,
    stage: str,
    total: int,
    peak_rate: float,
    clip: open_clip.CLIP,
    draw: Callable[[np.random.Generator], Samples],
) -> None:
    """Trains the model's image tower against its text tower, on `total` samples that `draw` makes."""
    device = settings.torch_device
    torch.manual_seed(settings.seed)
    phrases = random.Random(settings.seed)
    banks = [build_bank(clip, family, phrases) for family in FAMILIES]
    banks = [PhraseBank(bank.embeddings.to(device), bank.codes.to(device)) for bank in banks]
    tower = clip.visual.requires_grad_(True).to(device).to(memory_format=torch.channels_last)
    plain = [parameter for parameter in tower.parameters() if parameter.ndim < 2]
    decayed = [parameter for parameter in tower.parameters() if parameter.ndim >= 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
    )
    with Run(settings, stage, tower, optimiser, total, 0.998) as run:
        rng = np.random.default_rng([settings.seed, run.step, 4])
        tower.train()
        while not run.finished:
            run.set_cosine_rate(peak_rate, WARMUP_STEPS)
            pictures, codes = draw(rng)
            pixels = enlarge(torch.from_numpy(pictures).to(device).float().div_(127.5).sub_(1))
            with autocast(device):
                images = tower(pixels.contiguous(memory_format=torch.channels_last))
            images = F.normalize(images.float(), dim=-1)
            seen = torch.from_numpy(codes.astype(np.int64)).to(device)
            losses = {}
            total_loss = images.new_zeros(())
            for family, weight, bank in zip(FAMILIES, WEIGHTS, banks, strict=True):
                variant = torch.from_numpy(rng.integers(VARIANTS, size=len(bank.codes))).to(device)
                loss = bank_loss(images, bank, variant, seen)
                losses["-".join(family)] = loss.item()
                total_loss = total_loss + weight * loss
            total_loss = total_loss / sum(WEIGHTS)
            optimiser.zero_grad(set_to_none=True)
            total_loss.backward()
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimiser.step()
            run.advance(len(pictures), {"loss": total_loss.item(), **losses})
