"""The identities of docs/theory.md in continuous time, in float64, on laws where everything is known."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from am_diffusers.velocity import CallableField, Conditioning, GuidedField
from derivatives import SIGMAS, derivatives, divergence, drift, memoryless, states
from oracles import THREE_MODES, Mixture, float64

SLOPE, CURVATURE = float64(0.8, -0.4), 0.4
TILTED = THREE_MODES.tilted(SLOPE, CURVATURE)
LINE = Mixture(float64(0.4, 0.35, 0.25), float64(-1.2, 0.2, 1.4)[:, None], float64(0.25, 0.35, 0.2) ** 2)
CLEAN = torch.linspace(-5, 5, 4001, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def posterior_logits(x: Tensor, sigma: Tensor) -> Tensor:
    """Log density of the picture CLEAN[j] of LINE and the state x_i, up to a number a row, (B, 4001)."""
    distance = (x - (1 - sigma[:, None]) * CLEAN) / sigma[:, None]
    return LINE.log_density(CLEAN[:, None], 0.0) - 0.5 * distance.square()


def value_by_quadrature(reward):
    """V(x, sigma) = -log E[exp(reward(clean)) | x] of LINE, from the definition."""

    def value(x: Tensor, sigma: Tensor) -> Tensor:
        logits = posterior_logits(x, sigma)
        return logits.logsumexp(1) - (logits + reward(CLEAN)).logsumexp(1)

    return value


def wavy(clean: Tensor) -> Tensor:
    return 2 * torch.tanh(1.5 * clean) + 0.8 * torch.sin(3 * clean)


def log_ratio(x: Tensor, sigma: Tensor) -> Tensor:
    """Log p - log p* of the noisy laws of THREE_MODES and of its tilt."""
    return THREE_MODES.log_density(x, sigma) - TILTED.log_density(x, sigma)


# --------------------------------------------------------------------------------- marginals and noise


@pytest.mark.parametrize("eta", [torch.zeros_like, memoryless, lambda s: 0.5 * s, lambda s: 3 * s / (1 - s)])
def test_every_noise_schedule_has_the_marginals_of_the_flow(eta):
    """Fokker-Planck, divided by p: d_t log p = -div b - b . score + eta (laplacian log p + |score|^2)."""
    x = states(THREE_MODES, SIGMAS)
    score, laplacian, by_t = derivatives(THREE_MODES.log_density, x, SIGMAS)
    b = drift(THREE_MODES, eta, x, SIGMAS)
    spread = divergence(lambda x, sigma: drift(THREE_MODES, eta, x, sigma), x, SIGMAS)
    right = -spread - (b * score).sum(1) + eta(SIGMAS) * (laplacian + score.square().sum(1))
    scale = by_t.abs() + spread.abs() + (b * score).sum(1).abs() + eta(SIGMAS) * laplacian.abs()
    close((by_t - right) / scale, torch.zeros_like(scale), 1e-12)
    assert by_t.abs().median() > 0.1


def test_the_memoryless_sde_is_the_reversal_of_a_linear_noising_process():
    """Reversing dx = -x/t ds + sqrt(2 s/t) dW gives x/t + (2 s/t) score = -2 velocity - x/t."""
    x, t = states(THREE_MODES, SIGMAS), 1 - SIGMAS[:, None]
    score = derivatives(THREE_MODES.log_density, x, SIGMAS).gradient
    velocity = THREE_MODES.velocity(x, SIGMAS)
    reversal = x / t + 2 * (1 - t) / t * score
    close(reversal, -2 * velocity - x / t, 1e-10)
    close(drift(THREE_MODES, memoryless, x, SIGMAS), reversal, 1e-10)


def test_the_noising_process_forgets_the_picture_and_has_the_law_of_noised_pictures():
    """From (gain, variance) = (1, 0) at sigma = 0 to (1 - sigma, sigma^2)."""

    def rates(sigma, y):
        return [-y[0] / (1 - sigma), -2 * y[1] / (1 - sigma) + 2 * sigma / (1 - sigma)]

    sigma = np.linspace(0, 0.999, 30)
    found = solve_ivp(rates, (0, 0.999), [1.0, 0.0], t_eval=sigma, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found.y, [1 - sigma, sigma**2], rtol=0, atol=1e-8)


# --------------------------------------------------------------------------------- value function, HJB


def test_the_value_function_is_the_log_ratio_of_the_noisy_laws():
    """-log E[exp(r) | x] = log p - log p* - log Z; its gradient is the difference of the scores."""

    def reward(clean):
        return 0.8 * clean - 0.3 * clean.square()

    tilted, x = LINE.tilted(float64(0.8), 0.6), states(LINE, SIGMAS)
    log_z = (LINE.log_density(CLEAN[:, None], 0.0).softmax(0).log() + reward(CLEAN)).logsumexp(0)
    expected = LINE.log_density(x, SIGMAS) - tilted.log_density(x, SIGMAS) - log_z
    value = value_by_quadrature(reward)
    close(value(x, SIGMAS), expected, 1e-10)
    t, s = 1 - SIGMAS[:, None], SIGMAS[:, None]
    of_velocities = (t / s) * (tilted.velocity(x, SIGMAS) - LINE.velocity(x, SIGMAS))
    close(derivatives(value, x, SIGMAS).gradient, of_velocities, 1e-9)


def hjb_residual(law: Mixture, value, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """d_t V + b . grad V + eta laplacian V - eta |grad V|^2, b the memoryless drift, and its terms' size."""
    gradient, laplacian, by_t = derivatives(value, x, sigma)
    eta, b = memoryless(sigma), drift(law, memoryless, x, sigma)
    terms = [by_t, (b * gradient).sum(1), eta * laplacian, -eta * gradient.square().sum(1)]
    return sum(terms), sum(term.abs() for term in terms)


@pytest.mark.parametrize(
    ("law", "value"),
    [(THREE_MODES, log_ratio), (LINE, value_by_quadrature(wavy))],
    ids=["2-D, closed form", "1-D, tanh + sin by quadrature"],
)
def test_the_value_function_solves_the_hjb_equation(law, value):
    x = states(law, SIGMAS)
    residual, size = hjb_residual(law, value, x, SIGMAS)
    close(residual / size, torch.zeros_like(size), 1e-9)
    assert size.median() > 0.1
    off = hjb_residual(law, lambda x, sigma: 1.1 * value(x, sigma), x, SIGMAS)[0]
    assert (off / size).abs().median() > 1e-3  # the equation isn't linear: it knows the size of V


def test_a_running_cost_enters_the_value_function_and_its_equation():
    """Brownian motion, f = (theta x)^2 / 2, g = 0: -log E exp(-cost) = log cosh / 2 + theta x^2 tanh / 2.

    The expectation is that of n Gaussian steps, a determinant, and first-order in 1 / n.
    """
    theta, x = 1.3, torch.linspace(-2, 2, 43, dtype=torch.float64)[:, None]

    def value(x, sigma):  # sigma = time that is left
        return 0.5 * (theta * sigma).cosh().log() + 0.5 * theta * x[:, 0] ** 2 * (theta * sigma).tanh()

    gradient, laplacian, by_t = derivatives(value, x, SIGMAS)
    residual = by_t + laplacian / 2 - gradient.square().sum(1) / 2 + 0.5 * (theta * x[:, 0]) ** 2
    close(residual, torch.zeros_like(residual), 1e-12)
    errors = []
    for n in (200, 400):
        path = torch.ones(n, n, dtype=torch.float64).tril() / n**0.5  # W at 1/n, 2/n .. 1 from the steps
        start, weight = torch.full((n,), 0.7, dtype=torch.float64), theta**2 / n
        precision = torch.eye(n, dtype=torch.float64) + weight * path.T @ path
        pull = weight * path.T @ start
        cost = 0.5 * weight * start @ start - 0.5 * pull @ torch.linalg.solve(precision, pull)
        cost = cost + 0.5 * torch.logdet(precision)
        errors.append((cost - value(float64(0.7)[:, None], float64(1.0))[0]).item())
    assert abs(errors[1]) < 3e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)


# ------------------------------------------------------------------------------------- adjoint, path KL


def test_the_gradient_of_the_value_solves_the_equation_of_the_lean_adjoint():
    """Y = grad V: d_t Y + (b - 2 eta Y) Y' + eta Y'' + b' Y = 0, the HJB equation differentiated."""
    value = value_by_quadrature(wavy)

    def gradient(x, sigma):
        x = x if x.requires_grad else x.requires_grad_(True)
        return torch.autograd.grad(value(x, sigma).sum(), x, create_graph=True)[0][:, 0]

    x, eta = states(LINE, SIGMAS), memoryless(SIGMAS)
    y = gradient(x.clone(), SIGMAS).detach()
    slope, curvature, by_t = derivatives(gradient, x, SIGMAS)
    b = drift(LINE, memoryless, x, SIGMAS)[:, 0]
    b_slope = divergence(lambda x, sigma: drift(LINE, memoryless, x, sigma), x, SIGMAS)
    terms = [by_t, b * slope[:, 0], -2 * eta * y * slope[:, 0], eta * curvature, b_slope * y]
    size = sum(term.abs() for term in terms)
    close(sum(terms) / size, torch.zeros_like(size), 1e-8)
    without_policy = sum(terms) - terms[2]  # expectations under the base instead of the policy
    assert (without_policy / size).abs().median() > 1e-2


def test_the_path_kl_of_the_optimal_control_is_the_kl_of_the_tilt():
    """Integral over t of (t/s) E*|velocity* - velocity|^2 = KL(p* | p): no more than the end costs."""
    tilted = LINE.tilted(float64(0.8), 0.6)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    nodes, weights = np.polynomial.legendre.leggauss(60)
    path_kl = 0.0
    for sigma, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        shift = tilted.velocity(grid, sigma) - LINE.velocity(grid, sigma)
        mean = tilted.log_density(grid, sigma).softmax(0) @ shift.square()[:, 0]
        path_kl += weight * (1 - sigma) / sigma * mean.item()
    density, base = (law.log_density(grid, 0.0).log_softmax(0) for law in (tilted, LINE))
    expected = (density.exp() @ (density - base)).item()
    assert expected > 0.1
    assert path_kl == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("variance", [0.02, 1.0, 5.0])
def test_the_adjoint_of_a_linear_base_is_known_in_closed_form(variance):
    """With data N(0, C), da/dt = -b' a from a = 1 at sigma = 0 gives (1 - s) C / ((1 - s)^2 C + s^2)."""

    def slope(s):
        t = 1 - s
        return -2 * (s - variance * t) / (variance * t**2 + s**2) - 1 / t

    sigma = np.linspace(0, 0.99, 30)
    found = solve_ivp(
        lambda s, a: slope(s) * a, (0, 0.99), [1.0], t_eval=sigma, rtol=1e-12, atol=1e-14, method="LSODA"
    )
    expected = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
    np.testing.assert_allclose(found.y[0], expected, rtol=0, atol=1e-8)


# --------------------------------------------------------------------------------------------- guidance


def continuity_residual(velocity, log_density, x: Tensor, sigma: Tensor) -> Tensor:
    """d_t log p - div velocity - velocity . grad log p: zero if the ODE has the marginals p."""
    score, _, by_t = derivatives(log_density, x, sigma)
    return by_t - divergence(velocity, x, sigma) - (velocity(x, sigma) * score).sum(1)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_guided_velocity_is_the_flow_of_no_guided_law(guidance_scale):
    """Its score is that of p^w p_neg^(1-w) at each noise level, laws the guided ODE has only if w = 1."""
    law = Mixture(float64(1.0), float64(1.0)[:, None], float64(0.3))
    negative = Mixture(float64(1.0), float64(0.0)[:, None], float64(1.0))
    rows = torch.ones(len(SIGMAS), 1, dtype=torch.float64)
    prompts = tuple("x" * len(SIGMAS))
    cond = Conditioning(prompts, pooled=rows, negative_embeddings=rows, negative_pooled=-rows)

    def either(x, sigma, cond):
        return torch.where(cond.pooled > 0, law.velocity(x, sigma), negative.velocity(x, sigma))

    guided = GuidedField(CallableField(either), guidance_scale)

    def log_density(x, sigma):
        """Of p^w p_neg^(1-w), normalised: of Gaussians with the precision and mean that w mixes."""
        w, t = guidance_scale, 1 - sigma
        d, d_negative = t**2 * 0.3 + sigma**2, t**2 + sigma**2
        precision = w / d + (1 - w) / d_negative
        mean = w * t / d / precision
        return 0.5 * precision.log() - 0.5 * precision * (x[:, 0] - mean) ** 2 - 0.5 * math.log(2 * math.pi)

    def velocity(x, sigma):
        return guided(x, sigma, cond)

    x = states(law, SIGMAS)
    score = derivatives(log_density, x, SIGMAS).gradient
    s, t = SIGMAS[:, None], 1 - SIGMAS[:, None]
    close(score, -(x + t * velocity(x, SIGMAS)) / s, 1e-10)
    residual = continuity_residual(velocity, log_density, x, SIGMAS).abs()
    if guidance_scale == 1:
        assert residual.max() < 1e-10
    else:
        assert residual.median() > 0.1
