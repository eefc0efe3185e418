"""f-divergences: optimal density ratios against f itself, Adjoint Matching against the exact tuned law."""

import math

import pytest
import torch

from am_diffusers.divergences import Divergence, Tilt
from am_diffusers.terminal_cost import PLAIN, TerminalCost
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from fixed_points import SIGMAS, Truth, base_and_jacobian, error, fixed_point
from oracles import Mixture, float64

# f, written down independently of the module: f(1) = 0, f'(1) = 0.
F = {
    ("kl", 0.0): lambda t: t * t.log() - t + 1,
    ("pearson_chi2", 0.0): lambda t: (t - 1) ** 2 / 2,
    ("forward_kl", 0.0): lambda t: t - 1 - t.log(),
    ("power", 0.5): lambda t: (t**1.5 / 1.5 - t) / 0.5 + 2 / 3,
    ("power", -0.5): lambda t: (t**0.5 / 0.5 - t) / -0.5 + 2,
    ("js", 0.0): lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
}
KINDS = [pytest.param(Divergence(name, q), f, id=f"{name}{q or ''}") for (name, q), f in F.items()]
LAW = Mixture(float64(0.4, 0.35, 0.25), float64(-1.2, 0.2, 1.4)[:, None], float64(0.25, 0.35, 0.2) ** 2)
# reward_scale at which z stays inside each domain, so that every tuned law has a density everywhere.
SCALE, SCALE_OF_POWER = 0.6, 1.2
CLEAN = torch.linspace(-3, 3, 20_001, dtype=torch.float64)
BASE = LAW.log_density(CLEAN[:, None], 0.0).softmax(0)


def reward(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(1.5 * x) + 0.3 * torch.sin(3 * x)


def exact_normaliser(divergence: Divergence, scale: float = SCALE) -> float:
    """By quadrature and bisection of its own: the mean ratio falls as the normaliser grows."""
    low, high = -2.0, 2.0
    for _ in range(100):
        middle = (low + high) / 2
        mean = BASE @ divergence.log_ratio(scale * (reward(CLEAN) - middle)).exp()
        low, high = (middle, high) if mean > 1 else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize(("divergence", "f"), KINDS)
def test_the_ratio_inverts_the_derivative_of_f(divergence, f):
    ratio = torch.linspace(0.05, 6, 200, dtype=torch.float64, requires_grad=True)
    (z,) = torch.autograd.grad(f(ratio).sum(), ratio)
    torch.testing.assert_close(divergence.log_ratio(z).exp(), ratio.detach(), rtol=1e-10, atol=1e-12)
    assert divergence.log_ratio(float64(0.0)).item() == 0


@pytest.mark.parametrize(("divergence", "f"), KINDS)
def test_the_slope_is_the_derivative_of_the_log_ratio(divergence, f):
    ratio = torch.linspace(0.2, 4, 50, dtype=torch.float64, requires_grad=True)
    (z,) = torch.autograd.grad(f(ratio).sum(), ratio)
    z = z.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(divergence.log_ratio(z).sum(), z)
    torch.testing.assert_close(divergence.slope(z, 100.0), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("divergence", "f"), KINDS)
def test_the_slope_is_positive_and_clamped_everywhere(divergence, f):
    slope = divergence.slope(torch.linspace(-50, 50, 2001, dtype=torch.float64), 8.0)
    assert bool((slope > 0).all())
    assert slope.max() <= 8
    second_derivative_of_f = 0.5 if divergence.name == "js" else 1
    assert divergence.slope(float64(0.0), 8.0).item() == pytest.approx(1 / second_derivative_of_f)


@pytest.mark.parametrize(("divergence", "f"), KINDS)
def test_the_tuned_law_beats_every_neighbour(divergence, f):
    """E[r] - D_f / reward_scale falls in 20 random directions that keep the total probability."""
    log_ratio = divergence.log_ratio(SCALE * (reward(CLEAN) - exact_normaliser(divergence)))
    best = log_ratio.exp()
    assert (BASE @ best).item() == pytest.approx(1, abs=1e-9)

    def objective(ratio):
        return (BASE @ (ratio * reward(CLEAN) - f(ratio.clamp(min=1e-300)) / SCALE)).item()

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        frequency, phase = 4 * torch.rand(2, generator=generator, dtype=torch.float64)
        direction = best * torch.sin(frequency * CLEAN + phase)
        direction -= best * (BASE @ direction)
        for step in (-0.1, 0.1):
            assert objective(best + step * direction) < objective(best)


@pytest.mark.parametrize(("divergence", "f"), KINDS)
def test_the_normaliser_of_base_samples_is_that_of_the_law(divergence, f):
    """20,000 samples; four standard errors by the delta method."""
    rows = torch.multinomial(BASE, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    rewards = reward(CLEAN[rows])
    exact = exact_normaliser(divergence)
    z = SCALE * (rewards - exact)
    ratio = divergence.log_ratio(z).exp()
    slope = SCALE * (ratio * divergence.slope(z, 1e9)).mean()
    tolerance = 4 * (ratio.std() / slope / 20_000**0.5).item()
    assert divergence.normaliser(rewards, SCALE) == pytest.approx(exact, abs=tolerance)


def test_normalisers_by_prompt_or_pooled():
    kind = Divergence("pearson_chi2")
    rewards = {"a": float64(0.0, 1.0), "b": float64(2.0, 3.0)}
    own = Tilt.estimate(kind, 1.0, rewards, per_prompt=True)
    assert own.by_prompt == pytest.approx({"a": 0.5, "b": 2.5})
    assert own.pooled == pytest.approx(5 / 3), "the reward 0 is below the domain: ratio 0"
    assert not Tilt.estimate(kind, 1.0, rewards, per_prompt=False).by_prompt
    slopes = own.slopes(float64(1.0, 3.0, 2.5), ["a", "b", "elsewhere"])
    torch.testing.assert_close(slopes, float64(1 / 1.5, 1 / 1.5, 1 / (3.5 - 5 / 3)))


def test_equal_rewards_are_their_own_normaliser():
    for divergence in (Divergence(name) for name in ("kl", "js", "forward_kl")):
        assert divergence.normaliser(float64(0.7, 0.7, 0.7), 3.0) == pytest.approx(0.7)


@pytest.mark.parametrize(("divergence", "f"), KINDS)
def test_adjoint_matching_samples_the_tuned_law(divergence, f):
    """On a grid at K = 40: the error left is a few percent of the base's, with kl's slope it is larger."""
    scale = SCALE_OF_POWER if divergence.name == "power" else SCALE
    normaliser = exact_normaliser(divergence, scale)
    tilt = Tilt(divergence, scale, pooled=normaliser, max_slope=1e6)
    truth = {
        sigma: Truth.at(LAW, lambda x: divergence.log_ratio(scale * (reward(x) - normaliser)), sigma)
        for sigma in SIGMAS
    }

    def learned(tilt: Tilt | None):
        cost = TerminalCost(lambda x, _: reward(x[:, 0]), scale, PLAIN, tilt)

        def terminal(final):
            return cost(final[:, None], [""] * len(final), lambda: final).adjoint[:, 0]

        return fixed_point(LAW, terminal, memoryless_local_linear(uniform_sigmas(40)), "right")

    of_base = error({sigma: base_and_jacobian(LAW, sigma)[0] for sigma in SIGMAS}, truth)
    right = error(learned(tilt), truth)
    assert right < 0.06 * of_base
    if divergence.name != "kl":
        assert error(learned(None), truth) > 2 * right


@pytest.mark.parametrize(("name", "q"), [("chi2", 0.5), ("power", -1.5), ("power", math.nan)])
def test_unknown_divergences(name, q):
    with pytest.raises(ValueError, match="divergence"):
        Divergence(name, q)


def test_a_clamp_below_one_would_change_kl_itself():
    with pytest.raises(ValueError, match="max_slope"):
        Tilt(Divergence("kl"), 1.0, max_slope=0.5)
