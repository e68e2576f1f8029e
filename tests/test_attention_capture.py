"""The attention a UNet computes, looked at while it predicts."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from icekit.backbones.attention_capture import (
    CapturingProcessor,
    attention_layers,
    attention_weights,
    capture_attention,
    checkpointed,
    grids_of,
    mean_weights,
)
from icekit.testing import tiny

LATENT = (16, 24)
GRIDS = ((16, 24), (8, 12), (4, 6), (2, 3))
"""(height, width) of the latents, and of the grids of the tiny UNet's layers."""


def layers_of(unet, cross=(), self_=(), latent=LATENT):
    """The layers of these grids."""
    wanted = {"cross": cross, "self": self_}
    return [layer for layer in attention_layers(unet, latent) if layer.grid in wanted[layer.kind]]


@pytest.fixture(scope="module", params=[1, 2])
def unet(request):
    return tiny.tiny_pipeline(version=request.param).unet.requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, *LATENT, generator=generator),
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
        actual = CapturingProcessor(lambda weights: None)(attention, hidden, other, attention_mask)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_processor_half_precision():
    torch.manual_seed(0)
    attention = Attention(query_dim=24, heads=3, dim_head=8).bfloat16()
    hidden = torch.randn(2, 9, 24, dtype=torch.bfloat16)
    told: list[Tensor] = []
    output = CapturingProcessor(told.append)(attention, hidden)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, AttnProcessor2_0()(attention, hidden))
    [weights] = told
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize("bias_heads", [None, 1, 4])
def test_weights_of_some_heads_at_a_time_are_the_same(bias_heads, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, n, 8, generator=generator) for n in (6, 5))
    bias = None if bias_heads is None else torch.randn(2, bias_heads, 1, 5, generator=generator)
    expected = attention_weights(query, key, 0.3, bias).mean(dim=1)
    for most in (2 * 6 * 5 * 4, 2 * 6 * 5 * 3, 1):  # four heads, three, one
        monkeypatch.setattr("icekit.backbones.attention_capture.MOST_WEIGHTS", most)
        torch.testing.assert_close(mean_weights(query, key, 0.3, bias), expected)


def test_layers_have_the_grids_they_really_work_at(unet, inputs):
    """The grids read off the structure are those that every layer sees, also for latents of an odd side."""
    for latent in (LATENT, (16, 16), (12, 20), (20, 12)):
        seen: dict[str, int] = {}
        layers = attention_layers(unet, latent)
        hooks = [
            unet.get_submodule(layer.name).to_q.register_forward_hook(
                lambda module, args, output, name=layer.name, seen=seen: seen.update({name: args[0].shape[1]})
            )
            for layer in layers
        ]
        unet(**inputs | {"sample": torch.randn(2, 4, *latent)})
        for hook in hooks:
            hook.remove()
        assert len(layers) == len(unet.attn_processors) == 32
        assert {layer.name: math.prod(layer.grid) for layer in layers} == seen
    assert grids_of(attention_layers(unet, LATENT), "cross") == GRIDS
    assert grids_of(attention_layers(unet, (24, 16)), "self") == tuple((width, height) for height, width in GRIDS)


def test_captured_maps_equal_an_independent_computation(unet, inputs):
    """Weights from the recorded inputs of the projections, head by head."""
    recorded: dict[tuple[str, str], Tensor] = {}

    def record(name: str, which: str):
        return lambda module, args, output: recorded.__setitem__((name, which), output)

    layers = layers_of(unet, cross=[(8, 12)], self_=[(4, 6)])
    hooks = [
        getattr(unet.get_submodule(layer.name), which).register_forward_hook(record(layer.name, which))
        for layer in layers
        for which in ("to_q", "to_k")
    ]
    with capture_attention(unet, layers) as maps:
        unet(**inputs)
    seen = maps.means()
    for hook in hooks:
        hook.remove()

    def expected(kind: str) -> Tensor:
        weights = []
        for layer in layers:
            if layer.kind != kind:
                continue
            query, key = recorded[layer.name, "to_q"], recorded[layer.name, "to_k"]
            count = unet.get_submodule(layer.name).heads
            for q, k in zip(query.chunk(count, dim=-1), key.chunk(count, dim=-1), strict=True):
                scores = torch.einsum("bnd,bmd->bnm", q, k) / math.sqrt(q.shape[-1])
                exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
                weights.append(exponentials / exponentials.sum(-1, keepdim=True))
        assert weights
        return torch.stack(weights).mean(0)

    [words], [pixels] = seen.words, seen.pixels
    torch.testing.assert_close(words, expected("cross").transpose(1, 2).reshape(2, 7, 8, 12))
    torch.testing.assert_close(pixels, expected("self").reshape(2, 4, 6, 4, 6))


def test_prediction_is_unchanged_and_rows_sum_to_one(unet, inputs):
    expected = unet(**inputs).sample
    with capture_attention(unet, layers_of(unet, GRIDS, GRIDS)) as maps:
        actual = unet(**inputs).sample
    seen = maps.means()
    assert torch.equal(actual, expected)
    for grid, words, pixels in zip(GRIDS, seen.words, seen.pixels, strict=True):
        assert words.shape == (2, 7, *grid)
        torch.testing.assert_close(words.sum(1), torch.ones(2, *grid))
        assert pixels.shape == (2, *grid, *grid)
        torch.testing.assert_close(pixels.sum((-2, -1)), torch.ones(2, *grid))


def test_only_the_requested_layers_are_exchanged(unet):
    wanted = layers_of(unet, cross=[(16, 24)], self_=[(8, 12)])
    with capture_attention(unet, wanted):
        exchanged = {
            name.removesuffix(".processor")
            for name, processor in unet.attn_processors.items()
            if isinstance(processor, CapturingProcessor)
        }
    assert exchanged == {layer.name for layer in wanted}
    assert len(exchanged) == 10


def test_processors_come_back(unet):
    layers = layers_of(unet, GRIDS, GRIDS)
    mine = AttnProcessor2_0()
    unet.get_submodule(layers[0].name).set_processor(mine)
    before = {name: id(processor) for name, processor in unet.attn_processors.items()}
    with pytest.raises(ZeroDivisionError), capture_attention(unet, layers):
        raise ZeroDivisionError
    assert {name: id(processor) for name, processor in unet.attn_processors.items()} == before
    with capture_attention(unet, layers_of(unet, GRIDS[:1])) as outer:
        with capture_attention(unet, layers_of(unet, GRIDS[:2])):
            pass
        assert any(isinstance(processor, CapturingProcessor) for processor in unet.attn_processors.values())
    assert outer is not None
    assert {name: id(processor) for name, processor in unet.attn_processors.items()} == before


def test_a_second_prediction_replaces_the_first(unet, inputs):
    layers = layers_of(unet, [(8, 12)])
    with capture_attention(unet, layers) as maps:
        unet(**inputs)
        first = maps.means().words[0]
        unet(**inputs | {"timestep": torch.tensor([990, 990])})
        second = maps.means().words[0]
    assert not torch.equal(first, second)
    with capture_attention(unet, layers) as maps:
        unet(**inputs | {"timestep": torch.tensor([990, 990])})
    assert torch.equal(maps.means().words[0], second)


def test_gradient_flows_through_the_maps(unet, inputs):
    context = inputs["encoder_hidden_states"].requires_grad_()
    with capture_attention(unet, layers_of(unet, GRIDS[:1])) as maps:
        unet(**inputs | {"encoder_hidden_states": context})
    maps.means().words[0][0, 3].sum().backward()
    assert context.grad[0].abs().sum() > 0
    assert context.grad[1].abs().sum() == 0


def test_weights_kept_and_computed_twice_have_the_same_gradient(unet, inputs, monkeypatch):
    def gradient(kept: int) -> Tensor:
        monkeypatch.setattr("icekit.backbones.attention_capture.KEPT_WEIGHTS", kept)
        context = inputs["encoder_hidden_states"].clone().requires_grad_()
        with capture_attention(unet, layers_of(unet, GRIDS, GRIDS)) as maps:
            sample = unet(**inputs | {"encoder_hidden_states": context}).sample
        seen = maps.means()
        loss = sample.square().sum() + sum(each.square().sum() for each in (*seen.words, *seen.pixels))
        return torch.autograd.grad(loss, context)[0]

    assert torch.equal(gradient(0), gradient(2**30))


def held_by(run) -> int:
    """Bytes of the tensors that a graph keeps for its gradient, each once."""
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = run()
    assert kept is not None
    return sum(held.values())


def graph_of(unet, inputs, layers):
    """The prediction and maps, with a graph from the prompt to them."""
    with capture_attention(unet, layers) as maps:
        output = unet(**inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].requires_grad_()}).sample
    return output, maps.means()


def test_a_graph_holds_no_weights_but_their_mean(unet, inputs, monkeypatch):
    """Of layers that are not small: beside what it holds without, the maps, and the sums that they are made of."""
    monkeypatch.setattr("icekit.backbones.attention_capture.KEPT_WEIGHTS", 0)
    layers = layers_of(unet, cross=[(8, 12)])
    plain = held_by(lambda: graph_of(unet, inputs, []))
    captured = held_by(lambda: graph_of(unet, inputs, layers))
    open_weights = sum(4 * 2 * unet.get_submodule(layer.name).heads * 8 * 12 * 7 for layer in layers)
    assert captured - plain < open_weights / 2


@pytest.mark.parametrize("captures", [False, True])
def test_checkpointing_gives_the_same_bits_and_holds_less(unet, inputs, captures):
    layers = layers_of(unet, cross=GRIDS[:2]) if captures else []

    def gradient():
        context = inputs["encoder_hidden_states"].detach().requires_grad_()
        output, seen = graph_of(unet, inputs | {"encoder_hidden_states": context}, layers)
        (output.square().mean() + sum(words[:, 3].square().mean() for words in seen.words)).backward()
        return output.detach(), [one.detach() for one in seen.words], context.grad

    expected, plain = gradient(), held_by(lambda: graph_of(unet, inputs, layers))
    unet.enable_gradient_checkpointing(checkpointed)
    try:
        processors = dict(unet.attn_processors)
        actual, less = gradient(), held_by(lambda: graph_of(unet, inputs, layers))
        assert unet.attn_processors == processors  # the second pass puts back what it finds
    finally:
        unet.disable_gradient_checkpointing()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert less < plain / 2


def test_nothing_is_captured_where_nothing_is_asked_for(unet, inputs):
    with capture_attention(unet, []) as maps:
        unet(**inputs)
    assert maps.means().words == maps.means().pixels == ()
