"""The grounding loss of the `unet` stage: cross-attention must tell, at places of a picture, which words are true.

A denoiser of this size gets by without looking: where an object can be seen, its words say nothing new, and where
noise hides it, nothing says which word is whose. Its attention then lies on all objects alike. What a caption's words
cannot teach, knowing which words are *not* true can: this is multiple-instance learning (Dietterich et al. 1997) with
the picture as the bag and its places as the instances, as weakly supervised segmentation does it (Pinheiro and
Collobert 2015, "From image-level to pixel-level labeling"). It needs no masks, only what captions are made of.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from icekit_tabletop.tokenizer import MAX_LENGTH
from icekit_tabletop.train.data import VALUES

VARIANTS = 24
"""Phrases around every word, in one of which its hidden state is taken at each step."""

TRUE_PLACES, FALSE_PLACES = 1 / 16, 1 / 64
"""Share of the places that must hold a true word, about half a small object; and that a false word is judged by."""

FALSE_WEIGHT = 3.0
"""Weight of the false words' loss against the true words'."""

FAMILY_WEIGHTS = (2.0, 1.0, 1.0, 1.0)
"""Weight of the words of each attribute, shapes first: they are the hardest to see."""

AREA_WEIGHT = 0.5
"""Weight of the share of the picture that an attribute's words lie on: most of it is no object."""


@dataclass(frozen=True)
class Phrases:
    """One phrase around each of W words. `ids`: int64 [W, L]. `places`: int64 [W], where the word is in it."""

    ids: Tensor
    places: Tensor

    def states(self, hidden: Tensor) -> Tensor:
        """The start token's state and every word's, [1 + W, D], of the phrases' hidden states [W, L, D]."""
        return torch.cat([hidden[:1, 0], hidden[torch.arange(len(hidden)), self.places]])


@dataclass(frozen=True)
class WordBank:
    """Phrases around all attributes' values, W words.

    `words`: in the order of `VALUES`. `families`: the columns of each attribute. `ids`: int64 [W, V, L], V phrases
    around each word. `places`: int64 [W, V], where the word is in them.
    """

    words: tuple[str, ...]
    families: tuple[slice, ...]
    ids: Tensor
    places: Tensor

    def draw(self, generator: torch.Generator) -> Phrases:
        """One phrase for every word."""
        chosen = torch.randint(self.places.shape[1], (len(self.words),), generator=generator).to(self.ids.device)
        rows = torch.arange(len(self.words), device=self.ids.device)
        return Phrases(self.ids[rows, chosen], self.places[rows, chosen])

    def present(self, codes: np.ndarray) -> Tensor:
        """Which words are true of some object: bool [B, W], of scenes' codes [B, 4 objects, 4 attributes]."""
        true = torch.zeros(len(codes), len(self.words) + 1, dtype=torch.bool)  # the last column: no object, no value
        starts = np.array([family.start for family in self.families])
        columns = np.where(codes >= 0, codes + starts, len(self.words)).reshape(len(codes), -1)
        true.scatter_(1, torch.from_numpy(columns.astype(np.int64)), True)
        return true[:, :-1]


def _phrase(attribute: str, word: str, rng: random.Random) -> str:
    values = {name: rng.choice(known) for name, known in VALUES.items()} | {attribute: word}
    colour, material, shape = values["colour"], values["material"], values["shape"]
    forms = [f"a {word}", f"a photo of a {word}"]
    if attribute == "shape":
        forms += [f"a {colour} {shape}", f"a {material} {shape}", f"a {colour} {material} {shape}"]
    else:
        forms += [f"a {word} {shape}", f"a {word} thing"]
    if attribute in ("material", "texture"):
        forms.append(f"a {colour} {word} {shape}")
    phrase = rng.choice(forms)
    if rng.random() < 0.4:
        other = " ".join(rng.choice(VALUES[name]) for name in ("colour", "material", "shape"))
        if word not in other.split():
            phrase = f"a {other} and {phrase}"
    return phrase


def build_word_bank(tokenizer: CLIPTokenizer, rng: random.Random, device: torch.device) -> WordBank:
    """Draws `VARIANTS` phrases around each word."""
    words: list[str] = []
    families: list[slice] = []
    ids: list[Tensor] = []
    for attribute, values in VALUES.items():
        families.append(slice(len(words), len(words) + len(values)))
        for word in values:
            phrases = [_phrase(attribute, word, rng) for _ in range(VARIANTS)]
            ids.append(
                tokenizer(phrases, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]
            )
            words.append(word)
    tokens = torch.stack(ids)
    own = torch.tensor([tokenizer(word)["input_ids"][1] for word in words])
    places = (tokens == own[:, None, None]).int().argmax(dim=2)
    return WordBank(tuple(words), tuple(families), tokens.to(device), places.to(device))


class Queries:
    """The queries of all cross-attention layers of a UNet's last forward pass. Use as a context manager."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
        self._queries: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> Queries:
        def keep(layer: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._queries[layer] = output

        self._hooks = [layer.to_q.register_forward_hook(keep) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._queries.clear()

    def shares(self, states: Tensor, families: Sequence[slice], rows: Tensor) -> dict[int, Tensor]:
        """How each place's attention would fall on all words, whatever the caption said.

        `states`: [1 + W, D], the start token's and the words'. `families`: columns of the words that compete with each
        other and with the start token. `rows`: int64 [B], the pictures of the batch to look at.

        Returns the mean over heads and layers of each grid, places N -> float32 [B, N, W]; a place's shares of a
        family sum to one less what rests on the start token.
        """
        grids: dict[int, list[Tensor]] = {}
        for layer in self._layers:
            query = self._queries[layer.to_q][rows].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            key = layer.to_k(states).unflatten(-1, (layer.heads, -1)).transpose(0, 1)
            scores = (query @ key.transpose(-1, -2)).float() * layer.scale  # [B, heads, N, 1 + W]
            start, words = scores[..., :1], scores[..., 1:]
            shares = [torch.cat([start, words[..., family]], -1).softmax(-1)[..., 1:] for family in families]
            grids.setdefault(query.shape[2], []).append(torch.cat(shares, -1).mean(1))
        return {places: torch.stack(layers).mean(0) for places, layers in grids.items()}


def grounding_loss(shares: Tensor, present: Tensor, families: Sequence[slice]) -> Tensor:
    """Whether the words that are true of a picture, and they alone, find places in it.

    With s a word's mean share at the `TRUE_PLACES` (for a word that is not true, `FALSE_PLACES`) where it is largest,
    for every family: mean of -log(s) over the true words + `FALSE_WEIGHT` * mean of -log(1 - s) over the others
    + `AREA_WEIGHT` * the mean over places of what the family's words hold together.

    Args:
        shares: float32 [B, N, W], 0 to 1.
        present: bool [B, W], words that are true of the picture.
        families: columns of the words that compete with each other, as many as `FAMILY_WEIGHTS`.

    Returns:
        The mean over the families by their weights; 0 without pictures.
    """
    loss = shares.new_zeros(())
    if not len(shares):
        return loss
    places = shares.shape[1]
    true = -shares.topk(max(1, round(places * TRUE_PLACES)), dim=1).values.mean(1).clamp_min(1e-4).log()
    false = -(1 - shares.topk(max(1, round(places * FALSE_PLACES)), dim=1).values.mean(1)).clamp_min(1e-4).log()
    for weight, family in zip(FAMILY_WEIGHTS, families, strict=True):
        each = AREA_WEIGHT * shares[..., family].sum(-1).mean()
        yes, no = present[:, family], ~present[:, family]
        if yes.any():
            each = each + true[:, family][yes].mean()
        if no.any():
            each = each + FALSE_WEIGHT * false[:, family][no].mean()
        loss = loss + weight / sum(FAMILY_WEIGHTS) * each
    return loss
