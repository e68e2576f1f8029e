"""Where concepts are in a picture, by what attention gives out and not by its weights: ConceptAttention.

Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features" (ICML 2025).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from icekit.protocols import NO_TOKENS, Conditioning, InputError, Tokens
from icekit_dit.attention import Capture
from icekit_dit.transformer import TransformerBackbone


def shares_of_concepts(concepts: Tensor, places: Tensor) -> Tensor:
    """How much of each place is each concept's:  softmax over k of o_k . o_n  (Helbling et al., section 4).

    Args:
        concepts: o_k, ``[B, K, D]``: what comes out of the attention at the concepts.
        places: o_n, ``[B, N, D]``: what comes out of it at the picture's places.

    Returns:
        float32 ``[B, K, N]`` in [0, 1]; sums over the concepts are one.
    """
    return (concepts.float() @ places.float().transpose(1, 2)).softmax(dim=1)


class ConceptTransformerBackbone(TransformerBackbone):
    """A diffusion transformer whose blocks have a stream for the text beside the picture's.

    Concepts go through the text's weights as further positions. They attend to themselves and to the picture, and are
    attended to by nobody: each block is run a second time, with the concepts as its text, and nothing but what becomes
    of the concepts is kept. So the picture stays the same, bit for bit.
    """

    concepts_from: ClassVar[float] = 0.5
    """Share of the blocks before those that concepts are read from: the first know little of what is where."""

    def _joint_blocks(self) -> Sequence[Any]:
        """The blocks with a stream for the text."""
        blocks: Sequence[Any] = self.transformer.transformer_blocks
        return blocks

    @abstractmethod
    def _capturing_outputs(self, capture: Capture) -> AbstractContextManager[None]:
        """Let the attention of ``_joint_blocks`` keep what comes out of it; layers are numbered in their order."""

    def _concept_positions(self, concept: str, tokens: Tokens) -> list[int]:
        """The positions of the part "sequence" that a concept is read from, in a prompt of nothing else."""
        return self.token_positions(concept, [concept], tokens)[0]

    def _concept_arguments(self, given: Mapping[str, Any], concepts: int) -> dict[str, Any]:
        """What a block is called with when its text is so many concepts, from what it was called with."""
        return dict(given)

    @torch.no_grad()
    def concept_maps(
        self,
        noisy: Tensor,
        shares: Tensor,
        prompts: Conditioning,
        concepts: Sequence[str],
        tokens: Tokens = NO_TOKENS,
    ) -> Tensor:
        """See ``protocols.ConceptBackbone``: mean over the later blocks of ``shares_of_concepts``."""
        if not concepts:
            raise InputError("there is no concept to look for: give one or more")
        states = self._concept_states(concepts, tokens)
        self._parts.use("transformer")
        embedded = self.transformer.context_embedder(states.to(self.transformer.dtype))
        with self._reading(embedded.expand(len(noisy), -1, -1)) as read:
            self._predicted(noisy, shares, prompts)
        maps = torch.stack(read).mean(dim=0)
        return maps.unflatten(2, self._grid)

    def _concept_states(self, concepts: Sequence[str], tokens: Tokens) -> Tensor:
        """Each concept by itself, as the transformer reads it: the mean over its positions, ``[K, C]``."""
        sequence = self.encode_prompts(list(concepts), tokens).parts["sequence"]
        places = [self._concept_positions(concept, tokens) for concept in concepts]
        return torch.stack([one[own].mean(dim=0) for one, own in zip(sequence, places, strict=True)])

    @contextmanager
    def _reading(self, concepts: Tensor) -> Iterator[list[Tensor]]:
        """Take concepts ``[B, K, D]`` along through the blocks of a pass; yields the later's maps ``[B, K, N]``."""
        blocks = self._joint_blocks()
        first = min(math.ceil(self.concepts_from * len(blocks)), len(blocks) - 1)
        capture, stream, maps = Capture(outputs=True), [concepts], list[Tensor]()

        def after(layer: int, block: Any, given: Mapping[str, Any]) -> None:
            _, places = capture.outputs[layer]
            own = self._concept_arguments(given, stream[0].shape[1]) | {"encoder_hidden_states": stream[0]}
            stream[0], _ = block.forward(**own)
            at_concepts, _ = capture.outputs.pop(layer)
            if layer >= first:
                maps.append(shares_of_concepts(at_concepts, places))

        with self._capturing_outputs(capture), ExitStack() as hooks:
            for layer, block in enumerate(blocks):
                hook = block.register_forward_hook(
                    lambda block, _arguments, given, _output, layer=layer: after(layer, block, given), with_kwargs=True
                )
                hooks.callback(hook.remove)
            yield maps
