"""Rewards without weights: their optima and values by hand."""

import pytest
import torch

from am_diffusers.rewards import Brightness, Colourfulness, ImageFeatures, JpegSize, Symmetry


def gradient(reward, images):
    images = images.clone().requires_grad_(True)
    return torch.autograd.grad(reward(images, ["x"] * len(images)).sum(), images)[0]


def test_colourfulness_by_hand():
    """Half red, half blue: rg is 1 and 0, yb is .5 and -1."""
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0, :, :2], images[0, 2, :, 2:] = 1, 1
    images[1] = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    scores = Colourfulness()(images, ["a", "b"])
    expected = (0.5**2 + 0.75**2) ** 0.5 + 0.3 * (0.5**2 + 0.25**2) ** 0.5
    assert scores.tolist() == pytest.approx([expected, 0], abs=2e-6)
    assert gradient(Colourfulness(), images).isfinite().all()


def test_symmetry_by_hand():
    images = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    images[1] = (images[1] + images[1].flip(-1)) / 2
    images[2] = 0
    images[2, :, :, :3] = 1
    scores = Symmetry()(images, ["a", "b", "c"])
    assert scores[0] < scores[1]
    assert scores[1:].tolist() == [0, -1]


@pytest.mark.parametrize("reward", [Colourfulness(), Symmetry()])
def test_gradient_ascent_reaches_the_optimum(reward):
    """Greyish noise becomes colourful, or symmetric."""
    images = 0.4 + 0.2 * torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(500):
        images = (images + 2 * gradient(reward, images)).clamp(0, 1)
    assert reward(images, ["x"]).item() > {"colourfulness": 1.0, "symmetry": -1e-4}[reward.name]


def test_brightness_and_jpeg_size():
    images = torch.stack([torch.full((3, 32, 32), 0.25), torch.rand(3, 32, 32)]).requires_grad_()
    brightness = Brightness()(images, ["a", "b"])
    assert brightness[0].item() == pytest.approx(0.25)
    assert torch.autograd.grad(brightness.sum(), images)[0].eq(1 / (3 * 32 * 32)).all()
    flat, noisy = JpegSize()(images, ["a", "b"]).tolist()
    assert 300 < flat < noisy
    assert not JpegSize.differentiable
    assert not isinstance(Brightness(), ImageFeatures)
