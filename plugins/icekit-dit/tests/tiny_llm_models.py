"""Tiny models of the families that read prompts with a language model: real classes, true layout, random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from icekit.testing.tiny import VOCABULARY

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""What Qwen 3's template makes of one message."""


def _trained(
    tokenizer: Tokenizer, words: Iterable[str], alphabet: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of byte-pair encoding that makes each word one piece."""
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((f"a {word}" for word in words), trainer)
    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], [tuple(merge) for merge in state["merges"]]


def tiny_gemma_tokenizer(words: Iterable[str] = VOCABULARY) -> GemmaTokenizer:
    """A Gemma tokenizer of letters and ``words``, a space before them; it begins with <bos> and pads at the left."""
    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.Replace(" ", "\u2581")
    plain.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    letters = ["\u2581", "\n", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    vocabulary, merges = _trained(plain, words, letters)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *sorted(vocabulary, key=lambda piece: vocabulary[piece])]
    tokenizer = GemmaTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges)
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", pieces.index("<bos>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


def tiny_qwen_tokenizer(words: Iterable[str] = VOCABULARY) -> Qwen2Tokenizer:
    """A Qwen tokenizer of all bytes and ``words``, with the marks of a chat and its template."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _trained(plain, words, pre_tokenizers.ByteLevel.alphabet())
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    tokenizer = Qwen2Tokenizer(
        vocab={piece: place for place, piece in enumerate([*pieces, "<|endoftext|>"])},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_sana_pipeline(*, flow_match: bool = False, seed: int = 0) -> SanaPipeline:
    """A Sana pipeline with random weights: rows of 32 numbers, 64-pixel pictures, latents ``[4, 8, 8]``.

    flow_match: its scheduler is ``FlowMatchEulerDiscreteScheduler``.
    """
    tokenizer = tiny_gemma_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                query_pre_attn_scalar=8,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
            qk_norm="rms_norm_across_heads",
        )
        vae = AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 8, 16, 16),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), ()),
            decoder_qkv_multiscales=((), (), (), ()),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        )
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0)
        if flow_match
        else DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def tiny_z_image_pipeline(*, seed: int = 0) -> ZImagePipeline:
    """A Z-Image pipeline with random weights: rows of 32 numbers, pictures up to 128 pixels, latents ``[4, h, w]``."""
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
            )
        )
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 16, 16],
        )
        # Zeros as they are made; trained ones are not.
        for padding in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(padding)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 16, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def tiny_flux2_klein_pipeline(*, distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """A FLUX.2-klein pipeline with random weights: rows of 16 numbers, latents ``[4, h, w]``, places of 8 pixels."""
    tokenizer = tiny_qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=28,  # the states after the 27th are asked for
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=8,
                tie_word_embeddings=True,
                initializer_range=0.1,
            )
        )
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
        # 0 and 1 as they are made; trained ones are not.
        torch.nn.init.normal_(vae.bn.running_mean)
        torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        is_distilled=distilled,
    )


def write_sana(folder: Path, *, flow_match: bool = False) -> Path:
    """Write ``tiny_sana_pipeline`` to ``folder`` in diffusers' format, weights as safetensors."""
    tiny_sana_pipeline(flow_match=flow_match).save_pretrained(folder)
    return folder


def write_z_image(folder: Path) -> Path:
    """Write ``tiny_z_image_pipeline`` to ``folder`` in diffusers' format, weights as safetensors."""
    tiny_z_image_pipeline().save_pretrained(folder)
    return folder


def write_flux2_klein(folder: Path, *, distilled: bool = False) -> Path:
    """Write ``tiny_flux2_klein_pipeline`` to ``folder`` in diffusers' format, weights as safetensors."""
    tiny_flux2_klein_pipeline(distilled=distilled).save_pretrained(folder)
    return folder
