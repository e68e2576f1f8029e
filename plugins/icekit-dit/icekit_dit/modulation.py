"""What a diffusion transformer's blocks are told of a prompt's single words: an offset of the modulation.

A block normalises the states of the text and scales, shifts and gates them by numbers that it computes from one vector,
the same for all positions: the time and the pooled text. TokenVerse adds an offset to that vector at the positions of
one word, which steers what becomes of that word alone:

    Garibi et al., "TokenVerse: Versatile Multi-concept Personalization in Token Modulation Space" (SIGGRAPH 2025).

Here: the offsets of a pass, put into the blocks of FLUX.1 and Stable Diffusion 3.x by hooks that stay no longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

MODULATION = "modulation"
"""The name of a token's offset among its rows."""


@dataclass(frozen=True)
class Offsets:
    """Offsets of the modulation in a batch of prompts.

    values: float ``[B, T, D]``. positions: int64 ``[B, T]``, of the prompt; -1 where there is none.
    """

    values: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: Mapping[str, Tensor], found: Sequence[Mapping[str, Sequence[int]]]) -> Self:
        """From tokens' offsets, ``[D]``, and each prompt's tokens with their positions. At least one token."""
        names = list(rows)
        pairs = [[(names.index(name), place) for name, own in one.items() for place in own] for one in found]
        longest = max(map(len, pairs))
        filled = [[*one, *[(0, -1)] * (longest - len(one))] for one in pairs]
        stacked = torch.stack(list(rows.values()))
        table = torch.tensor(filled, device=stacked.device).reshape(len(found), longest, 2)
        return cls(stacked[table[..., 0]], table[..., 1])

    def places(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of M offsets the prompt's number and the position, int64 ``[M]``, and the values ``[M, D]``.

        batch: the prompts of a pass. Where they are more than the offsets', those are the last: classifier-free
            guidance puts empty prompts first.
        """
        row, column = (self.positions >= 0).nonzero(as_tuple=True)
        return row + batch - len(self.positions), self.positions[row, column], self.values[row, column]


def modulated(states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Adaptive layer normalisation:  (1 + scale) x + shift  (Peebles and Xie, "Scalable Diffusion Models with
    Transformers", ICCV 2023).

    Args:
        states: x, normalised, ``[M, D]``.
        scale: ``[M, D]``.
        shift: ``[M, D]``.

    Returns:
        ``[M, D]``.
    """
    return (1 + scale) * states + shift


def spread(everywhere: Tensor, special: Tensor, places: tuple[Tensor, Tensor], length: int) -> Tensor:
    """Numbers that are the same at all positions, but for some.

    Args:
        everywhere: ``[B, D]``.
        special: ``[M, D]``.
        places: the M prompts and positions.
        length: how many positions there are.

    Returns:
        ``[B, length, D]``.
    """
    return everywhere.unsqueeze(1).repeat(1, length, 1).index_put(places, special.to(everywhere.dtype))


@contextmanager
def offset_modulation(transformer: Any, offsets: Offsets | None) -> Iterator[None]:
    """A transformer of FLUX.1 or Stable Diffusion 3.x with offsets of its modulation, for the length of the block.

    The picture's own stream is told what it was told without them. A block that is computed again for its gradient has
    the offsets then, too, whatever has ended by that time.

    offsets: None changes nothing.
    """
    if offsets is None or not bool((offsets.positions >= 0).any()):
        yield
        return
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]
    if torch.is_grad_enabled() and transformer.gradient_checkpointing:
        before = transformer._gradient_checkpointing_func
        transformer._gradient_checkpointing_func = lambda block, *arguments: before(Again(block, offsets), *arguments)
        try:
            yield
        finally:
            transformer._gradient_checkpointing_func = before
        return
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(offset_block(block, offsets))
        yield


class Again(nn.Module):
    """A block that has its offsets whenever it is called."""

    def __init__(self, block: nn.Module, offsets: Offsets) -> None:
        super().__init__()
        self.block = block
        self._offsets = offsets

    def forward(self, *arguments: Any) -> Any:
        with offset_block(self.block, self._offsets):
            return self.block(*arguments)


@contextmanager
def offset_block(block: Any, offsets: Offsets) -> Iterator[None]:
    """One block with offsets, see ``offset_modulation``.

    A block multiplies by numbers that are the same at all positions. It is given ones and zeros for them, and what it
    multiplies is multiplied before it: by numbers that are not.
    """
    hooks = _OneStream(block, offsets) if hasattr(block, "norm") else _TwoStreams(block, offsets)
    with ExitStack() as stack:
        for module, hook in hooks.hooks():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


class _Hooks:
    """What hooks of one block share in one pass."""

    def __init__(self, block: Any, offsets: Offsets) -> None:
        self._block, self._offsets = block, offsets
        self._numbers: dict[str, Tensor] = {}

    def _told(self, norm: Any, told: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Where there are offsets, and what the norm's layer makes of the vector ``told``, ``[B, D]``, with them."""
        prompts, positions, values = self._offsets.places(len(told))
        vectors = (told[prompts].float() + values.to(told.device, torch.float32)).to(told.dtype)
        return (prompts, positions), norm.linear(norm.silu(vectors))

    def _times(self, name: str, output: Tensor) -> Tensor:
        return output * self._numbers.pop(name)


class _TwoStreams(_Hooks):
    """A block with a stream for the text, whose norm is ``norm1_context``."""

    def hooks(self) -> list[tuple[nn.Module, Any]]:
        block = self._block
        if getattr(block, "context_pre_only", False):  # nothing becomes of the text after its attention
            return [(block.norm1_context, self._last_norm)]
        return [
            (block.norm1_context, self._norm),
            (block.attn, self._attention),
            (block.norm2_context, lambda _module, _arguments, _named, output: self._second_norm(output)),
            (block.ff_context, lambda _module, _arguments, _named, output: self._times("feed_forward", output)),
        ]

    def _norm(self, norm: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
        states = arguments[0]
        places, numbers = self._told(norm, named["emb"])
        shift, scale, *special = numbers.chunk(6, dim=-1)
        own = modulated(norm.norm(states[places]), scale, shift).to(states.dtype)
        names = ("attention", "shift", "scale", "feed_forward")
        for name, everywhere, one in zip(names, output[1:], special, strict=True):
            self._numbers[name] = spread(everywhere, one, places, states.shape[1])
        one, nothing = torch.ones_like(output[1]), torch.zeros_like(output[1])
        return output[0].index_put(places, own), one, nothing, nothing, one

    def _last_norm(self, norm: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> Tensor:
        states, told = arguments[:2]
        places, numbers = self._told(norm, told)
        scale, shift = numbers.chunk(2, dim=-1)
        return output.index_put(places, modulated(norm.norm(states[places]), scale, shift).to(output.dtype))

    def _attention(self, _attention: Any, _arguments: Any, _named: Any, output: Any) -> Any:
        places, positions, *more = output
        return (places, self._times("attention", positions), *more)

    def _second_norm(self, output: Tensor) -> Tensor:
        return output * (1 + self._numbers.pop("scale")) + self._numbers.pop("shift")


class _OneStream(_Hooks):
    """A block in which the prompt and the picture are one sequence, the prompt first."""

    def hooks(self) -> list[tuple[nn.Module, Any]]:
        return [
            (self._block.norm, self._norm),
            (self._block.proj_out, lambda _module, _arguments, _named, output: self._times("gate", output)),
        ]

    def _norm(self, norm: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
        states = arguments[0]
        places, numbers = self._told(norm, named["emb"])
        shift, scale, gate = numbers.chunk(3, dim=-1)
        own = modulated(norm.norm(states[places]), scale, shift).to(states.dtype)
        self._numbers["gate"] = spread(output[1], gate, places, states.shape[1])
        return output[0].index_put(places, own), torch.ones_like(output[1])


@contextmanager
def in_pipeline(pipeline: Any, offsets: Mapping[str, Tensor]) -> Iterator[None]:
    """Let diffusers' own ``FluxPipeline`` or ``StableDiffusion3Pipeline`` use tokens' offsets, where its prompt has the
    tokens; their rows must be in its tokenizers and text encoders.

        rows = safetensors.torch.load_file("runs/photo/embeddings/mug-0.safetensors")
        with in_pipeline(pipeline, {"<mug-0>": rows["modulation"]}):
            image = pipeline("a photo of <mug-0>").images[0]

    offsets: token -> ``[D]``.
    """
    encode, stack, found = pipeline.encode_prompt, ExitStack(), list[Offsets | None]([None])

    def encode_prompt(*arguments: Any, **named: Any) -> Any:
        prompts = named["prompt"] if "prompt" in named else arguments[0]
        prompts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        places = [{name: _places(pipeline, prompt, name) for name in offsets} for prompt in prompts]
        found[0] = Offsets.of(offsets, places) if prompts else None
        return encode(*arguments, **named)

    def enter(transformer: Any, _arguments: Any) -> None:
        stack.enter_context(offset_modulation(transformer, found[0]))

    before = pipeline.transformer.register_forward_pre_hook(enter)
    after = pipeline.transformer.register_forward_hook(lambda *_: stack.close(), always_call=True)
    pipeline.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del pipeline.encode_prompt
        stack.close()
        before.remove()
        after.remove()


def _places(pipeline: Any, prompt: str, token: str) -> list[int]:
    """The positions of a token in what the pipeline's transformer reads of a prompt."""
    places, start = [], 0
    for name in ("tokenizer", "tokenizer_3") if hasattr(pipeline, "tokenizer_3") else ("tokenizer_2",):
        tokenizer = getattr(pipeline, name)
        if tokenizer is None:
            continue
        own = tokenizer.convert_tokens_to_ids(token)
        ids = tokenizer(prompt).input_ids
        places += [start + place for place, piece in enumerate(ids) if piece == own]
        start += tokenizer.model_max_length
    return places
