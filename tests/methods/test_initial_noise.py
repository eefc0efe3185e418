"""The Brownian stage before the noise: its optimum in closed form, and the laws it leads to."""

import math

import pytest
import torch

from am_diffusers.matching import matching_loss
from am_diffusers.methods.parts.initial_noise import sample_noise, stage_rows
from am_diffusers.noise import generators_for
from am_diffusers.rollout import sample
from am_diffusers.transitions import ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField
from oracles import affine, float64, gaussian, unconditional
from ranks import Ranks

LAW, SIGMAS, FINE = gaussian(0.3, 0.5), uniform_sigmas(100), uniform_sigmas(400)
SCALE, GOAL, SLOPE = 2.0, 1.0, 0.6


def end_law(mean, variance, field=None, sigmas=SIGMAS):
    """Mean and std of the ODE's end from Gaussian noise, the field being affine."""
    field = field or LAW.field()
    at_0, at_1 = sample(field, ode_euler(sigmas), unconditional(2), float64(0.0, 1.0)[:, None])[:, 0].tolist()
    return at_0 + (at_1 - at_0) * mean, (at_1 - at_0) * variance**0.5


def adjoint_of(noise, reward, field=None):
    """-SCALE * grad of the reward of the ODE's end, the field affine."""
    at_0, at_1 = end_law(0.0, 0.0, field)[0], end_law(1.0, 0.0, field)[0]
    end = (at_0 + (at_1 - at_0) * noise).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(end).sum(), end)
    return -SCALE * gradient * (at_1 - at_0)


def quadratic(x):
    return -0.5 * (x - GOAL) ** 2


def stage_field(coefficients):
    """Field a x + b, cubic in the stage time; (4, 2)."""

    def field(x, time, cond):
        powers = torch.stack([time**i for i in range(4)], 1)
        a, b = (powers @ coefficients).split(1, dim=1)
        return a * x + b

    return CallableField(field)


def noise_moments(stage, num_steps):
    """Mean and variance of the stage's end, exactly, the field being affine."""
    mean, variance = 0.0, 0.0
    for k in range(num_steps):
        slope, intercept = affine(stage, k / num_steps)
        factor = 1 + slope / num_steps
        mean, variance = factor * mean + intercept / num_steps, factor**2 * variance + 1 / num_steps
    return mean, variance


def train_stage(adjoint, *, iterations=250, num=128, num_steps=20):
    coefficients = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    stage = stage_field(coefficients)
    optimizer = torch.optim.Adam([coefficients], lr=0.05, betas=(0.9, 0.99))
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        generators = generators_for(0, iteration, range(num))

        def normal(_=0, some=generators):
            return torch.stack([torch.randn(1, generator=g, dtype=torch.float64) for g in some])

        first = torch.zeros(num, 1, dtype=torch.float64)
        noise = sample_noise(stage, unconditional(num), first, num_steps, normal)
        optimizer.zero_grad()
        matching_loss(stage, stage_rows(noise, adjoint(noise), unconditional(num), generators)).backward()
        optimizer.step()
        lr_schedule.step()
    return stage


@pytest.fixture(scope="module")
def stage():
    return train_stage(lambda noise: adjoint_of(noise, quadratic))


def test_with_the_base_ode_the_ends_have_the_tilted_law(stage):
    """Within 3 %: noise of training and a cubic in time; steps of the ODE (1 %) are in the base law too."""
    mean, spread = end_law(*noise_moments(stage, 400))
    base_mean, base_spread = end_law(0.0, 1.0)
    tilted = gaussian(base_mean, base_spread**2).tilted(float64(SCALE * GOAL), curvature=SCALE)
    assert tilted.mean().item() == pytest.approx(0.65, rel=0.01)
    assert (mean, spread) == pytest.approx((tilted.mean().item(), tilted.variances.item() ** 0.5), rel=0.03)


def test_its_optimum_is_the_drift_that_draws_nu_star(stage):
    """Exact oracle: q* = (b - p x) / (1 + p (1 - u)) ends in nu* ~ N(0, 1) exp(b x - p x^2 / 2)."""
    gain, offset = end_law(0.0, 1.0)[1], end_law(0.0, 0.0)[0]
    p, slope = SCALE * gain**2, SCALE * gain * (GOAL - offset)
    exact = CallableField(lambda x, u, cond: (slope - p * x) / (1 + p * (1 - u[:, None])))
    errors = [
        abs(noise_moments(exact, n)[0] - slope / (1 + p)) + abs(noise_moments(exact, n)[1] - 1 / (1 + p))
        for n in (200, 400)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] < 2e-3
    for u in (0.1, 0.5, 0.9):
        assert affine(stage, u) == pytest.approx(affine(exact, u), rel=0.1)


def test_on_top_of_the_deterministic_control_tilt_and_proximal_step_add_up():
    """A linear reward: the control shifts the velocity by its adjoint, the noise sees adjoint_0.

    Order: within 1 % at 400 steps, 1.4 % off at 100.
    """
    slopes = [affine(LAW.field(), sigma)[0] for sigma in FINE[:-1].tolist()]
    gains = 1 + FINE.diff() * float64(*slopes)
    adjoints = -SCALE * SLOPE * gains.flip(0).cumprod(0).flip(0)  # adjoint_0 .. adjoint_{K-1}
    right = torch.cat([adjoints[1:], float64(-SCALE * SLOPE)])
    base = LAW.field()

    def controlled(x, sigma, cond):
        return base(x, sigma, cond) + right[torch.searchsorted(-FINE, -sigma)][:, None]

    mean_of_noise = -adjoints[0].item()  # q* = -a_0, a constant
    mean, spread = end_law(mean_of_noise, 1.0, CallableField(controlled), FINE)
    proximal = math.sqrt(0.5) * math.pi / 2
    assert mean == pytest.approx(0.3 + (0.5 + proximal) * SCALE * SLOPE, rel=0.01)
    assert spread == pytest.approx(math.sqrt(0.5), rel=0.01)
    without_control, _ = end_law(mean_of_noise, 1.0, sigmas=FINE)
    assert without_control == pytest.approx(0.3 + 0.5 * SCALE * SLOPE, rel=0.01)


def test_rows_are_bridges_with_the_negative_adjoint_as_target():
    noise = torch.full((4000, 1), 3.0, dtype=torch.float64)
    batch = stage_rows(noise, 2 * noise, unconditional(4000), generators_for(0, 0, range(4000)))
    assert (batch.target == -6).all()
    assert batch.weight.sum().item() == pytest.approx(1)
    z = (batch.latents[:, 0] - 3 * batch.sigmas) / (batch.sigmas * (1 - batch.sigmas)).sqrt()
    # 4 standard errors over 4000 rows.
    assert abs(z.mean().item()) < 4 / 4000**0.5
    assert abs(z.var().item() - 1) < 4 * (2 / 4000) ** 0.5
    assert abs(batch.sigmas.mean().item() - 0.5) < 4 / (12 * 4000) ** 0.5


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_of_all_ranks_make_the_loss_of_one_process(ranks):
    """Identity: the same samples, shared; sums of losses agree to rounding."""
    noise, stage = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None], CallableField(lambda x, u, _: x)
    share = len(noise) // ranks

    def loss(first, number, **gather):
        own = slice(first, first + number)
        generators = generators_for(0, 0, range(first, first + number))
        rows = stage_rows(noise[own], noise[own].sin(), unconditional(number), generators, **gather)
        return matching_loss(stage, rows).item()

    parts = Ranks(ranks).run(lambda rank, gather: loss(rank * share, share, gather=gather))
    assert sum(parts) == pytest.approx(loss(0, len(noise)), rel=1e-12)


def test_without_a_field_the_noise_is_standard_normal():
    generator = torch.Generator().manual_seed(0)
    zero = CallableField(lambda x, u, cond: 0 * x)
    first = torch.zeros(4000, 1, dtype=torch.float64)
    noise = sample_noise(
        zero,
        unconditional(4000),
        first,
        7,
        lambda k: torch.randn(4000, 1, generator=generator, dtype=torch.float64),
    )
    assert abs(noise.var().item() - 1) < 4 * (2 / 4000) ** 0.5
