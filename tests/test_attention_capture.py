"""The attention a UNet computes, looked at while it predicts."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from icekit.backbones.attention_capture import (
    CapturingProcessor,
    attention_layers,
    attention_weights,
    capture_attention,
)
from icekit.protocols import InputError

SIDE = 16


@pytest.fixture(scope="module", params=[1, 2])
def unet(request):
    return tiny_models.tiny_pipeline(version=request.param).unet.requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, SIDE, SIDE, generator=generator),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
    }


def test_attention_weights_by_hand():
    # One query (1, 0) against keys (0, 0) and (ln 3, 0): scores 0 and ln 3, weights 1/4 and 3/4.
    query = torch.tensor([[[[1.0, 0.0]]]])
    key = torch.tensor([[[[0.0, 0.0], [math.log(3), 0.0]]]])
    torch.testing.assert_close(attention_weights(query, key, 1.0), torch.tensor([[[[0.25, 0.75]]]]))
    masked = attention_weights(query, key, 1.0, torch.tensor([0.0, -1e9]))
    torch.testing.assert_close(masked, torch.tensor([[[[1.0, 0.0]]]]))


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("context", [False, True])
def test_processor_equals_the_fused_one(upcast, context):
    torch.manual_seed(0)
    attention = Attention(
        query_dim=24, cross_attention_dim=20 if context else None, heads=3, dim_head=8, upcast_attention=upcast
    )
    hidden = torch.randn(2, 9, 24)
    other = torch.randn(2, 5, 20) if context else None
    mask = torch.zeros(2, 1, 5 if context else 9)
    mask[1, 0, 2:] = -10000
    for attention_mask in (None, mask):
        expected = AttnProcessor2_0()(attention, hidden, other, attention_mask)
        actual = CapturingProcessor()(attention, hidden, other, attention_mask)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_processor_half_precision():
    torch.manual_seed(0)
    attention = Attention(query_dim=24, heads=3, dim_head=8).bfloat16()
    hidden = torch.randn(2, 9, 24, dtype=torch.bfloat16)
    processor = CapturingProcessor()
    output = processor(attention, hidden)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, AttnProcessor2_0()(attention, hidden), rtol=0.05, atol=0.02)
    assert processor.weights.dtype == torch.float32
    torch.testing.assert_close(processor.weights.sum(-1), torch.ones(2, 9))


def test_layers_have_the_sizes_they_really_work_at(unet, inputs):
    """The sizes read off the structure are those that every layer sees, also for latents of an odd side."""
    for side in (SIDE, 12, 20):
        seen: dict[str, int] = {}
        hooks = [
            unet.get_submodule(layer.name).to_q.register_forward_hook(
                lambda module, args, output, name=layer.name, seen=seen: seen.update({name: args[0].shape[1]})
            )
            for layer in attention_layers(unet, side)
        ]
        unet(**inputs | {"sample": torch.randn(2, 4, side, side)})
        for hook in hooks:
            hook.remove()
        layers = attention_layers(unet, side)
        assert len(layers) == len(unet.attn_processors) == 32
        assert {layer.name: layer.resolution**2 for layer in layers} == seen
    assert {layer.place for layer in layers} == {"down", "mid", "up"}


def test_captured_maps_equal_an_independent_computation(unet, inputs):
    """Weights from the recorded inputs of the projections, head by head."""
    layers = attention_layers(unet, SIDE)
    recorded: dict[tuple[str, str], Tensor] = {}

    def record(name: str, which: str):
        return lambda module, args, output: recorded.__setitem__((name, which), output)

    hooks = [
        getattr(unet.get_submodule(layer.name), which).register_forward_hook(record(layer.name, which))
        for layer in layers
        for which in ("to_q", "to_k")
    ]
    with capture_attention(unet, layers, cross=[8], self_=[4], places=["down", "up"]) as maps:
        unet(**inputs)
    for hook in hooks:
        hook.remove()

    def expected(kind: str, resolution: int) -> Tensor:
        weights = []
        for layer in layers:
            if (layer.kind, layer.resolution) != (kind, resolution) or layer.place == "mid":
                continue
            query, key = recorded[layer.name, "to_q"], recorded[layer.name, "to_k"]
            count = unet.get_submodule(layer.name).heads
            for q, k in zip(query.chunk(count, dim=-1), key.chunk(count, dim=-1), strict=True):
                scores = torch.einsum("bnd,bmd->bnm", q, k) / math.sqrt(q.shape[-1])
                exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
                weights.append(exponentials / exponentials.sum(-1, keepdim=True))
        assert weights
        return torch.stack(weights).mean(0)

    torch.testing.assert_close(maps.cross(8), expected("cross", 8).transpose(1, 2).reshape(2, 7, 8, 8))
    torch.testing.assert_close(maps.self_(4), expected("self", 4))


def test_prediction_is_unchanged_and_rows_sum_to_one(unet, inputs):
    layers = attention_layers(unet, SIDE)
    expected = unet(**inputs).sample
    with capture_attention(unet, layers, cross=[16, 8, 4, 2], self_=[16, 8, 4, 2]) as maps:
        actual = unet(**inputs).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for side in (16, 8, 4, 2):
        assert maps.cross(side).shape == (2, 7, side, side)
        torch.testing.assert_close(maps.cross(side).sum(1), torch.ones(2, side, side))
        assert maps.self_(side).shape == (2, side**2, side**2)
        torch.testing.assert_close(maps.self_(side).sum(-1), torch.ones(2, side**2))


def test_only_the_requested_layers_are_exchanged(unet):
    layers = attention_layers(unet, SIDE)
    with capture_attention(unet, layers, cross=[16], self_=[8], places=["up"]):
        exchanged = {
            name.removesuffix(".processor")
            for name, processor in unet.attn_processors.items()
            if isinstance(processor, CapturingProcessor)
        }
    wanted = {
        layer.name
        for layer in layers
        if layer.place == "up" and (layer.kind, layer.resolution) in {("cross", 16), ("self", 8)}
    }
    assert len(wanted) == 6
    assert exchanged == wanted


def test_processors_come_back(unet):
    layers = attention_layers(unet, SIDE)
    mine = AttnProcessor2_0()
    unet.get_submodule(layers[0].name).set_processor(mine)
    before = {name: id(processor) for name, processor in unet.attn_processors.items()}
    with pytest.raises(ZeroDivisionError), capture_attention(unet, layers, cross=[16], self_=[16]):
        raise ZeroDivisionError
    assert {name: id(processor) for name, processor in unet.attn_processors.items()} == before
    with capture_attention(unet, layers, cross=[16]) as outer:
        with capture_attention(unet, layers, cross=[16, 8]):
            pass
        assert any(isinstance(processor, CapturingProcessor) for processor in unet.attn_processors.values())
    assert outer is not None
    assert {name: id(processor) for name, processor in unet.attn_processors.items()} == before


def test_a_second_prediction_replaces_the_first(unet, inputs):
    layers = attention_layers(unet, SIDE)
    with capture_attention(unet, layers, cross=[8]) as maps:
        unet(**inputs)
        first = maps.cross(8)
        unet(**inputs | {"timestep": torch.tensor([990, 990])})
        second = maps.cross(8)
    assert not torch.equal(first, second)
    with capture_attention(unet, layers, cross=[8]) as maps:
        unet(**inputs | {"timestep": torch.tensor([990, 990])})
    assert torch.equal(maps.cross(8), second)


def test_gradient_flows_through_the_maps(unet, inputs):
    layers = attention_layers(unet, SIDE)
    context = inputs["encoder_hidden_states"].requires_grad_()
    with capture_attention(unet, layers, cross=[16]) as maps:
        unet(**inputs | {"encoder_hidden_states": context})
    maps.cross(16)[0, 3].sum().backward()
    assert context.grad[0].abs().sum() > 0
    assert context.grad[1].abs().sum() == 0


def test_wrong_requests(unet):
    layers = attention_layers(unet, SIDE)
    with pytest.raises(InputError, match=r"resolution 32.*only 16, 8, 4, 2"), capture_attention(unet, layers, [32]):
        pass
    with (
        pytest.raises(InputError, match=r"resolution 2.*down/up.*only 16, 8, 4$"),
        capture_attention(unet, layers, self_=[2], places=["down", "up"]),
    ):
        pass
    with capture_attention(unet, layers, cross=[16]) as maps:
        with pytest.raises(LookupError, match="nothing was predicted"):
            maps.cross(16)
        with pytest.raises(LookupError, match="self-attention at 16x16 was not captured"):
            maps.self_(16)
