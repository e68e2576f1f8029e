"""open_clip's text tower as transformers' `CLIPTextModel`: the form of Stable Diffusion's text encoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_BLOCK_KEYS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_text_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip names to transformers names (without a leading "text_model."); other towers' weights are left out.

    The one change of shape: open_clip packs query, key and value in one matrix, [3*D, D] to three of [D, D].
    """
    converted = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "final_layer_norm.weight": weights["ln_final.weight"],
        "final_layer_norm.bias": weights["ln_final.bias"],
    }
    for name, tensor in weights.items():
        if not name.startswith("transformer.resblocks."):
            continue
        _, _, index, rest = name.split(".", 3)
        target = f"encoder.layers.{index}"
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{target}.self_attn.{letter}_proj.{kind}"] = part.clone()
        else:
            module, _, kind = rest.rpartition(".")
            converted[f"{target}.{_BLOCK_KEYS[module]}.{kind}"] = tensor
    return converted


def text_config(weights: Mapping[str, Tensor], tokenizer: CLIPTokenizer, heads: int) -> CLIPTextConfig:
    """The configuration that fits open_clip weights and a tokenizer. `heads` is not written in the weights."""
    vocabulary, width = weights["token_embedding.weight"].shape
    layers = len({name.split(".")[2] for name in weights if name.startswith("transformer.resblocks.")})
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        projection_dim=weights["text_projection"].shape[1],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=weights["positional_embedding"].shape[0],
        hidden_act="gelu",  # open_clip's default; OpenAI's own weights use quick_gelu
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(weights: Mapping[str, Tensor], tokenizer: CLIPTokenizer, heads: int = 4) -> CLIPTextModel:
    """A `CLIPTextModel` in evaluation mode with the weights of an open_clip model."""
    model = CLIPTextModel(text_config(weights, tokenizer, heads))
    converted = convert_text_weights(weights)
    wanted = model.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in wanted) else ""
    model.load_state_dict({prefix + name: tensor.float() for name, tensor in converted.items()}, strict=False)
    missing = [name for name in wanted if name.removeprefix(prefix) not in converted and "position_ids" not in name]
    if missing or len(converted) + len([name for name in wanted if "position_ids" in name]) != len(wanted):
        raise ValueError(f"text towers do not match: {missing[:3]}")
    return model.eval()
