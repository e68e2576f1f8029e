"""How the files of other programs are laid out: pure functions from a run's rows and weights to a file's tensors.

What a program reads of a file of an embedding, from its own sources (2026):

- diffusers, ``load_textual_inversion``: one key, the token, or a bare tensor; of a file with a key for each text
  encoder one tensor at a time.
- A1111 and Forge, ``textual_inversion.py``: ``clip_l`` and ``clip_g`` together, or else the one tensor that is there.
- ComfyUI, ``sd1_clip.load_embed``: the key of the text encoder that reads the prompt.
- InvokeAI, ``textual_inversion.py``: ``emb_params``, or ``clip_g`` and ``clip_l``; which model they are for is told by
  the last axis.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Rows = Mapping[str, Tensor]
"""Text encoder -> the rows of one embedding, float32 ``[n, dim]``."""

ROW_LENGTHS = {
    "clip_l": 768,
    "clip_h": 1024,
    "clip_g": 1280,
    "t5xxl": 4096,
    "gemma2_2b": 2304,
    "qwen3_4b": 2560,
    "qwen3_8b": 4096,
}
"""Numbers of a row of the text encoders that other programs know."""

SINGLE = "emb_params"
"""The key of an embedding for one text encoder, as kohya's trainer writes it."""


def by_token(token: str, rows: Rows) -> dict[str, Tensor]:
    """As diffusers reads it: the token is the key, or the text encoder where there are several.

    Args:
        token: ``<name>``.
        rows: float32 ``[n, dim]`` each, one or more.

    Returns:
        ``{token: [dim]}``, ``[n, dim]`` of several rows; or ``{"clip_l": ..., "clip_g": ...}`` in the same shapes.
    """
    flat = {encoder: row[0] if len(row) == 1 else row for encoder, row in rows.items()}
    return {token: next(iter(flat.values()))} if len(flat) == 1 else flat


def by_encoder(rows: Rows) -> dict[str, Tensor]:
    """A key for each text encoder, as ComfyUI reads it: float32 ``[n, dim]`` each."""
    return dict(rows)


def single_or_by_encoder(rows: Rows) -> dict[str, Tensor]:
    """As A1111 and InvokeAI read it: ``emb_params`` for one text encoder, its name where there are several.

    Two axes always: these programs take the first for the number of rows.
    """
    return {SINGLE: next(iter(rows.values()))} if len(rows) == 1 else dict(rows)


def kohya_lora(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter of a UNet, W + B A, with the keys of kohya's trainer, which A1111, ComfyUI and InvokeAI read.

    ``unet.mid_block.attn.to_q.lora_A.weight`` -> ``lora_unet_mid_block_attn_to_q.lora_down.weight``, ``lora_B`` ->
    ``lora_up``, and ``.alpha``, which those programs divide by the rank: the rank itself, for icekit's scale is one.

    Args:
        lora: by diffusers' key, A ``[rank, in]`` and B ``[out, rank]``.

    Raises:
        ValueError: a key of another kind.
    """
    made: dict[str, Tensor] = {}
    for key, value in lora.items():
        match = re.fullmatch(r"unet\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(key)
        layer = f"lora_unet_{match[1].replace('.', '_')}"
        made[f"{layer}.lora_{'down' if match[2] == 'A' else 'up'}.weight"] = value
        if match[2] == "A":
            made[f"{layer}.alpha"] = torch.tensor(float(value.shape[0]))
    return made


def name_in_prompts(stem: str) -> str:
    """A token without its brackets as a file's name that every program finds again in a prompt.

    ASCII letters, digits, ``_`` and ``-``, a letter first: no brackets, colons or commas, which have a meaning there,
    and no spaces. Accents go; what has no Latin letters becomes ``concept``.
    """
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_]+", "-", plain).strip("-")
    return name if name[:1].isalpha() else f"concept-{name}".rstrip("-")


def told_apart(names: Sequence[str]) -> list[str]:
    """The same names, each once, whatever their case: ``a, A`` -> ``a, A-2``."""
    taken: set[str] = set()
    made = []
    for name in names:
        number, one = 1, name
        while one.lower() in taken:
            number += 1
            one = f"{name}-{number}"
        taken.add(one.lower())
        made.append(one)
    return made
