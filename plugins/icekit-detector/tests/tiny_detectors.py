"""Tiny folders of random weights in the true format: CLIPSeg, Grounding DINO and SAM as transformers saves them.

They have the files, classes and layers of the published ones, but are narrow and untrained: good for checking what code
does with a model, never for what a model finds. The same call writes the same weights.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    SwinConfig,
    ViTImageProcessor,
)

from icekit.testing.scenes import NOUNS
from icekit.testing.tiny import VOCABULARY, tiny_tokenizer

BERT_WORDS = (*NOUNS, "a", "red", "metal", "on", "table", "remote", "control")


def write_clipseg(folder: Path, *, seed: int = 0) -> Path:
    """CLIPSeg with a square of 64 pixels, whose heat maps go from near 0 to near 1."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    config = CLIPSegConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 0,  # the published configurations of CLIP carry these wrong ids as well
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        projection_dim=32,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPSegForImageSegmentation(config).eval()
        for parameter in model.parameters():  # far from zero: the words and the places then differ
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 + 0.1)
    model.save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def bert_vocabulary() -> list[str]:
    """BERT's, shortened: the numbers of its special pieces and of . and ? are the true ones, which models know."""
    unused = [f"[unused{number}]" for number in range(999)]
    pieces = ["[PAD]", *unused[:99], "[UNK]", "[CLS]", "[SEP]", "[MASK]", *unused[99:994]]
    characters = [chr(code) for code in range(33, 127) if chr(code) not in string.ascii_uppercase]
    letters = [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    vocabulary = list(dict.fromkeys([*pieces, *characters, *letters, *BERT_WORDS]))
    assert [vocabulary.index(piece) for piece in ("[CLS]", "[SEP]", ".", "?")] == [101, 102, 1012, 1029]
    return vocabulary


def write_grounding_dino(folder: Path, *, seed: int = 0) -> Path:
    """Grounding DINO with 12 queries, a Swin backbone, and pictures of 64 to 96 pixels and scores of all sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(bert_vocabulary()) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(vocabulary), model_max_length=512)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(bert_vocabulary()),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        d_model=64,  # groups of 32 channels are normalised, also where a grid is one cell
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=4,
        num_queries=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GroundingDinoForObjectDetection(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("text" in name or "bbox_embed" in name):  # far from zero: words and boxes differ
                torch.nn.init.normal_(parameter, std=0.15)
        torch.nn.init.constant_(model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.weight, 0.25)
    model.save_pretrained(folder)
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def write_sam(folder: Path, *, seed: int = 0) -> Path:
    """SAM with a square of 64 pixels, whose masks are neither empty nor full."""
    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "mlp_dim": 32,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamModel(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    pictures = SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    SamProcessor(pictures).save_pretrained(folder)
    return folder


def as_published(folder: Path) -> Path:
    """With the files that earlier versions of transformers wrote, as the published folders have them."""
    written = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    pictures = dict(written["image_processor"])
    kind = pictures.pop("image_processor_type")
    if kind == "ViTImageProcessor":
        pictures = {
            "feature_extractor_type": "ViTFeatureExtractor",
            "do_normalize": True,
            "do_resize": True,
            "image_mean": pictures["image_mean"],
            "image_std": pictures["image_std"],
            "resample": 2,
            "size": 64,
        }
    else:
        pictures["image_processor_type"] = kind
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
    (folder / "processor_config.json").unlink()
    if (folder / "tokenizer.json").exists():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if "merges" in model:
            (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
            merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
            (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").unlink()
    return folder
