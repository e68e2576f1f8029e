"""Erasing a region: what is filled in, and what stays."""

import pytest
import torch

from icekit.pixels import erase, isolate


def test_fillings() -> None:
    image = torch.full((3, 64, 64), 0.25)
    image[:, 20:40, 20:40] = 1.0
    visible = torch.ones(64, 64, dtype=torch.bool)
    visible[20:40, 20:40] = False
    assert torch.equal(erase(image, visible, "black"), image * visible)
    for how in ("mean", "inpaint"):
        filled = erase(image, visible, how)  # type: ignore[arg-type]
        assert filled.dtype == torch.float32
        assert torch.allclose(filled, torch.full_like(image, 0.25), atol=1e-6)


@pytest.mark.parametrize("how", ["black", "mean", "inpaint"])
def test_extremes(how: str) -> None:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(64, 64, dtype=torch.bool)
    assert torch.equal(erase(image, everything, how), image)  # type: ignore[arg-type]
    assert erase(image, ~everything, how).abs().sum() == 0  # type: ignore[arg-type]
    alone = ~everything
    alone[30, 30] = True
    assert erase(image, alone, how).isfinite().all()  # type: ignore[arg-type]
    noisy = erase(image, torch.rand(64, 64) < 0.5, how)  # type: ignore[arg-type]
    assert 0 <= noisy.min() <= noisy.max() <= 1


def test_a_region_alone_keeps_its_silhouette() -> None:
    image = torch.full((3, 64, 64), 0.25)
    image[:, :, 60:] = 0.75
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[20:40, 20:40] = True
    image[:, mask] = 1.0
    alone = isolate(image, mask)
    assert torch.equal(alone[:, mask], image[:, mask])
    outside = (0.25 * (64 * 60 - 400) + 0.75 * 64 * 4) / (64 * 64 - 400)
    assert torch.allclose(alone[:, ~mask], torch.tensor(outside))
    everything = torch.ones(64, 64, dtype=torch.bool)
    assert torch.equal(isolate(image, everything), image)
