"""The table of MATH.md section 2: velocities that Adjoint Matching converges to, computed on a 1-D grid.

Two entries of MATH.md were computed with too coarse a quadrature. Between narrow modes A_k is a sharp
spike, which Gauss-Hermite nodes step over (learned velocities then miss the simulated ones by ten
standard errors, here they meet them, see the last test): `2 narrow modes` reads .385 .366 .287 / .231
.209 .117 there, and `5 modes` published at K = 10 reads .504. At that K both schemes of `5 modes` sit
at a bifurcation of the fixed point and are equal within the error of the grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from am_diffusers.matching import matching_target
from am_diffusers.transitions import memoryless_euler, memoryless_local_linear, uniform_sigmas
from fixed_points import COND, SIGMAS, Truth, base_and_jacobian, error, fixed_point, lookup
from oracles import Mixture, float64
from pull_backs import vjp

SCHEMES = {"published": (memoryless_euler, "left"), "default": (memoryless_local_linear, "right")}


@dataclass(frozen=True)
class Case:
    law: Mixture
    reward: Callable[[Tensor], Tensor]
    errors: dict[str, tuple[float, float, float]]  # at K = 10, 20, 40
    error_of_base: float

    def terminal(self, final: Tensor) -> Tensor:
        """adjoint_K at `final` (B,)."""
        x = final.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.reward(x).sum(), x)
        return -gradient


def mixture(means, stds, weights) -> Mixture:
    return Mixture(float64(*weights), float64(*means)[:, None], float64(*stds) ** 2)


CASES = {
    "3 modes, tanh + sin": Case(
        mixture((-1.2, 0.2, 1.4), (0.25, 0.35, 0.2), (0.4, 0.35, 0.25)),
        lambda x: 2 * torch.tanh(1.5 * x) + 0.8 * torch.sin(3 * x),
        {"published": (0.351, 0.201, 0.112), "default": (0.143, 0.068, 0.035)},
        0.845,
    ),
    "2 narrow modes, slope 1": Case(
        mixture((-0.8, 0.8), (0.1, 0.1), (0.5, 0.5)),
        lambda x: x,
        {"published": (0.340, 0.303, 0.265), "default": (0.135, 0.082, 0.049)},
        0.579,
    ),
    "N(0,1), quadratic": Case(
        mixture((0.0,), (1.0,), (1.0,)),
        lambda x: -2 * (x - 1.5) ** 2,
        {"published": (0.470, 0.301, 0.175), "default": (0.157, 0.076, 0.038)},
        1.20,
    ),
    "5 modes, steep": Case(
        mixture((-2, -1, 0, 1, 2), (0.15, 0.2, 0.1, 0.2, 0.15), (0.1, 0.3, 0.2, 0.3, 0.1)),
        lambda x: 4 * torch.sin(2 * x),
        {"published": (0.350, 0.328, 0.374), "default": (0.351, 0.162, 0.093)},
        0.765,
    ),
}
TIE = ("5 modes, steep", 10)


@pytest.mark.parametrize("name", CASES)
def test_the_table_of_errors_and_that_the_default_beats_the_published_scheme(name):
    case = CASES[name]
    truth = {sigma: Truth.at(case.law, case.reward, sigma) for sigma in SIGMAS}
    base = {sigma: base_and_jacobian(case.law, sigma)[0] for sigma in SIGMAS}
    assert error(base, truth) == pytest.approx(case.error_of_base, rel=0.01)
    for i, num_steps in enumerate((10, 20, 40)):
        sigmas = uniform_sigmas(num_steps)
        found = {
            scheme: error(fixed_point(case.law, case.terminal, build(sigmas), pairing), truth)
            for scheme, (build, pairing) in SCHEMES.items()
        }
        assert found == pytest.approx({scheme: case.errors[scheme][i] for scheme in found}, rel=0.15)
        assert found["default"] < found["published"] or (name, num_steps) == TIE


@pytest.mark.parametrize(("k", "x"), [(0, 0.0), (0, 1.0), (3, 0.1), (6, 0.3)])
def test_the_grid_agrees_with_simulated_adjoints_of_the_same_policy(k, x):
    """Monte Carlo over 100,000 trajectories from x_k = x, within 4 standard errors."""
    case, num = CASES["2 narrow modes, slope 1"], 100_000
    table = memoryless_local_linear(uniform_sigmas(10))
    learned = list(fixed_point(case.law, case.terminal, table, "right").values())[::-1]  # from sigma = 1 down
    generator = torch.Generator().manual_seed(k)
    states = {k: torch.full((num,), x, dtype=torch.float64)}
    for j in range(k, 9):
        noise = torch.randn(num, generator=generator, dtype=torch.float64)
        states[j + 1] = table.step(j, states[j], lookup(learned[j], states[j]), noise)
    adjoint = torch.full((num, 1), -1.0, dtype=torch.float64)  # of the reward x
    for j in range(9, k, -1):
        sigma, v_coef = table.sigmas[j].expand(num), table.v_coef[j].item()
        _, through = vjp(case.law.field(), states[j][:, None], sigma, COND, v_coef * adjoint)
        adjoint = table.x_coef[j].item() * adjoint + through
    base = case.law.velocity(states[k][:1, None], table.sigmas[k])
    target = matching_target(table, k, velocity_base=base, adjoint_right=adjoint, adjoint_left=None)
    expected = lookup(learned[k], states[k][:1]).item()
    assert target.mean().item() == pytest.approx(expected, abs=4 * target.std().item() / num**0.5)
