"""The alignment of the `unet` stage: the UNet's middle should see in a noisy picture what CLIP sees in the clean one.

Representation alignment (Yu et al. 2025, "Representation Alignment for Generation: Training Diffusion Transformers Is
Easier Than You Think"): what a denoiser must know of a picture, shapes above all, it learns slowly from noise alone and
quickly from an encoder that knows it. Here the encoder is our own CLIP's image tower, which learned from captions.
"""

from __future__ import annotations

from types import TracebackType

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

WIDTH = 384
"""Channels of the image tower's third layer, whose grid of 8x8 is that of the UNet's middle."""


def build_eyes(width: int = 128) -> nn.Sequential:
    """From a place of the UNet's middle, [..., width], to what CLIP should see there, [..., WIDTH]."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, WIDTH))


class Middle:
    """The output of a UNet's middle block in its last forward pass. Use as a context manager."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._block = unet.mid_block
        self._output: Tensor | None = None

    def __enter__(self) -> Middle:
        def keep(_block: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._output = output

        self._hook = self._block.register_forward_hook(keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        self._output = None

    @property
    def places(self) -> Tensor:
        """[B, N, C] for N places."""
        assert self._output is not None, "there was no forward pass yet"
        return self._output.flatten(2).transpose(1, 2)


def alignment_loss(seen: Tensor, looks: Tensor) -> Tensor:
    """One less the cosine between what is seen at a place and how it looks, mean over pictures and places.

    Every channel of `looks` is first brought to zero mean and unit variance over the batch: else the cosine would be
    that of what all places have in common.

    Args:
        seen: [B, N, C], for N places in rows of the grid.
        looks: [B, C, H, W] with H * W = N.

    Returns:
        Scalar float32, 0 to 2.
    """
    target = looks.float().flatten(2).transpose(1, 2)
    target = (target - target.mean((0, 1))) / (target.std((0, 1)) + 1e-5)
    return (1 - F.cosine_similarity(seen.float(), target, dim=-1)).mean()
