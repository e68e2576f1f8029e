"""What CLIP's finished image tower sees at each place of a picture, and how far apart two pictures are in its eyes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icekit_tabletop.train.checkpoint import load_state
from icekit_tabletop.train.clip import build_clip, enlarge
from icekit_tabletop.train.settings import Settings


class ImageFeatures(nn.Module):
    """The image tower's feature maps of its stem and first three layers. Its weights are frozen."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.tower = build_clip().visual
        self.tower.load_state_dict(load_state(settings.work / "clip-image.safetensors", "average/")[0])
        self.tower.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Of images in -1..1, [B, 3, H, W]: four maps [B, C, S, S], S = 32, 32, 16, 8."""
        maps = [self.tower.stem(enlarge(images).contiguous(memory_format=torch.channels_last))]
        for layer in (self.tower.layer1, self.tower.layer2, self.tower.layer3):
            maps.append(layer(maps[-1]))
        return maps


def perceptual_distance(maps: list[Tensor], true: list[Tensor]) -> Tensor:
    """Distance of two pictures in a network's eyes, as in Zhang et al. 2018 ("The Unreasonable Effectiveness of Deep
    Features as a Perceptual Metric") with equal weights: mean over layers and places of ||f / |f| - g / |g|||^2, where
    f and g are the features of a place. Scalar, 0 to 4; maps as of `ImageFeatures`.
    """
    return torch.stack(
        [
            (F.normalize(one.float(), dim=1) - F.normalize(other.float(), dim=1)).square().sum(1).mean()
            for one, other in zip(maps, true, strict=True)
        ]
    ).mean()
