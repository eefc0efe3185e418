"""Rewards without weights: their optima and values by hand."""

import pytest
import torch

from am_diffusers.rewards import Colourfulness, Symmetry


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
def test_gradients_against_central_differences(reward):
    generator = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    above, below = (reward(images + s * 1e-5 * direction, ["x"] * 2).sum() for s in (1, -1))
    expected = ((above - below) / 2e-5).item()
    assert (gradient(reward, images) * direction).sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reward", [Colourfulness(), Symmetry()])
def test_gradient_ascent_reaches_the_optimum(reward):
    """Greyish noise becomes colourful, or symmetric."""
    images = 0.4 + 0.2 * torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(500):
        images = (images + 2 * gradient(reward, images)).clamp(0, 1)
    assert reward(images, ["x"]).item() > {"colourfulness": 1.0, "symmetry": -1e-4}[reward.name]
