"""A small classifier trained on renders alone: it reads shapes, colours and materials from pictures, so that generated
pictures can be judged by something that none of the models has had a part in.

`python -m icekit_tabletop.probe` trains the one that comes with the package, in a quarter of an hour on a core.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from icekit_tabletop.render import render_batch
from icekit_tabletop.train.checkpoint import load_state, save_state
from icekit_tabletop.train.data import EVALUATION_SEED, scene_of_count
from icekit_tabletop.train.settings import IMAGE_SIZE
from icekit_tabletop.world import COLOURS, MATERIALS, SHAPES, SceneSpec

PROBE_SEED = EVALUATION_SEED + 500_000_000
PROBE_SCENES = 20_000
EPOCHS = 8
BATCH = 64
SHIPPED = Path(__file__).resolve().parent / "probe.safetensors"
"""The probe that comes with the package, in half precision."""

_SHAPES, _COLOURS = tuple(SHAPES), tuple(COLOURS)


class Probe(nn.Module):
    """Images in -1..1, [B, 3, 64, 64], to logits of shape [B, 10], colour [B, 8] and material [B, 5], meant for single
    objects, and of the presence of each shape in each colour, [B, 10, 8], meant for any number.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk = nn.Sequential(*layers)
        self.single = nn.Linear(2 * widths[-1], len(SHAPES) + len(COLOURS) + len(MATERIALS))
        # Presence is decided place by place, then the best place counts: binding is local.
        self.place = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(widths[-1], len(SHAPES) * len(COLOURS), 1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        features = self.trunk(images)
        pooled = torch.cat([features.amax((2, 3)), features.mean((2, 3))], dim=1)
        shape, colour, material = self.single(pooled).split([len(SHAPES), len(COLOURS), len(MATERIALS)], dim=1)
        pairs = self.place(features).logsumexp((2, 3)) - math.log(features.shape[2] * features.shape[3])
        return shape, colour, material, pairs.unflatten(1, (len(SHAPES), len(COLOURS)))


def _labels(scenes: list[SceneSpec]) -> tuple[Tensor, Tensor]:
    """int64 [N, 3] of the single object's shape, colour, material (-100, ignored, elsewhere); float [N, 10, 8]."""
    single = torch.full((len(scenes), 3), -100)
    pairs = torch.zeros(len(scenes), len(SHAPES), len(COLOURS))
    for row, scene in enumerate(scenes):
        specs = [item.spec for item in scene.objects]
        for spec in specs:
            pairs[row, _SHAPES.index(spec.shape), _COLOURS.index(spec.colour)] = 1
        if len(specs) == 1:
            spec = specs[0]
            single[row] = torch.tensor(
                [_SHAPES.index(spec.shape), _COLOURS.index(spec.colour), MATERIALS.index(spec.material)]
            )
    return single, pairs


def _soften(images: Tensor, rng: random.Random) -> Tensor:
    """Shifts, mirrors and sometimes blurs a batch: a decoder's pictures are softer than a renderer's."""
    images = images.roll((rng.randint(-3, 3), rng.randint(-3, 3)), dims=(2, 3))
    if rng.random() < 0.5:
        images = images.flip(-1)
    if rng.random() < 0.4:
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images + 0.03 * rng.random() * torch.randn_like(images)


def train_probe(scenes: int = PROBE_SCENES, epochs: int = EPOCHS, seed: int = 0) -> Probe:
    """Renders scenes of one, two or three objects, held-out combinations among them, and trains on those."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    specs = [scene_of_count(PROBE_SEED + i, rng.choices((1, 2, 3), (0.55, 0.3, 0.15))[0], "any") for i in range(scenes)]
    pictures = []
    for start in tqdm(range(0, scenes, 50), desc="probe: renders", file=sys.stderr):
        pictures.append(render_batch(specs[start : start + 50], IMAGE_SIZE)[0])
    images = torch.cat(pictures)
    single, pairs = _labels(specs)
    probe = Probe()
    optimiser = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=1e-3)
    steps = epochs * (scenes // BATCH)
    order = np.random.default_rng(seed)
    with tqdm(total=steps, desc="probe: training", file=sys.stderr) as bar:
        for epoch in range(epochs):
            shuffled = torch.from_numpy(order.permutation(scenes))
            for index, rows in enumerate(shuffled[: scenes // BATCH * BATCH].split(BATCH)):
                done = (epoch * (scenes // BATCH) + index) / steps
                for group in optimiser.param_groups:
                    group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * done))
                outputs = probe(_soften(images[rows].float() / 127.5 - 1, rng))
                loss = 20 * F.binary_cross_entropy_with_logits(outputs[3], pairs[rows])
                for column in range(3):
                    loss = loss + F.cross_entropy(outputs[column], single[rows, column])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                bar.update()
    return probe.eval()


def write_probe(probe: Probe, path: Path = SHIPPED) -> None:
    """Writes a probe as the package ships it."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in probe.state_dict().items()}
    save_state(path, half, {"scenes": PROBE_SCENES, "epochs": EPOCHS})


@functools.cache
def shipped_probe() -> Probe:
    """The probe that comes with the package."""
    probe = Probe()
    probe.load_state_dict(load_state(SHIPPED)[0])
    return probe.eval()


if __name__ == "__main__":
    write_probe(train_probe())
