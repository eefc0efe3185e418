"""Ascents on laws whose flows are known: constraints, the best iterate, and what stops them."""

import pytest
import torch

from am_diffusers.steering.ascent import Ascent, into_ball, onto_sphere
from am_diffusers.steering.chain import GRADIENTS, Chain
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.transitions import memoryless_local_linear, ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning
from oracles import THREE_MODES

TARGET = torch.tensor([0.9, 0.6], dtype=torch.float64)


def velocity(x, sigma, cond):
    """Points of the law are moved by the embeddings."""
    move = 0.1 * cond.pooled + 0.1 * cond.embeddings.mean(1)
    return THREE_MODES.velocity(x - (1 - sigma)[:, None] * move, sigma) - move


def reward(latents, prompts):
    return -(latents - TARGET).square().sum(1)


def start(num=6):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    embeddings, pooled = torch.randn(2, num, 3, 2, generator=generator, dtype=torch.float64)
    return Conditioning(("a prompt",) * num, embeddings=embeddings, pooled=pooled[:, 0]), noise


def chain(**options):
    return Chain(CallableField(velocity), ode_euler(uniform_sigmas(8)), reward, **options)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_noise_climbs_on_its_sphere(gradient):
    cond, noise = start()
    made = chain(gradient=gradient)
    found = Ascent("noise", 10, 0.1).run(made, cond, noise)
    assert (found.rewards >= found.trace[0]).all()
    assert found.rewards.mean() > found.trace[0].mean() + 0.2
    torch.testing.assert_close(found.noise.norm(dim=1), noise.norm(dim=1))
    assert found.cond.pooled is cond.pooled or torch.equal(found.cond.pooled, cond.pooled)
    assert made.passes == 10 * (8 + 2 * 8) + 8
    torch.testing.assert_close(made.end(found.cond, found.noise).rewards, found.rewards)


@pytest.mark.parametrize("table", [ode_euler, memoryless_local_linear])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_embeddings_climb_within_their_ball(gradient, table):
    cond, noise = start()
    frozen = list(torch.randn(8, *noise.shape, generator=torch.Generator().manual_seed(1), dtype=noise.dtype))
    made = Chain(
        CallableField(velocity), table(uniform_sigmas(8)), reward, gradient, step_noise=frozen.__getitem__
    )
    found = Ascent("embeddings", 12, 0.2, radius=0.5).run(made, cond, noise)
    assert found.rewards.mean() > found.trace[0].mean() + 0.02
    assert torch.equal(found.noise, noise)
    for new, old in ((found.cond.embeddings, cond.embeddings), (found.cond.pooled, cond.pooled)):
        ratio = (new - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
        assert ratio.max() <= 0.5 + 1e-9
        assert ratio.max() > 0.1
    torch.testing.assert_close(made.end(found.cond, found.noise).rewards, found.rewards)


def test_the_best_iterate_is_kept_of_each_sample():
    """Steps of twice the norm overshoot: the last iterate is worse than others."""
    cond, noise = start()
    found = Ascent("noise", 8, 2.0).run(chain(), cond, noise)
    assert torch.equal(found.rewards, found.trace.max(0).values)
    assert torch.equal(found.iterations.long(), found.trace.argmax(0))
    assert (found.trace[-1] < found.rewards).any()


def test_a_gradient_that_is_not_finite_keeps_the_best_so_far():
    cond, noise = start()
    calls = []

    def failing(latents, prompts):
        calls.append(len(latents))
        return reward(latents, prompts) * (float("nan") if len(calls) > 3 else 1.0)

    made = Chain(CallableField(velocity), ode_euler(uniform_sigmas(8)), failing)
    found = Ascent("noise", 8, 0.1).run(made, cond, noise)
    assert found.stopped is not None
    assert found.stopped.startswith("stopped at iteration 3: reward is NaN")
    assert len(found.trace) == 3
    assert torch.equal(found.rewards, found.trace.max(0).values)
    with pytest.raises(NonFiniteError, match="a prompt"):
        Ascent("noise", 8, 0.1).run(made, cond, noise)


def test_fewer_gradient_steps_take_fewer_passes():
    cond, noise = start()
    made = chain(gradient="deis2", gradient_steps=2, branches=2)
    found = Ascent("noise", 3, 0.1).run(made, cond, noise)
    assert made.passes == 2 * (3 * (8 + 2 * 2) + 8)
    assert (found.rewards > found.trace[0]).any()


def test_constraints_are_projections():
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    first = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    on, within = onto_sphere(x, first), into_ball(x, first, 0.3)
    torch.testing.assert_close(on.flatten(1).norm(dim=1), first.flatten(1).norm(dim=1))
    torch.testing.assert_close(onto_sphere(on, first), on)
    torch.testing.assert_close(into_ball(within, first, 0.3), within)
    assert torch.equal(into_ball(first, first, 0.3), first)
    assert (onto_sphere(torch.zeros_like(x), first) == 0).all()
