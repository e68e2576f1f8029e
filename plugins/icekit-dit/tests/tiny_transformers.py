"""Tiny folders of random weights in the true format: Stable Diffusion 3.x and FLUX.1 as diffusers saves them.

They have the files, classes and kinds of layers of the published ones, but are narrow and untrained: good for checking
what code does with a model, never for what a model draws. The same call writes the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tiny_models import tiny_t5_encoder, tiny_t5_tokenizer, write_joint
from transformers import CLIPTextConfig, CLIPTextModel

from icekit.testing.tiny import VOCABULARY, tiny_tokenizer

PUBLISHED_END = 2
"""The ``eos_token_id`` of published CLIP configurations, which is no end token's."""


def write_sd3(folder: Path, *, t5: bool = True, seed: int = 3) -> Path:
    """Stable Diffusion 3 with 64-pixel images, places of 8 pixels, and CLIP configurations as published.

    t5: with T5; many people have the model without it.
    """
    write_joint(folder, seed=seed)
    for part in ("text_encoder", "text_encoder_2"):
        change(folder / part / "config.json", eos_token_id=PUBLISHED_END)
    if not t5:
        change(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    return folder


def write_flux(folder: Path, *, dev: bool = True, seed: int = 5) -> Path:
    """FLUX.1 with latents of 4 channels and places of 8 pixels; rows of 16 numbers for CLIP and 32 for T5.

    dev: told of guidance, with a schedule that is shifted by size; else as schnell.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = tiny_tokenizer(VOCABULARY), tiny_t5_tokenizer(VOCABULARY, max_length=512)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                hidden_act="quick_gelu",
                projection_dim=16,
                bos_token_id=0,
                eos_token_id=PUBLISHED_END,
                pad_token_id=1,
            )
        )
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        text_encoder_2 = tiny_t5_encoder(tokenizer_2)
    schedule = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0, "use_dynamic_shifting": False}
    FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)
    return folder


def change(file: Path, **values: object) -> None:
    """Write other values into a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


def write_photo(file: Path, *, width: int) -> Path:
    """Write a grey picture of 48 rows with a red square, and say where."""
    pixels = np.full((48, width, 3), 200, dtype=np.uint8)
    pixels[16:40, 20:44] = (180, 30, 40)
    Image.fromarray(pixels).save(file)
    return file
