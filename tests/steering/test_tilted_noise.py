"""Noise of the tilted law: Gaussian tilts in closed form, and diagnostics of chains of known size."""

import math

import numpy as np
import pytest
import torch

from am_diffusers.noise import generators_for
from am_diffusers.steering import tilted_noise
from am_diffusers.steering.mixing import effective_size, split_rhat
from am_diffusers.steering.tilted_noise import State, importance, log_acceptance, propose, sample_noise

CHAINS, DIM = 64, 3
SLOPE = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)


def linear(x):
    """The end of a linear sampler scored linearly: nu* is N(reward_scale * SLOPE, I)."""
    return x @ SLOPE, SLOPE.expand_as(x)


def quadratic(x):
    """-|x - 1|^2: with scale 1 / 2, nu* is N(1 / 2, I / 2)."""
    return -(x - 1).square().sum(1), -2 * (x - 1)


def constant(x):
    return x.new_zeros(len(x)), torch.zeros_like(x)


def run(evaluate, reward_scale, steps=400, **options):
    generators = generators_for(0, 0, range(CHAINS))
    noise = torch.stack([torch.randn(DIM, generator=g, dtype=torch.float64) for g in generators])
    return sample_noise(
        evaluate, noise, generators, reward_scale=reward_scale, steps=steps, burn_in=200, **options
    )


def within_errors(found, mean, variance, errors=4.0):
    """Mean and variance of each coordinate against a Gaussian's, in standard errors by effective size."""
    draws = found.noise.numpy()
    for i in range(DIM):
        size = effective_size(draws[:, :, i])
        if abs(draws[:, :, i].mean() - mean[i]) > errors * math.sqrt(variance / size):
            return False
        squares = (draws[:, :, i] - mean[i]) ** 2
        if abs(squares.mean() - variance) > errors * variance * math.sqrt(2 / effective_size(squares)):
            return False
    return True


@pytest.mark.parametrize(
    ("evaluate", "scale", "mean", "variance"),
    [
        (linear, 0.8, 0.8 * SLOPE.numpy(), 1.0),
        (quadratic, 0.5, [0.5] * DIM, 0.5),
        (constant, 3.0, [0.0] * DIM, 1.0),
    ],
)
def test_chains_have_the_gaussian_tilts_mean_and_variance(evaluate, scale, mean, variance):
    """64 chains of 400 steps, seed 0, four standard errors."""
    found = run(evaluate, scale)
    assert within_errors(found, mean, variance)
    assert 0.3 < found.accepted <= 1
    assert split_rhat(found.rewards.numpy()) < 1.05


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_any_gradient_leaves_the_law_as_it_is(factor):
    """Proposals only: without a gradient this is pCN; against it, slow."""
    found = run(lambda x: (linear(x)[0], factor * linear(x)[1]), 0.8)
    assert within_errors(found, 0.8 * SLOPE.numpy(), 1.0)


def test_the_other_sign_is_another_law(monkeypatch):
    right = log_acceptance
    monkeypatch.setattr(tilted_noise, "log_acceptance", lambda *rest: -right(*rest))
    assert not within_errors(run(quadratic, 0.5), [0.5] * DIM, 0.5)


def test_acceptance_goes_to_1_with_the_step_and_is_1_on_the_prior():
    x = torch.randn(50, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    xi = torch.randn(50, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def largest(evaluate, delta):
        here = State(x, *evaluate(x))
        y = propose(here, 2.0, delta, xi)
        return log_acceptance(here, State(y, *evaluate(y)), 2.0, delta).abs().max().item()

    ratios = [largest(quadratic, delta) for delta in (1e-1, 1e-3, 1e-5)]
    assert ratios[0] > 10 * ratios[1] > 100 * ratios[2]
    assert ratios[2] < 1e-3
    assert largest(constant, 1.0) == 0


def test_thinned_states_belong_to_their_rewards():
    found = run(quadratic, 0.5, steps=20, thin=5)
    assert found.noise.shape == (4, CHAINS, DIM)
    assert found.rewards.shape == (20, CHAINS)
    torch.testing.assert_close(found.kept, found.rewards[4::5])
    torch.testing.assert_close(torch.stack([quadratic(x)[0] for x in found.noise]), found.kept)


def test_importance_sampling_of_a_linear_reward():
    """N(0, 1): tilted mean scale, share exp(-scale^2). n = 20000, seed 0, four standard errors."""
    rewards = np.random.default_rng(0).standard_normal(20000)
    found = importance(rewards, 0.7)
    assert abs(found.mean - 0.7) < 4 * found.standard_error
    assert found.share == pytest.approx(math.exp(-0.49), rel=0.05)
    assert found.weights.sum() == pytest.approx(1)
    parts = [importance(part, 0.7) for part in rewards.reshape(100, 200)]
    errors = np.mean([each.standard_error for each in parts])
    assert errors == pytest.approx(np.std([each.mean for each in parts]), rel=0.3)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_the_effective_size_of_an_autoregression(memory):
    """N (1 - phi) / (1 + phi): 8 chains of 2000, seed 0."""
    generator = np.random.default_rng(0)
    draws = np.zeros((2000, 8))
    draws[0] = generator.standard_normal(8)
    for t in range(1, 2000):
        draws[t] = memory * draws[t - 1] + math.sqrt(1 - memory**2) * generator.standard_normal(8)
    assert effective_size(draws) == pytest.approx(16000 * (1 - memory) / (1 + memory), rel=0.15)
    assert split_rhat(draws) < 1.02
    assert split_rhat(draws + np.arange(8)) > 1.5
    assert effective_size(draws + np.arange(8)) < 40
    # Halves of a trend from 0 to 5 lie 2.5 apart, which adds 2.5^2 / 12 to the variance within them.
    between, within = 1.25**2 * 16 / 15, 1 + 2.5**2 / 12
    trend = np.linspace(0, 5, 2000)[:, None]
    assert split_rhat(draws + trend) == pytest.approx(math.sqrt(1 + between / within), rel=0.02)


def test_chains_too_short_to_tell_are_refused():
    with pytest.raises(ValueError, match="at least 4 draws"):
        split_rhat(np.zeros((3, 2)))
    assert split_rhat(np.zeros((8, 2))) == 1.0
