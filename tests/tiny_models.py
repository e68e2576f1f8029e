"""Tiny models with random weights, written as folders in the formats that real ones come in.

They have the layer structure of Stable Diffusion 1.x, 2.x and 3 and of an open_clip model, but are narrow and
untrained: good for checking what the code does with a model, never for what the model draws.

``python tests/tiny_models.py OUT`` writes all of them below OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

_WORDS = (
    "a an the of on and with in photo picture image table wall background thing things object concept"
    " cup ball cube bowl bottle vase red green blue yellow metal glass wood rubber colour color material"
    " texture shape black"
)
WORDS = tuple(_WORDS.split())
"""Words that are one token each; any other word falls apart into letters."""

SAMPLE_SIZE = 16
"""Side of the latents: 16, so images are 128 pixels wide."""

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with, ``!`` first, as in CLIP's own vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + offset) for offset in range(256 - len(printable))]


def tiny_tokenizer(words: Iterable[str] = WORDS, pad_token: str = END, max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer of all bytes and of ``words``; the end token has the highest id, as in CLIP."""
    alphabet = byte_alphabet()
    tokens = dict.fromkeys([*alphabet, *(character + "</w>" for character in alphabet)])
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        piece = word[-1] + "</w>"
        for letter in reversed(word[:-1]):  # from the end: a merge then never joins two letters inside another word
            merges[(letter, piece)] = None
            piece = letter + piece
            tokens[piece] = None
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), pad_token=pad_token, model_max_length=max_length)


def _text_encoder(tokenizer: CLIPTokenizer, *, layers: int, activation: str) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act=activation,
            projection_dim=32,
            bos_token_id=0,  # the published configurations of Stable Diffusion carry these wrong ids as well
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def _unet(*, version: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SAMPLE_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        norm_num_groups=16,
        cross_attention_dim=32,
        attention_head_dim=[2, 4, 6, 6] if version == 2 else 4,  # the number of heads, in spite of its name
        use_linear_projection=version == 2,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SAMPLE_SIZE * 8,
        scaling_factor=0.18215,
    )


def tiny_pipeline(*, version: int = 2, prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights.

    version: 2 has linear projections, heads by level, GELU and pads prompts with ``!``; 1 has convolutional
        projections, the same heads everywhere, quick GELU and pads with the end token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(pad_token="!" if version == 2 else END)
        text_encoder = _text_encoder(tokenizer, layers=3, activation="gelu" if version == 2 else "quick_gelu")
        unet, vae = _unet(version=version), _vae()
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",  # said aloud: diffusers lets another sampler ignore a default
    }
    scheduler = (
        PNDMScheduler(skip_prk_steps=True, **schedule) if version == 2 else DDIMScheduler(clip_sample=False, **schedule)
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_stable_diffusion(folder: Path, *, version: int = 2, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write ``tiny_pipeline`` to ``folder`` in diffusers' format, weights as safetensors."""
    tiny_pipeline(version=version, prediction_type=prediction_type, seed=seed).save_pretrained(folder)
    return folder


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


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny open_clip model to ``folder``: ``open_clip.create_model_from_pretrained("local-dir:FOLDER")``."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(max_length=40)
    tokenizer.save_pretrained(folder)
    model_cfg = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {
            "context_length": 40,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": ".",
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**model_cfg)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess_cfg = {
        "size": [64, 64],
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=2)
    )
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
