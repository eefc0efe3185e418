"""Continuations of the last noisy step: what averaging them changes, which is noise, and what it doesn't."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from am_diffusers.adjoint import last_step, lean_adjoint
from am_diffusers.matching import matching_target
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.continuations import continuations
from am_diffusers.methods.parts.settings import SharedSettings
from am_diffusers.rollout import rollout
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from am_diffusers.velocity import CallableField
from methods_around import BASE, LATENTS, OFFSET, collect, concave
from methods_around import adjoint_matching as make
from oracles import THREE_MODES, unconditional

TAILS, STEPS, SAMPLES = 3, 8, 5
DRAWN = torch.randn(STEPS + TAILS - 1, SAMPLES, 2, generator=torch.Generator().manual_seed(0)).double()
"""Of a rollout of 8 steps: its start, the noise of 7 steps, and of the last one's other continuations."""


@dataclass
class Given:
    """Latents that are drawn from a list, in order."""

    draws: list[Tensor]
    shape: tuple[int, ...] = LATENTS.shape
    device: str = "cpu"
    taken: int = field(default=0)

    def draw(self, generators):
        self.taken += 1
        return self.draws[self.taken - 1]


def given(tail: int | None = None) -> Given:
    """Noise of all continuations, or of a rollout whose only one is continuation `tail`."""
    path = list(DRAWN[:STEPS])
    return Given([*DRAWN] if tail is None else [*path[:-1], DRAWN[STEPS - 1 + tail]])


def policy(shift: Tensor) -> CallableField:
    return CallableField(
        lambda x, sigma, cond: THREE_MODES.velocity(x, sigma) + shift * torch.tanh(x) + shift.flip(0)
    )


def single(kind, pairing, tail=None, **more):
    """Rows, rewards and the loss's gradient of M continuations, or of one of them alone."""
    shift = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    options = {"adjoint": kind, "pairing": pairing, "mask_quantile": None, "latents": given(tail)} | more
    method = make(policy(shift), tail_samples=TAILS if tail is None else 1, **options)
    collected = collect(method, num=SAMPLES)
    (gradient,) = torch.autograd.grad(method.loss(collected.examples)[0], shift)
    return collected, gradient


@pytest.mark.parametrize("kind", ["lean", "full"])
@pytest.mark.parametrize("pairing", ["right", "left", "trapezoid"])
def test_rows_and_gradient_are_means_of_those_of_single_continuations(kind, pairing):
    """Identity, 1e-12: with the same noise, targets, rewards and gradient of the loss are the means."""
    (ours, gradient), singles = single(kind, pairing), [single(kind, pairing, m) for m in range(TAILS)]
    alone = [collected for collected, _ in singles]
    for each in alone:
        assert torch.equal(each.examples.latents, ours.examples.latents)
        assert torch.equal(each.examples.weight, ours.examples.weight)
    targets = torch.stack([each.examples.target for each in alone])
    torch.testing.assert_close(ours.examples.target, targets.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, sum(g for _, g in singles) / TAILS, rtol=1e-12, atol=1e-12)
    rewards = torch.stack([each.rewards for each in alone])
    torch.testing.assert_close(ours.rewards, rewards.mean(0), rtol=1e-12, atol=0)
    for name in ("reward", "reward_gradient_norm", f"adjoint_norm/{STEPS:02d}"):
        mean = sum(each.metrics[name] for each in alone) / TAILS
        assert ours.metrics[name] == pytest.approx(mean, rel=1e-12)
    rest = slice(STEPS - 3, None, STEPS - 1)  # the row before the branched one: its noise is not the last's
    assert (targets[:, rest].std(0) > 0.01 * targets[:, rest].abs().mean(0)).any()


def test_averaging_lowers_the_spread_of_targets_at_one_state_and_keeps_their_mean():
    """Monte Carlo, seed 0, 4000 samples of one state: the variance falls to a quarter, within 4 errors."""

    def rows(tails):
        start = Given([torch.zeros(4000, 2).double()] * 7 + [LATENTS.draw(generators(m)) for m in range(4)])
        return collect(make(BASE, tail_samples=tails, mask_quantile=None, latents=start), num=4000).examples

    def generators(m):
        return [torch.Generator().manual_seed(4000 * m + i) for i in range(4000)]

    one, four = (rows(tails).target.unflatten(0, (4000, 7))[:, 6] for tails in (1, 4))
    error = (one.std(0) / 4000**0.5 + four.std(0) / 4000**0.5) * 4
    assert ((one.mean(0) - four.mean(0)).abs() < error).all()
    ratio = (four.var(0) / one.var(0)).tolist()
    assert ratio == pytest.approx([0.25, 0.25], rel=0.15)


def test_the_first_continuation_is_the_rollouts_and_the_others_take_its_last_noisy_step_again():
    table, draws = memoryless_local_linear(uniform_sigmas(STEPS)), given()
    cond = unconditional(SAMPLES)
    trajectory = rollout(OFFSET, table, cond, draws.draw(()), lambda _: draws.draw(()))
    first, *others = continuations(trajectory, TAILS, lambda: draws.draw(()))
    assert torch.equal(first, trajectory.latents[-1])
    assert draws.taken == len(DRAWN)
    for m, other in enumerate(others, 1):
        x, velocity, noise = trajectory.latents[-2], trajectory.velocities[-1], DRAWN[STEPS - 1 + m]
        assert torch.equal(other, table.step(STEPS - 2, x, velocity, noise))


def test_settings_out_of_range_are_refused():
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match=f"--tail_samples must be from 1 to 1000, got {wrong}"):
            make(tail_samples=wrong)


# -------------------------------------------------------------------------------------------- ODE tail


def test_an_ode_tail_changes_the_states_it_leads_to_and_nothing_else():
    """Rows of a rollout that ends in two steps of the ODE: state by state, then as those of the table."""
    method, draws = make(ode_tail=2, tail_samples=1, latents=given(0)), DRAWN
    rows = collect(method, num=SAMPLES).examples
    table, ode, cond = memoryless_local_linear(uniform_sigmas(STEPS)), [draws[0]], unconditional(SAMPLES)
    for k in range(STEPS - 1):
        x, sigma = ode[-1], table.sigmas[k]
        velocity = OFFSET(x, sigma.expand(SAMPLES), cond)
        step = (table.sigmas[k + 1] - sigma).item()
        ode.append(x + step * velocity if k >= 5 else table.step(k, x, velocity, draws[1 + k]))
    states = rows.latents.unflatten(0, (SAMPLES, STEPS - 1)).transpose(0, 1)
    torch.testing.assert_close(states, torch.stack(ode[:-1]), rtol=0, atol=1e-12)
    path = replace(rollout(OFFSET, table, cond, draws[0], lambda k: draws[1 + k]), latents=torch.stack(ode))
    last = last_step(BASE, path)
    gradient = torch.func.grad(lambda x: concave(x, cond.prompts).sum())(last.final)
    sweep = lean_adjoint(BASE, path, last.pull(-2.0 * gradient), STEPS - 1)
    targets = rows.target.unflatten(0, (SAMPLES, STEPS - 1)).transpose(0, 1)
    for k, target in enumerate(targets):
        right, base = sweep.adjoints[k + 1], sweep.velocity_base[k]
        expected = matching_target(table, k, velocity_base=base, adjoint_right=right, adjoint_left=None)
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-11)
    plain = collect(make(tail_samples=1, latents=given(0)), num=SAMPLES).examples
    assert torch.equal(rows.weight, plain.weight)
    assert not torch.allclose(rows.target, plain.target)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"num_inference_steps": 12}, "--ode_tail must be 0 with more than 10 num_inference_steps"),
        ({"ode_tail": 7}, "--ode_tail must be from 0 to num_inference_steps - 2"),
        ({"tail_samples": 2}, "--ode_tail must be 0, or with --tail_samples 1 and --adjoint lean"),
        ({"adjoint": "full"}, "--ode_tail must be 0, or with --tail_samples 1 and --adjoint lean"),
    ],
)
def test_an_ode_tail_is_refused_where_it_is_no_good(flags, text):
    with pytest.raises(ValueError, match=text):
        make(**({"ode_tail": 1, "tail_samples": 1} | flags))


@pytest.mark.parametrize("method", ["adjoint_matching", "buffered_adjoint_matching"])
def test_an_ode_tail_is_called_a_bias(method):
    kind = METHODS[method]
    (text,) = kind.cautions(SharedSettings(num_inference_steps=8, ode_tail=1, tail_samples=1), None)
    assert "ode_tail 1 is biased: the optimum is not" in text
    assert kind.cautions(SharedSettings(), None) == []
