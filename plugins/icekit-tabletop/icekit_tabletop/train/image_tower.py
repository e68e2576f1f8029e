"""The `clip-image` stage: the image tower alone, trained on against the text tower's finished embeddings.

Locked tuning (Zhai et al. 2022, "LiT", with the roles turned round): the text tower stays as the `clip` stage left it,
and with it everything the UNet was trained on. What is gained: texts are embedded once and for all, so that every
picture can be held against a whole bank of phrases in each step, and not against a handful of captions.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from icekit_tabletop.captions import PREFIXES
from icekit_tabletop.tokenizer import MAX_LENGTH, build_tokenizer
from icekit_tabletop.train.checkpoint import Run, load_state
from icekit_tabletop.train.clip import augment, build_clip, encode_captions, enlarge
from icekit_tabletop.train.data import VALUES, load_scenes
from icekit_tabletop.train.settings import Settings, autocast
from icekit_tabletop.world import is_held_out

BATCH = 64
PEAK_RATE = 1e-3
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
    device = settings.torch_device
    torch.manual_seed(settings.seed)
    scenes = load_scenes(settings.work)
    codes = torch.from_numpy(scenes.codes.astype(np.int64))
    clip = build_clip()
    clip.load_state_dict(load_state(settings.work / "clip.safetensors", "average/")[0])
    clip.eval().requires_grad_(False)
    phrases = random.Random(settings.seed)
    banks = [build_bank(clip, family, phrases) for family in FAMILIES]
    banks = [PhraseBank(bank.embeddings.to(device), bank.codes.to(device)) for bank in banks]
    tower = clip.visual.requires_grad_(True).to(device).to(memory_format=torch.channels_last)
    plain = [parameter for parameter in tower.parameters() if parameter.ndim < 2]
    decayed = [parameter for parameter in tower.parameters() if parameter.ndim >= 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )
    with Run(settings, "clip-image", tower, optimiser, settings.clip_tower_images, 0.998) as run:
        rng = np.random.default_rng([settings.seed, run.step, 4])
        tower.train()
        while not run.finished:
            run.set_cosine_rate(PEAK_RATE, WARMUP_STEPS)
            rows = scenes.sample_indices(rng, BATCH, COUNT_SHARES)
            pixels = enlarge(torch.from_numpy(augment(scenes.images[rows], rng)).to(device).float().div_(127.5).sub_(1))
            with autocast(device):
                images = tower(pixels.contiguous(memory_format=torch.channels_last))
            images = F.normalize(images.float(), dim=-1)
            seen = codes[rows].to(device)
            losses = {}
            total = images.new_zeros(())
            for family, weight, bank in zip(FAMILIES, WEIGHTS, banks, strict=True):
                variant = torch.from_numpy(rng.integers(VARIANTS, size=len(bank.codes))).to(device)
                loss = bank_loss(images, bank, variant, seen)
                losses["-".join(family)] = loss.item()
                total = total + weight * loss
            total = total / sum(WEIGHTS)
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimiser.step()
            run.advance(BATCH, {"loss": total.item(), **losses})
