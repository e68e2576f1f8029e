"""Pipelines of Stable Diffusion 3.x and FLUX.1 written as one file, in the layout that these were published in.

The names follow the families' own modules, and those that ComfyUI gives to the other parts of a model: the inverse of
what diffusers does when it reads such a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from single_files import vae_weights
from torch import Tensor

PREDICTOR = "model.diffusion_model."
SD3_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "context_embedder.": "context_embedder.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
SD3_BLOCK = {
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}
SD3_JOINED = {
    "x_block.attn.qkv.": ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    "context_block.attn.qkv.": ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."),
    "x_block.attn2.qkv.": ("attn2.to_q.", "attn2.to_k.", "attn2.to_v."),
}
FLUX_ENDS = {
    "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "context_embedder.": "txt_in.",
    "x_embedder.": "img_in.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
FLUX_BLOCK = {
    "norm1.linear.": "img_mod.lin.",
    "norm1_context.linear.": "txt_mod.lin.",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.net.0.proj.": "img_mlp.0.",
    "ff.net.2.": "img_mlp.2.",
    "ff_context.net.0.proj.": "txt_mlp.0.",
    "ff_context.net.2.": "txt_mlp.2.",
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
}
FLUX_JOINED = {
    "img_attn.qkv.": ("attn.to_q.", "attn.to_k.", "attn.to_v."),
    "txt_attn.qkv.": ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."),
}
FLUX_SINGLE = {
    "norm.linear.": "modulation.lin.",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out.": "linear2.",
}
FLUX_SINGLE_JOINED = {"linear1.": ("attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp.")}


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Weights whose names begin so, under the names that others begin with."""
    for name, value in state.items():
        for own, theirs in names.items():
            if name.startswith(own):
                yield theirs + name.removeprefix(own), value


def joined(state: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Weights of several layers as those of one."""
    for theirs, parts in names.items():
        for kind in ("weight", "bias"):
            if parts[0] + kind in state:
                yield theirs + kind, torch.cat([state[part + kind] for part in parts])


def blocks(state: Mapping[str, Tensor], stem: str) -> dict[int, dict[str, Tensor]]:
    """The weights of each block, by its number."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = re.match(rf"{stem}\.(\d+)\.(.+)", name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value
    return found


def swapped(value: Tensor) -> Tensor:
    """Shift and scale are the other way round in the families' own modules, where nothing else is beside them."""
    first, second = value.chunk(2)
    return torch.cat([second, first])


def sd3_weights(model: Any) -> dict[str, Tensor]:
    """A transformer's weights by the names of Stable Diffusion 3's own module."""
    state = model.state_dict()
    weights = dict(renamed(state, SD3_ENDS))
    all_blocks = blocks(state, "transformer_blocks")
    for number, block in all_blocks.items():
        own = dict(renamed(block, SD3_BLOCK)) | dict(joined(block, SD3_JOINED))
        if number == max(all_blocks):  # of the last one's text nothing is used any more
            own = {name: swapped(value) if "context_block.adaLN" in name else value for name, value in own.items()}
        weights |= {f"joint_blocks.{number}.{name}": value for name, value in own.items()}
    return {name: swapped(value) if name.startswith("final_layer.adaLN") else value for name, value in weights.items()}


def flux_weights(model: Any) -> dict[str, Tensor]:
    """A transformer's weights by the names of FLUX.1's own module."""
    state = model.state_dict()
    weights = dict(renamed(state, FLUX_ENDS))
    for number, block in blocks(state, "transformer_blocks").items():
        own = dict(renamed(block, FLUX_BLOCK)) | dict(joined(block, FLUX_JOINED))
        weights |= {f"double_blocks.{number}.{name}": value for name, value in own.items()}
    for number, block in blocks(state, "single_transformer_blocks").items():
        own = dict(renamed(block, FLUX_SINGLE)) | dict(joined(block, FLUX_SINGLE_JOINED))
        weights |= {f"single_blocks.{number}.{name}": value for name, value in own.items()}
    return {name: swapped(value) if name.startswith("final_layer.adaLN") else value for name, value in weights.items()}


def write_file(pipeline: Any, file: Path, without: Collection[str] = (), alone: bool = False) -> Path:
    """Write a pipeline of one of the families as one safetensors file.

    without: parts that are not written. alone: the transformer alone, under names without a prefix.
    """
    flux = hasattr(pipeline.transformer, "single_transformer_blocks")
    predictor = (flux_weights if flux else sd3_weights)(pipeline.transformer)
    weights = {f"{'' if alone else PREDICTOR}{name}": value for name, value in predictor.items()}
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl" if flux else "clip_g", "text_encoder_3": "t5xxl"}
    for part, name in encoders.items():
        model = getattr(pipeline, part, None)
        if model is None or part in without or alone:
            continue
        state = {key: value for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
        if name == "clip_l":  # its projection changes nothing, and is not written
            state = {f"text_model.{key.removeprefix('text_model.')}": state[key] for key in state}
            state = {key: value for key, value in state.items() if "text_projection" not in key}
        weights |= {f"text_encoders.{name}.transformer.{key}": value for key, value in state.items()}
    if "vae" not in without and not alone:
        begins, levels = "vae." if flux else "first_stage_model.", len(pipeline.vae.config.block_out_channels)
        weights |= {begins + name: value for name, value in vae_weights(pipeline.vae.state_dict(), levels)}
    save_file({name: value.detach().clone().contiguous() for name, value in weights.items()}, file)
    return file
