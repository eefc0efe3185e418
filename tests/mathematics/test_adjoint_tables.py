"""Orders of convergence of the adjoint equations, on laws whose gradients are known or computed finely."""

import math
from itertools import pairwise

import pytest
import torch

from am_diffusers import input_gradients
from am_diffusers.adjoint_tables import AdjointTable, memoryless_form, noise_form, velocity_form
from am_diffusers.input_gradients import Recorded, continuous_gradients
from am_diffusers.velocity import CallableField, Conditioning
from oracles import Mixture, float64, gaussian

TWO_MODES = Mixture(float64(0.4, 0.6), float64(-0.8, 0.3, 0.8, -0.2).view(2, 2), float64(0.1, 0.2))
TARGET = float64(0.5, 0.5)
NUM = 64


def moved(law):
    """Velocity of a law whose points are moved by the pooled embedding."""

    def velocity(x, sigma, cond):
        return law.velocity(x - (1 - sigma)[:, None] * cond.pooled, sigma) - cond.pooled

    return CallableField(velocity)


def moved_noise(law, alpha):
    """Noise that a model predicts of x = alpha(sigma) clean + sigma noise, for points moved likewise."""

    def noise(x, sigma, cond):
        s = sigma / (alpha(sigma) + sigma)  # the same law up to a factor of x
        y = x / (alpha(sigma) + sigma)[:, None]
        return y + (1 - s)[:, None] * moved(law)(y, s, cond)

    return CallableField(noise)


def start(num=NUM):
    generator = torch.Generator().manual_seed(0)
    noise, move = torch.randn(2, num, 2, generator=generator, dtype=torch.float64)
    return noise, Conditioning(("",) * num, pooled=0.3 * move)


def difference(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def slopes(errors):
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def at(x, sigma):
    return x.new_full((len(x),), float(sigma))


def runge_kutta(rate, x, grid):
    """States of dx / ds = rate(x, s), to fourth order."""
    states = [x]
    for s, s_next in pairwise(grid.tolist()):
        h, x = s_next - s, states[-1]
        k1 = rate(x, s)
        k2 = rate(x + h / 2 * k1, s + h / 2)
        k3 = rate(x + h / 2 * k2, s + h / 2)
        k4 = rate(x + h * k3, s + h)
        states.append(x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return torch.stack(states)


@pytest.fixture(scope="module")
def flow():
    """States of the exact ODE, 160 steps, and the gradients of its end by autograd."""
    field, (noise, cond) = moved(TWO_MODES), start()
    leaves = [noise.requires_grad_(), cond.pooled.requires_grad_()]
    sigmas = torch.linspace(1, 0, 161, dtype=torch.float64)
    states = runge_kutta(lambda x, s: field(x, at(x, s), cond), noise, sigmas)
    gradients = torch.autograd.grad((states[-1] - TARGET).square().sum() / 2, leaves)
    cond = Conditioning(cond.prompts, pooled=cond.pooled.detach())
    return Recorded(states.detach(), sigmas, cond), *gradients


@pytest.mark.parametrize(("order", "slope", "tolerance", "at_20"), [(1, 1, 0.15, 0.036), (2, 2, 0.25, 0.006)])
def test_the_velocity_form_has_its_order(flow, order, slope, tolerance, at_20):
    recorded, by_noise, by_pooled = flow
    errors = []
    for steps in (20, 40, 80, 160):
        some = recorded.some(steps)
        table = velocity_form(some.sigmas.flip(0))
        got = continuous_gradients(moved(TWO_MODES), some, table, some.final - TARGET, order)
        errors.append((difference(got.latents, by_noise), difference(got.pooled, by_pooled)))
    for each in zip(*errors, strict=True):
        assert slopes(each)[1:] == pytest.approx([slope] * 2, abs=tolerance)
    assert errors[0][0] < 1.5 * at_20


def test_the_noise_form_on_a_flow_points_the_wrong_way(flow):
    recorded, *_ = flow
    inner = Recorded(recorded.states[4:-4], recorded.sigmas[4:-4], recorded.cond)
    adjoint, cosines = inner.final - TARGET, {}
    fine = velocity_form(inner.sigmas.flip(0))
    exact = continuous_gradients(moved(TWO_MODES), inner, fine, adjoint, 2).latents.flatten()
    some = inner.some(19)
    nodes = some.sigmas.flip(0)
    noise = moved_noise(TWO_MODES, lambda sigma: 1 - sigma)
    for name, field, table in (
        ("noise", noise, noise_form(1 - nodes, nodes)),
        ("velocity", moved(TWO_MODES), velocity_form(nodes)),
    ):
        got = continuous_gradients(field, some, table, adjoint, 1)
        cosines[name] = torch.cosine_similarity(got.latents.flatten(), exact, 0)
    assert cosines["noise"] < -0.9
    assert cosines["velocity"] > 0.99


def test_order_2_falls_back_where_steps_grow_suddenly(flow, monkeypatch):
    """The end of Stable Diffusion 3's own grid is a step of .001, then one of .05: weights of 26 and -25."""
    recorded, by_noise, _ = flow
    field, cond = moved(TWO_MODES), recorded.cond
    sigmas = torch.cat([torch.linspace(1, 0.05, 19, dtype=torch.float64), float64(0.001, 0.0)])
    with torch.no_grad():
        states = runge_kutta(lambda x, s: field(x, at(x, s), cond), recorded.states[0], sigmas)

    def trained(x, sigma, cond):
        """A network that is a little off at one noise level."""
        return field(x, sigma, cond) + 0.2 * torch.exp(-(((sigma - 0.001) / 1e-4) ** 2))[:, None] * x

    def error():
        table, own = velocity_form(sigmas.flip(0)), Recorded(states, sigmas, cond)
        got = continuous_gradients(CallableField(trained), own, table, states[-1] - TARGET, 2)
        return difference(got.latents, by_noise)

    assert error() < 0.05
    monkeypatch.setattr(input_gradients, "LARGEST_GROWTH", 100.0)
    assert error() > 0.15


# Variance-preserving models: x = alpha clean + sigma noise, alpha^2 + sigma^2 = 1.


def angles(steps, low=0.02, high=0.98):
    """Noise levels from noise to data, evenly spread in the log of the signal-to-noise ratio."""
    ends = [math.log(math.sqrt(1 - s * s) / s) for s in (high, low)]
    ratio = torch.linspace(*ends, steps + 1, dtype=torch.float64).exp()
    return (1 + ratio**2).rsqrt()


def vp(sigma):
    return (1 - sigma**2).sqrt()


@pytest.mark.parametrize("order", [1, 2])
def test_the_noise_form_on_a_gaussian_has_the_closed_forms_gradient(order):
    """x_0 = z + s (x_T - alpha_T z) / q up to the noise left at the end: q^2 = alpha^2 s^2 + sigma^2."""
    spread, (noise, cond) = 0.5, start()
    field = moved_noise(gaussian(0.0, spread**2, 2), vp)
    errors = []
    for steps in (40, 80, 160):
        sigmas = angles(steps)
        alpha, size = vp(sigmas), (vp(sigmas).square() * spread**2 + sigmas**2).sqrt()
        states = torch.stack([a * cond.pooled + q * noise for a, q in zip(alpha, size, strict=True)])
        recorded = Recorded(states, sigmas, cond)
        adjoint = states[-1] - TARGET
        got = continuous_gradients(field, recorded, noise_form(alpha.flip(0), sigmas.flip(0)), adjoint, order)
        factor = size[-1] / size[0]
        exact = factor * adjoint, (alpha[-1] - factor * alpha[0]) * adjoint
        errors.append((difference(got.latents, exact[0]), difference(got.pooled, exact[1])))
    for each in zip(*errors, strict=True):
        assert slopes(each) == pytest.approx([order] * 2, abs=0.25)


def chain(field, sigmas, noise, cond, generator):
    """States of the reverse SDE by its exponential integrator, and the gradient of its end by autograd."""
    leaf = noise.clone().requires_grad_()
    x, states = leaf, [leaf]
    for s, s_next in pairwise(sigmas.tolist()):
        alpha, alpha_next = math.sqrt(1 - s * s), math.sqrt(1 - s_next * s_next)
        rho, rho_next = s / alpha, s_next / alpha_next
        xi = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        # d(x / alpha) = 2 noise d rho + sqrt(d rho^2) dW
        drift = 2 * (rho_next - rho) * field(x, at(x, s), cond) + math.sqrt(rho**2 - rho_next**2) * xi
        x = alpha_next * (x / alpha + drift)
        states.append(x)
    (gradient,) = torch.autograd.grad((x - TARGET).square().sum() / 2, leaf)
    return torch.stack(states).detach(), gradient


@pytest.fixture(scope="module")
def reverse_sde():
    field, (noise, cond) = moved_noise(TWO_MODES, vp), start()
    sigmas = angles(768, 0.1, 0.95)
    states, gradient = chain(field, sigmas, noise, cond, torch.Generator().manual_seed(2))
    return field, Recorded(states, sigmas, cond), gradient


def sde_errors(reverse_sde, numbers, stochastic):
    field, recorded, gradient = reverse_sde
    errors = []
    for steps in numbers:
        some = recorded.some(steps)
        nodes = some.sigmas.flip(0)
        table = noise_form(vp(nodes), nodes, stochastic=stochastic)
        got = continuous_gradients(field, some, table, some.final - TARGET, 1)
        errors.append(difference(got.latents, gradient))
    return errors


def test_the_noise_form_of_an_sde_doubles_the_network(reverse_sde):
    errors = sde_errors(reverse_sde, (24, 48, 96, 192), stochastic=True)
    assert sum(slopes(errors)) / 3 == pytest.approx(1, abs=0.3)
    assert sde_errors(reverse_sde, (192,), stochastic=False)[0] > 10 * errors[-1]


def test_the_formula_in_circulation_does_not_converge():
    """A widely copied rendering has alpha_s where alpha_s^2 belongs: here on the ODE of a Gaussian."""
    noise, cond = start()
    field = moved_noise(gaussian(0.0, 0.25, 2), vp)
    errors = {}
    for name, wrong in (("right", False), ("wrong", True)):
        sigmas = angles(160)
        alpha, size = vp(sigmas), (vp(sigmas).square() * 0.25 + sigmas**2).sqrt()
        states = torch.stack([a * cond.pooled + q * noise for a, q in zip(alpha, size, strict=True)])
        table = noise_form(alpha.flip(0), sigmas.flip(0))
        gain = torch.ones_like(table.gain) if wrong else table.gain
        adjoint = states[-1] - TARGET
        got = continuous_gradients(
            field, Recorded(states, sigmas, cond), AdjointTable(**{**vars(table), "gain": gain}), adjoint, 1
        )
        errors[name] = difference(got.latents, size[-1] / size[0] * adjoint)
    assert errors["right"] < 0.1
    assert errors["wrong"] > 0.5


# The memoryless SDE of flows.


@pytest.fixture(scope="module")
def memoryless():
    """A path of the memoryless SDE from sigma .9 to .05 in 1088 steps, with autograd's gradients."""
    field, (noise, cond) = moved(TWO_MODES), start()
    leaves = [noise.requires_grad_(), cond.pooled.requires_grad_()]
    sigmas = torch.linspace(0.9, 0.05, 1089, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    x, states = leaves[0], [leaves[0]]
    for s, s_next in pairwise(sigmas.tolist()):
        t, t_next = 1 - s, 1 - s_next
        variance = t_next**2 - t**2 - 2 / 3 * (t_next**3 - t**3)
        xi = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        moves = -(t_next**2 - t**2) * field(x, at(x, s), cond) + math.sqrt(variance) * xi
        x = (t * x + moves) / t_next
        states.append(x)
    gradients = torch.autograd.grad((x - TARGET).square().sum() / 2, leaves)
    cond = Conditioning(cond.prompts, pooled=cond.pooled.detach())
    return Recorded(torch.stack(states).detach(), sigmas, cond), *gradients


@pytest.mark.parametrize(("order", "slope", "tolerance"), [(1, 1.0, 0.3), (2, 0.9, 0.5)])
def test_the_memoryless_form_converges_to_first_order(memoryless, order, slope, tolerance):
    """Order 2M isn't second order in the state: the Jacobian along a Brownian path is rough."""
    recorded, by_x, by_pooled = memoryless
    errors = []
    for steps in (17, 34, 68, 136, 272):
        some = recorded.some(steps)
        table = memoryless_form(some.sigmas.flip(0))
        got = continuous_gradients(moved(TWO_MODES), some, table, some.final - TARGET, order)
        errors.append((difference(got.latents, by_x), difference(got.pooled, by_pooled)))
    of_x, of_pooled = zip(*errors, strict=True)
    assert sum(slopes(of_x)) / 4 == pytest.approx(slope, abs=tolerance)
    assert sum(slopes(of_pooled)) / 4 > 0.8
    assert max(errors[-1]) < 0.02
    once = AdjointTable(**{**vars(table), "x_coef": table.x_coef / 2})
    got = continuous_gradients(moved(TWO_MODES), some, once, some.final - TARGET, order)
    assert difference(got.latents, by_x) > 0.2
