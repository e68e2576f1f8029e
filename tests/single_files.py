"""A diffusers pipeline written as one file, in the layout of the programs that Stable Diffusion was trained with.

The names follow Stable Diffusion's own modules (``ldm``): the inverse of what diffusers does when it reads such a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, layers: int, with_attention: Sequence[bool]) -> str:
    """A UNet's weight: diffusers' name -> ldm's. with_attention: whether an up block has it."""
    for own, theirs in UNET_ENDS.items():
        if name.startswith(f"{own}."):
            return theirs + name.removeprefix(own)
    within = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if within:
        side, block, part, place, rest = within[1], int(within[2]), within[3], int(within[4]), within[5]
        down = side == "down_blocks"
        if part == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op{rest.removeprefix('conv')}"
        if part == "upsamplers":
            return f"output_blocks.{(layers + 1) * block + layers}.{2 if with_attention[block] else 1}.{rest}"
        stem = (
            f"input_blocks.{(layers + 1) * block + place + 1}"
            if down
            else f"output_blocks.{(layers + 1) * block + place}"
        )
        return f"{stem}.0.{_resnet(rest)}" if part == "resnets" else f"{stem}.1.{rest}"
    middle = re.match(r"mid_block\.(\w+)\.(\d+)\.(.+)", name)
    assert middle, name
    part, place, rest = middle[1], int(middle[2]), middle[3]
    return f"middle_block.1.{rest}" if part == "attentions" else f"middle_block.{2 * place}.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{RESNET[part]}.{kind}"


def vae_weights(state: dict[str, Tensor], levels: int) -> Iterator[tuple[str, Tensor]]:
    """An autoencoder's weights by ldm's names; its attention is written as convolutions of one pixel."""
    for name, value in state.items():
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in name:
            part, _, kind = name.split("mid_block.attentions.0.")[1].rpartition(".")
            name = f"{name.partition('.')[0]}.mid.attn_1.{VAE_ATTENTION[part]}.{kind}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        yield name, value


def open_clip_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's weights by open_clip's names."""
    state = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    yield "token_embedding.weight", state["embeddings.token_embedding.weight"]
    yield "positional_embedding", state["embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        yield f"ln_final.{kind}", state[f"final_layer_norm.{kind}"]
    if "text_projection.weight" in state:
        yield "text_projection", state["text_projection.weight"].T
    else:
        yield "text_projection", torch.eye(model.config.hidden_size)
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"self_attn.out_proj": "attn.out_proj"}
    layers = model.config.num_hidden_layers
    for layer in range(layers):
        stem = f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for own, theirs in names.items():
                yield f"transformer.resblocks.{layer}.{theirs}.{kind}", state[f"{stem}.{own}.{kind}"]
            parts = [state[f"{stem}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            yield f"transformer.resblocks.{layer}.attn.in_proj_{kind}", torch.cat(parts)


def clip_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's weights by transformers' names, as ldm keeps OpenAI's CLIP."""
    for name, value in model.state_dict().items():
        yield "text_model." + name.removeprefix("text_model."), value


def write_single_file(pipeline: Any, file: Path, **marks: Tensor) -> Path:
    """Write a Stable Diffusion pipeline (1.x, 2.x or XL) as one safetensors file; marks: other tensors in it."""
    unet, vae = pipeline.unet, pipeline.vae
    layers, ups = unet.config.layers_per_block, ["CrossAttn" in block for block in unet.config.up_block_types]
    weights = {
        f"model.diffusion_model.{unet_name(name, layers, ups)}": value for name, value in unet.state_dict().items()
    }
    levels = len(vae.config.block_out_channels)
    weights |= {f"first_stage_model.{name}": value for name, value in vae_weights(vae.state_dict(), levels)}
    if hasattr(pipeline, "text_encoder_2"):
        stem = "conditioner.embedders"
        weights |= {f"{stem}.0.transformer.{name}": value for name, value in clip_weights(pipeline.text_encoder)}
        weights |= {f"{stem}.1.model.{name}": value for name, value in open_clip_weights(pipeline.text_encoder_2)}
    elif pipeline.text_encoder.config.hidden_act == "gelu":
        weights |= {f"cond_stage_model.model.{n}": value for n, value in open_clip_weights(pipeline.text_encoder)}
    else:
        weights |= {f"cond_stage_model.transformer.{n}": value for n, value in clip_weights(pipeline.text_encoder)}
    save_file({name: value.detach().clone().contiguous() for name, value in (weights | marks).items()}, file)
    return file
