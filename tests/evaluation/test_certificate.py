"""The certificate against chains whose optimum is known: Gaussian data exactly, a mixture by quadrature."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from am_diffusers.evaluation.certificate import Tuned, certify
from am_diffusers.evaluation.frontier import Frontier
from am_diffusers.noise import draw, generators_for
from am_diffusers.rollout import TableSolver
from am_diffusers.transitions import Transitions, memoryless_local_linear, uniform_sigmas
from am_diffusers.velocity import CallableField
from benching.oracles.mixture import Mixture
from oracles import affine, chain_moments, float64, gaussian, unconditional

SCALE, STEPS = 0.8, 6
TABLE = memoryless_local_linear(uniform_sigmas(STEPS))
LAW = gaussian(0.4, 1.7, dim=2)  # the reward is the first coordinate


def optimal_shifts(table: Transitions, law: Mixture, scale: float) -> dict[float, float]:
    """The optimal control of the discrete chain for the reward x: constant by step, by sigma.

    adjoint_{k+1} = -scale * product of the slopes of the steps after k; velocity* - base = -std^2 / v_coef *
    it.
    """
    shifts, slope = {}, 1.0
    for k in reversed(range(table.num_steps)):
        x_coef, v_coef, std = (value[k].item() for value in (table.x_coef, table.v_coef, table.std))
        shifts[table.sigmas[k].item()] = std**2 / v_coef * scale * slope
        slope *= x_coef + v_coef * affine(law.field(), table.sigmas[k].item())[0]
    return shifts


def shifted(factor: float, sideways: float = 0.0) -> CallableField:
    """The base with `factor` times the optimal control, and as strong a one that the reward doesn't see."""
    shifts = optimal_shifts(TABLE, gaussian(0.4, 1.7), SCALE)

    def velocity(x, sigma, cond):
        return LAW.velocity(x, sigma) + shifts[sigma[0].item()] * float64(factor, sideways)

    return CallableField(velocity)


def run(field, base, number, seed, dim=2):
    """End points (number, dim) of the chain and its path KL."""
    noise = draw(generators_for(seed, 0, range(number)), (dim,), torch.float64)
    generators = generators_for(seed, 1, range(number))
    return TableSolver(TABLE)(field, unconditional(number), noise, generators, base=base)


def certificate(policy, prompts=24, images=64, tuned=16, seed=0, resamples=999):
    """Certify a policy; each "prompt" adds a constant of its own to the reward."""
    offsets = np.random.default_rng(seed).normal(size=(prompts, 1))
    base = run(LAW.field(), LAW.field(), prompts * images, seed).latents[:, 0].reshape(prompts, images)
    ends = run(policy, LAW.field(), prompts * images, seed)
    rewards = ends.latents[:, 0].reshape(prompts, images)[:, :tuned].numpy()
    path_kl = ends.path_kl.reshape(prompts, images)[:, :tuned].numpy()
    frontier = Frontier(base.numpy() + offsets, {})
    return certify(frontier, SCALE, Tuned(rewards + offsets, path_kl), resamples=resamples)


def moments() -> tuple[float, float]:
    """Variance of the reward given the first noise, which no control can reach, and in all."""
    factor, variance = chain_moments(TABLE, gaussian(0.4, 1.7))
    assert 0 < factor**2 < 0.002 * variance, "the chain all but forgets its first noise"
    return variance, variance + factor**2


def holds(found, expected):
    """Whether an estimate with a 95 % interval is within four standard errors (or rounding) of a number."""
    assert found.low is not None
    error = (found.high - found.low) / 3.92
    return abs(found.value - expected) <= 4 * error + 1e-9


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.6])
def test_shares_of_the_optimal_control(factor):
    """Theta times the control gains theta times the reward for theta^2 of the KL scale^2 var / 2."""
    (given, total), found = moments(), certificate(shifted(factor))
    most, headroom = SCALE**2 * given / 2, SCALE**2 * total / 2
    assert found.gain.value == pytest.approx(factor * SCALE * given)
    assert found.path_kl.value == pytest.approx(factor**2 * most)
    assert holds(found.predicted, SCALE * total)
    assert found.objective.value == pytest.approx((2 * factor - factor**2) * most)
    assert holds(found.tilt_gap, headroom - (2 * factor - factor**2) * most)
    assert holds(found.attained, (2 * factor - factor**2) * given / total)
    assert holds(found.cosine, 1)
    if factor <= 1:
        assert holds(found.excess_kl, 1)


def test_a_control_that_the_reward_does_not_see_is_excess():
    found, most = certificate(shifted(0.7, sideways=0.7)), SCALE**2 * moments()[0] / 2
    assert found.path_kl.value == pytest.approx(2 * 0.49 * most)
    assert holds(found.excess_kl, 2)
    assert holds(found.cosine, 0.5**0.5)
    assert holds(found.tilt_gap, (0.09 + 0.49) * most)


def test_the_gap_of_the_optimum_is_zero_and_never_significantly_negative():
    """200 trials of 8 prompts: the mean gap within four of its errors, no trial below four of its own."""
    gaps, worst = [], np.inf
    for seed in range(200):
        gap = certificate(shifted(1.0), prompts=8, images=32, tuned=4, seed=seed, resamples=199).tilt_gap
        gaps.append(gap.value)
        worst = min(worst, gap.value / ((gap.high - gap.low) / 3.92))
    assert abs(np.mean(gaps)) <= 4 * np.std(gaps) / len(gaps) ** 0.5
    assert worst > -4


def test_the_base_gains_nothing_and_is_one_of_one():
    found = certificate(LAW.field())
    assert [found.gain.value, found.path_kl.value, found.objective.value] == [0, 0, 0]
    assert found.attained.value == 0
    assert found.best_of_n.value == 1
    assert found.cosine is None
    assert found.excess_kl is None


def test_best_of_two_gains_what_it_is_known_to():
    """The better of two from N(m, s^2) gains s / sqrt(pi)."""
    given, total = moments()
    factor = (total / np.pi) ** 0.5 / (SCALE * given)
    assert holds(certificate(shifted(factor), prompts=100).best_of_n, 2)


def test_where_the_base_images_cannot_tell_it_says_so():
    rewards = np.random.default_rng(0).normal(size=(8, 64))
    tuned = Tuned(rewards[:, :4] + 1, np.full((8, 4), 2.0))
    found = certify(Frontier(rewards, {}), 20.0, tuned)
    assert [found.tilt_gap, found.attained, found.predicted] == [None] * 3
    assert found.excess_kl is not None
    assert "they tell up to reward_scale 2." in found.verdict()


def test_few_images_claim_nothing_that_a_share_alone_would_let_pass():
    """Of four images the effective share is never below a quarter; a scale of 2 sd is yet beyond them."""
    rewards = np.random.default_rng(0).normal(size=(8, 4))
    found = certify(Frontier(rewards, {}), 2.0, Tuned(rewards + 2, np.full((8, 4), 2.0)))
    assert found.effective_share > 0.25
    assert [found.tilt_gap, found.attained, found.predicted] == [None] * 3
    assert "90% is needed): they tell up to reward_scale 0." in found.verdict()


@dataclass
class Grid:
    """The chain of a one-dimensional law on a grid: its optimal kernels by backward recursion."""

    table: Transitions
    base: Mixture
    scale: float
    x: np.ndarray

    def log_kernel(self, field, k):
        """Log probabilities (from, to) of step k."""
        sigma = torch.full((len(self.x),), self.table.sigmas[k].item(), dtype=torch.float64)
        x = torch.from_numpy(self.x)[:, None]
        mean = self.table.mean(k, x, field(x, sigma, unconditional(len(x)))).numpy()
        logits = -0.5 * ((self.x[None] - mean) / self.table.std[k].item()) ** 2
        return logits - logsumexp(logits, axis=1, keepdims=True)

    def divergence(self, policy):
        """KL(path law of the policy | optimal path law), from the kernels themselves."""
        last, field = self.table.num_steps - 1, self.base.field()
        x, sigma = torch.from_numpy(self.x)[:, None], self.table.sigmas[last].item()
        final = self.table.mean(last, x, field(x, x.new_full((len(x),), sigma), unconditional(len(x))))
        value, optimal = self.scale * final[:, 0].numpy(), []
        for k in reversed(range(last)):
            kernel = self.log_kernel(field, k) + value[None]
            value = logsumexp(kernel, axis=1)
            optimal.insert(0, kernel - value[:, None])
        start = -0.5 * self.x**2
        density = np.exp(start - logsumexp(start))
        tilted = start + value
        total = (density * (start - logsumexp(start) - (tilted - logsumexp(tilted)))).sum()
        for k, target in enumerate(optimal):
            own = self.log_kernel(policy, k)
            total += density @ (np.exp(own) * (own - target)).sum(1)
            density = density @ np.exp(own)
        return total


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_gap_is_the_divergence_of_path_laws(share):
    """Two modes, a policy some way towards the tilted law: kernels on a grid against 6400 sampled chains."""
    law = Mixture(float64(0.6, 0.4), float64(-1.0, 1.0)[:, None], float64(0.15, 0.25))
    tilted, prompts, images = law.tilted(float64(SCALE)), 100, 64
    policy = CallableField(
        lambda x, sigma, cond: (1 - share) * law.velocity(x, sigma) + share * tilted.velocity(x, sigma)
    )
    exact = Grid(TABLE, law, SCALE, np.linspace(-7, 7, 1401)).divergence(policy)
    base = run(law.field(), law.field(), prompts * images, 0, dim=1).latents.reshape(prompts, images).numpy()
    ends = run(policy, law.field(), prompts * images, 0, dim=1)
    tuned = Tuned(*(values.reshape(prompts, images).numpy() for values in (ends.latents, ends.path_kl)))
    gap = certify(Frontier(base, {}), SCALE, tuned).tilt_gap
    assert holds(gap, exact)
    assert gap.high - gap.low < 0.1
    assert (exact > 0.2) == (share == 0.0), f"{exact}"
