"""Tiny models with random weights: real classes of diffusers, transformers and open_clip, made in memory or as folders.

They have the layer structure of Stable Diffusion 1.x, 2.x and XL and of an open_clip model, but are narrow and
untrained: good for checking what code does with a model, never for what the model draws. The same call makes the same
weights. ``tiny_backbone`` is the smallest: what components are checked on.

``python -m icekit.testing.tiny FOLDER`` writes those that are folders, for a try of a command without any download.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from icekit.backbones.stable_diffusion import StableDiffusion

_WORDS = (
    "a an the of on and with in photo picture image table wall background thing things object concept"
    " cup ball cube bowl bottle vase red green blue yellow metal glass wood rubber colour color material"
    " texture shape black"
)
WORDS = tuple(_WORDS.split())
"""Words that are one token each; any other word falls apart into letters."""

_MORE_WORDS = (
    "one nice clean close up cropped bright dark good rendition things new big small"
    " book box plate chair lamp apple spoon stone fruit toy orange purple white grey brown plastic plain striped dotted"
)
VOCABULARY = (*WORDS, *_MORE_WORDS.split())
"""The words of ``tiny_backbone``: with those of icekit's prompts, ten nouns and more, and words of attributes."""

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


def _vae(scaling: float = 0.18215) -> AutoencoderKL:
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
        scaling_factor=scaling,
    )


def _schedule(prediction_type: str) -> dict[str, Any]:
    """Stable Diffusion's."""
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",  # said aloud: diffusers lets another sampler ignore a default
    }


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
    schedule = _schedule(prediction_type)
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


def tiny_xl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline with random weights: two text encoders, heads by level, text and sizes added."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
        text_encoder = _text_encoder(first, layers=3, activation="quick_gelu")
        text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(second),
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=second.model_max_length,
                hidden_act="gelu",
                projection_dim=40,
                bos_token_id=0,  # wrong ids, as the published configuration has them
                eos_token_id=2,
                pad_token_id=1,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=SAMPLE_SIZE,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 96),
            layers_per_block=2,
            transformer_layers_per_block=[1, 1, 2],
            norm_num_groups=16,
            cross_attention_dim=32 + 48,
            attention_head_dim=[2, 4, 6],  # the number of heads, in spite of its name
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
        )
        vae = _vae(scaling=0.13025)
    schedule = _schedule("epsilon") | {"interpolation_type": "linear", "use_karras_sigmas": False}
    schedule.pop("set_alpha_to_one")
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**schedule),
        add_watermarker=False,
    )


def write_stable_diffusion_xl(folder: Path, seed: int = 0) -> Path:
    """Write ``tiny_xl_pipeline`` to ``folder`` in diffusers' format, weights as safetensors."""
    tiny_xl_pipeline(seed).save_pretrained(folder)
    return folder


def write_stable_diffusion(folder: Path, *, version: int = 2, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write ``tiny_pipeline`` to ``folder`` in diffusers' format, weights as safetensors."""
    tiny_pipeline(version=version, prediction_type=prediction_type, seed=seed).save_pretrained(folder)
    return folder


def tiny_backbone(
    image_size: tuple[int, int] = (64, 64), words: Iterable[str] = VOCABULARY, seed: int = 0
) -> StableDiffusion:
    """A backbone of random weights, made in memory in well under a second once diffusers is imported.

    Latents ``[4, H / 4, W / 4]``, attention on that grid and on one half as fine, one text encoder with rows of 32
    numbers, two denoising steps a picture.

    Args:
        image_size: (height, width) in pixels, multiples of 8.
        words: one token each; any other word falls apart into letters.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(words)
        text_encoder = _text_encoder(tokenizer, layers=2, activation="quick_gelu")
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=2,  # the number of heads, in spite of its name
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
            scaling_factor=0.18215,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, **_schedule("epsilon")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusion.from_pipeline(pipeline, "cpu", StableDiffusion.Settings(image_size=image_size, steps=2))


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


def write_dino(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny vision transformer to ``folder`` in transformers' format, with its image processor."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTModel(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=32,
                patch_size=16,
            )
        )
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_all(folder: Path) -> None:
    """Write ``sd`` and ``sdxl``, a model of each family, and ``clip`` and ``dino``, which look at pictures."""
    write_stable_diffusion(folder / "sd")
    write_stable_diffusion_xl(folder / "sdxl")
    write_clip(folder / "clip")
    write_dino(folder / "dino")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python -m icekit.testing.tiny FOLDER writes tiny models with random weights into FOLDER")
    write_all(Path(sys.argv[1]))
