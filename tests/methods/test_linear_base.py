"""Targets of Efficient Adjoint Matching: conditional means by quadrature, the error of the score."""

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from am_diffusers.methods.parts.linear_base import (
    capped_weight,
    later_state,
    linear_target,
    renoised_score,
    stratified_sigmas,
)
from oracles import Mixture, float64, gaussian

LAW = Mixture(float64(0.4, 0.35, 0.25), float64(-1.2, 0.2, 1.4)[:, None], float64(0.25, 0.35, 0.2) ** 2)
REWARDS = {
    "linear": lambda x: 1.5 * x,
    "quadratic": lambda x: -2 * (x - 1) ** 2,
    "nonlinear": lambda x: 2 * torch.tanh(1.5 * x) + 0.8 * torch.sin(3 * x),
}
VARIANCES = (0.01, 0.2, 1.0, 5.0)
SIGMAS = (0.15, 0.3, 0.6, 0.9, 1.0)
STATES = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
# Trapezoid rule on smooth functions that vanish at both ends: exact to rounding.
GRID = torch.linspace(-8, 8, 1601, dtype=torch.float64)


def gradient(function, x):
    x = x.clone().requires_grad_(True)
    (result,) = torch.autograd.grad(function(x).sum(), x)
    return result


def law_at(sigma):
    """Log density on GRID, up to a constant, and score of the data noised to `sigma`."""

    def log_density(x):
        return LAW.log_density(x[:, None], sigma)

    return log_density(GRID), gradient(log_density, GRID)


def posterior(log_density, start_sigma, sigma):
    """Law of the earlier state on GRID given each of STATES at `sigma`, (S, G)."""
    ratio = (1 - sigma) / (1 - start_sigma)
    variance = sigma**2 - (ratio * start_sigma) ** 2
    return (log_density - 0.5 * (STATES[:, None] - ratio * GRID) ** 2 / variance).softmax(1)


def mean_target(weights, start_sigma, sigma, score, value_gradient, variance):
    """Mean of the target given each of STATES, by quadrature, (S,)."""
    grid = GRID.expand(len(STATES), -1)
    targets = linear_target(
        STATES[:, None].expand_as(grid),
        torch.full((len(STATES),), sigma, dtype=torch.float64),
        grid,
        start_sigma,
        score=score.expand_as(grid),
        adjoint=-value_gradient.expand_as(grid),
        variance=variance,
    )
    return (weights * targets).sum(1)


@pytest.mark.parametrize("reward", REWARDS)
def test_the_mean_target_is_the_tilted_velocity(reward):
    """Exact oracle, 1e-10: clean from the tilted law, for every C and noise level."""
    log_density, score = law_at(0.0)
    tilted = log_density + REWARDS[reward](GRID)
    for sigma in SIGMAS:
        weights = posterior(tilted, 0.0, sigma)
        exact = (STATES - weights @ GRID) / sigma
        base = LAW.velocity(STATES[:, None], sigma)[:, 0]
        for variance in VARIANCES:
            found = mean_target(weights, 0.0, sigma, score, gradient(REWARDS[reward], GRID), variance)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
        assert (exact - base).abs().max() > 0.05


@pytest.mark.parametrize("stop", [0.05, 0.25])
def test_a_stopped_horizon_is_exact_given_the_value_where_it_stops(stop):
    """Exact oracle, 1e-10: x_e from its tilted law, the true value exp(V) = E[exp(r(clean)) | x_e].

    The value is that of the whole problem, so the velocity is that of the tilted data.
    """
    log_clean, _ = law_at(0.0)
    reward = REWARDS["nonlinear"](GRID)
    joint = log_clean - 0.5 * ((GRID[:, None] - (1 - stop) * GRID) / stop) ** 2
    log_marginal = joint.logsumexp(1)
    value = (joint + reward).logsumexp(1) - log_marginal
    # grad V from the difference of the two scores, each -(x - t E[clean | x]) / stop^2.
    means = [law.softmax(1) @ GRID for law in (joint, joint + reward)]
    value_gradient = (1 - stop) / stop**2 * (means[1] - means[0])
    _, score = law_at(stop)
    for sigma in (s for s in SIGMAS if s > stop):
        clean = posterior(log_clean + reward, 0.0, sigma)
        exact = (STATES - clean @ GRID) / sigma
        weights = posterior(log_marginal + value, stop, sigma)
        for variance in VARIANCES:
            found = mean_target(weights, stop, sigma, score, value_gradient, variance)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_later_states_have_the_law_of_noised_data():
    """Mean (1 - s) clean and variance s^2 of x_s given clean, when x_e was noised from clean: identity."""
    stop, sigma = 0.2, float64(0.2, 0.5, 1.0)
    one, none = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    from_start = later_state(one, stop, sigma, none)[:, 0]
    from_noise = later_state(none, stop, sigma, one)[:, 0]
    torch.testing.assert_close(from_start * (1 - stop), 1 - sigma, rtol=0, atol=1e-12)
    torch.testing.assert_close((from_start * stop) ** 2 + from_noise**2, sigma**2, rtol=0, atol=1e-12)
    assert from_noise[0] == 0


def mean_score(law, clean, sigma, *, factor):
    """E over fresh noise of the score's estimate at each of `clean`, Gauss-Hermite with 60 nodes."""
    nodes, weights = (torch.as_tensor(values) for values in hermegauss(60))
    x = ((1 - sigma) * clean[:, None] + sigma * nodes).reshape(-1, 1)
    score = renoised_score(x, sigma, law.velocity(x, sigma))
    estimate = score.reshape(len(clean), -1) @ (weights / weights.sum())
    return estimate if factor else estimate / (1 - sigma)


def score_error(law, sigma, *, factor):
    """RMS error of the mean estimate relative to the RMS score, over the law of the data."""
    density = law.log_density(GRID[:, None], 0.0).softmax(0)
    exact = gradient(lambda x: law.log_density(x[:, None], 0.0), GRID)
    error = mean_score(law, GRID, sigma, factor=factor) - exact
    return ((density @ error**2) / (density @ exact**2)).sqrt().item()


def test_the_score_seen_through_noise_is_off_by_sigma_squared_with_the_factor_and_by_sigma_without():
    """Closed form on N(0, 1), d = t^2 + s^2: relative error s^2 / d with the factor, t / d - 1 without."""
    law = gaussian(0.0, 1.0)
    for s in (0.05, 0.1):
        t = 1 - s
        assert score_error(law, s, factor=True) == pytest.approx(s**2 / (t**2 + s**2), rel=1e-9)
        assert score_error(law, s, factor=False) == pytest.approx(t / (t**2 + s**2) - 1, rel=1e-9)
    narrow = gaussian(0.0, 0.01)
    assert score_error(narrow, 0.1, factor=True) == pytest.approx(0.01 / (0.81 * 0.01 + 0.01), rel=1e-9)
    assert score_error(law, 0.1, factor=True) == pytest.approx(0.012, abs=1e-3)
    assert score_error(law, 0.1, factor=False) == pytest.approx(0.098, abs=1e-3)


def test_orders_of_the_error_on_a_mixture():
    """Order: halving sigma divides the error by 4 with the factor, by 2 without (on wide enough modes)."""
    law = Mixture(float64(0.5, 0.5), float64(-1.0, 1.0)[:, None], float64(0.6, 0.8))
    for factor, ratio in ((True, 4), (False, 2)):
        errors = [score_error(law, sigma, factor=factor) for sigma in (0.04, 0.02)]
        assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.1)


def test_weights_and_noise_levels():
    assert capped_weight(float64(0.5, 0.1, 0.01, 1.0), 20.0).tolist() == pytest.approx([2, 18, 20, 0])
    for lowest in (0.0, 0.3):
        sigmas = torch.stack(
            [stratified_sigmas(4, lowest, torch.Generator().manual_seed(i)) for i in range(2000)]
        )
        width = (1 - lowest) / 4
        edges = 1 - width * torch.arange(5)
        assert (sigmas <= edges[:4]).all()
        assert (sigmas > edges[1:]).all()
        # 4 standard errors of the mean of a uniform number over 2000 draws.
        middle = (edges[:4] + edges[1:]) / 2
        bound = 4 * width / (12 * 2000) ** 0.5
        assert torch.allclose(sigmas.mean(0), middle.double(), rtol=0, atol=bound)
