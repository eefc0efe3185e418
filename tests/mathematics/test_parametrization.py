"""Conversions between velocity, clean estimate, noise estimate and score."""

import pytest
import torch

from am_diffusers import parametrization as p
from oracles import THREE_MODES

SIGMA = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(2, 7, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [SIGMA, 0.3])
def test_conversions_invert(pair, sigma):
    clean, noise = pair
    x, velocity = p.interpolate(clean, noise, sigma), noise - clean
    score = p.score_from_velocity(x, sigma, velocity)
    for got, expected in [
        (p.clean_from_velocity(x, sigma, velocity), clean),
        (p.noise_from_velocity(x, sigma, velocity), noise),
        (p.velocity_from_clean(x, sigma, clean), velocity),
        (p.velocity_from_noise(x, sigma, noise), velocity),
        (p.velocity_from_score(x, sigma, score), velocity),
    ]:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_sigma_per_sample_is_applied_to_its_own_sample(pair):
    clean, noise = pair
    together = p.interpolate(clean, noise, SIGMA)
    for i, sigma in enumerate(SIGMA.tolist()):
        assert torch.equal(together[i : i + 1], p.interpolate(clean[i : i + 1], noise[i : i + 1], sigma))


def test_score_is_the_gradient_of_the_log_density_of_the_noisy_law():
    torch.manual_seed(0)
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(THREE_MODES.log_density(x, SIGMA).sum(), x)
    score = p.score_from_velocity(x, SIGMA, THREE_MODES.velocity(x, SIGMA))
    torch.testing.assert_close(score.detach(), expected, rtol=0, atol=1e-10)


def test_memoryless_eta_is_the_ratio_of_noise_to_signal():
    assert p.memoryless_eta(0.75) == 3.0
