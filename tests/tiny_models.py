"""A tiny Stable Diffusion 3 model with random weights, as ``icekit.testing.tiny`` has others.

``python tests/tiny_models.py OUT`` writes all of them below OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from icekit.testing.tiny import SAMPLE_SIZE, WORDS, tiny_tokenizer, write_clip, write_stable_diffusion


def tiny_t5_tokenizer(words: Iterable[str] = WORDS, max_length: int = 256) -> T5TokenizerFast:
    """A T5 tokenizer of letters, digits and ``words``: pieces of a SentencePiece vocabulary, a space is ``\u2581``."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [("\u2581", -3.0), *((letter, -3.0) for letter in letters)]
    # A whole word is likelier than its letters.
    vocabulary += [(f"\u2581{word}", -2.0) for word in words]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def tiny_t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A T5 encoder with random weights."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


def _projected_text_encoder(tokenizer: CLIPTokenizer, *, width: int, activation: str) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act=activation,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # the right one: pooled is at the end, also with extra tokens
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_joint_pipeline(*, shift: float = 3.0, seed: int = 0) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline with random weights: a transformer with joint attention, flow matching, three text
    encoders with rows of 8 (CLIP L), 16 (CLIP G) and 32 (T5) numbers; 64-pixel images, latents ``[4, 16, 16]``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2, tokenizer_3 = tiny_tokenizer(), tiny_tokenizer(pad_token="!"), tiny_t5_tokenizer()
        text_encoder = _projected_text_encoder(tokenizer, width=8, activation="quick_gelu")
        text_encoder_2 = _projected_text_encoder(tokenizer_2, width=16, activation="gelu")
        text_encoder_3 = tiny_t5_encoder(tokenizer_3)
        transformer = SD3Transformer2DModel(
            sample_size=SAMPLE_SIZE,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=SAMPLE_SIZE,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 16, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=SAMPLE_SIZE * 4,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def write_joint(folder: Path, *, seed: int = 0) -> Path:
    """Write ``tiny_joint_pipeline`` to ``folder`` in diffusers' format, weights as safetensors."""
    tiny_joint_pipeline(seed=seed).save_pretrained(folder)
    return folder


def write_all(out: Path) -> None:
    """Write every tiny model below ``out``."""
    write_stable_diffusion(out / "sd")
    write_stable_diffusion(out / "sd15", version=1, seed=1)
    write_stable_diffusion(out / "sd-v", prediction_type="v_prediction", seed=2)
    write_joint(out / "joint")
    write_clip(out / "clip")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
