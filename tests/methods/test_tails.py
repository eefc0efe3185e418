"""DRaFT and ReFL: gradients against central differences and the adjoint chain, passes, steps, errors."""

import itertools
import weakref
from functools import cache

import pytest
import torch

from am_diffusers.adjoint import lean_adjoint, terminal_adjoint
from am_diffusers.methods.parts.surroundings import Sizes
from am_diffusers.noise import generators_for
from am_diffusers.rollout import rollout, sample
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.terminal_cost import reward_gradient
from am_diffusers.transitions import TRANSITIONS, shifted_sigmas, uniform_sigmas
from am_diffusers.velocity import CallableField
from methods_around import LATENTS, make_method
from methods_around import collect as collect_samples
from oracles import THREE_MODES, CountingField, float64, unconditional
from pull_backs import swept

K = 6
SAMPLERS = [
    ("ode_euler", uniform_sigmas),
    ("memoryless_local_linear", uniform_sigmas),
    ("ancestral", lambda steps: shifted_sigmas(steps, 3)),
]
TABLES = [TRANSITIONS[name](sigmas(K)) for name, sigmas in SAMPLERS]


def reward(x, prompts):
    return torch.sin(2 * x[:, 0]) - 0.3 * x.square().sum(1)


def shifted(shifts, table):
    """The mixture's velocity plus a vector of its own at each of the K steps, `shifts` (K, 2)."""

    def velocity(x, sigma, cond):
        return THREE_MODES.velocity(x, sigma) + shifts[torch.searchsorted(-table.sigmas, -sigma)]

    return CallableField(velocity)


def some_shifts(requires_grad=True):
    generator = torch.Generator().manual_seed(5)
    shifts = 0.3 * torch.randn(K, 2, generator=generator, dtype=torch.float64)
    return shifts.requires_grad_(requires_grad)


def collect(method, num=4, iteration=0):
    return collect_samples(method, num, iteration)


def make(name, policy, i, **given):
    """A method with the sampler of TABLES[i]; no reward of the base is asked for."""
    sampler, sigmas = SAMPLERS[i]
    plain = {"reward": reward, "reward_scale": 3.0, "num_inference_steps": K}
    return make_method(name, policy, **(plain | {"rollout_sampler": sampler, "sigmas": sigmas} | given))


def draft(shifts, i, steps, **given):
    return make("draft", shifted(shifts, TABLES[i]), i, draft_steps=steps, **given)


def losses(method, collected, size=100):
    parts = [method.loss(part) for part in collected.examples.split(size)]
    return sum(loss for loss, _ in parts), sum(numbers["reward"] for _, numbers in parts)


@cache
def central_differences(i):
    """Of the mean reward of a whole rollout by TABLES[i] in each shift, the noise held, (K, 2)."""
    found, step = torch.zeros(K, 2, dtype=torch.float64), 1e-5
    for k, j in itertools.product(range(K), range(2)):
        for sign in (1, -1):
            shifts = some_shifts(requires_grad=False)
            shifts[k, j] += sign * step
            generators = generators_for(0, 0, range(4))
            noise = LATENTS.draw(generators)
            policy, draw = shifted(shifts, TABLES[i]), lambda _, own=generators: LATENTS.draw(own)
            final = sample(policy, TABLES[i], unconditional(4), noise, draw)
            found[k, j] += sign * reward(final, None).mean() / (2 * step)
    return found


@pytest.mark.parametrize("i", range(len(TABLES)))
@pytest.mark.parametrize("steps", [1, 3, K])
def test_draft_is_the_derivative_of_the_reward_with_respect_to_its_last_steps(i, steps):
    """Against central differences of error 1e-9; earlier steps have no gradient."""
    shifts = some_shifts()
    method = draft(shifts, i, steps)
    loss, mean_reward = losses(method, collect(method))
    loss.backward()
    assert loss.item() == pytest.approx(-3.0 * mean_reward, rel=1e-12)
    expected = -3.0 * central_differences(i)
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(shifts.grad[K - steps :], expected[K - steps :], rtol=0, atol=1e-8)
    assert not shifts.grad[: K - steps].any()


@pytest.mark.parametrize("i", range(len(TABLES)))
def test_all_steps_differentiated_equal_the_chain_of_vector_jacobian_products(i):
    """The loss changes with shift k as v_coef_k * adjoint_{k+1}, along the policy's own rollout."""
    shifts, num, table = some_shifts(), 4, TABLES[i]
    policy = shifted(shifts, table)
    method = draft(shifts, i, K)
    losses(method, collect(method, num))[0].backward()
    generators = generators_for(0, 0, range(num))
    noise = LATENTS.draw(generators)
    path = rollout(policy, table, unconditional(num), noise, lambda k: noise_of(table, k, generators))

    def terminal(final):
        return terminal_adjoint(reward_gradient(reward, final, path.cond.prompts)[1], 3.0 / num)

    adjoints = swept(lean_adjoint, policy, path, terminal).adjoints
    expected = torch.stack([table.v_coef[k] * adjoints[k + 1].sum(0) for k in range(K)])
    torch.testing.assert_close(shifts.grad, expected, rtol=1e-10, atol=1e-12)


def noise_of(table, k, generators):
    return (
        LATENTS.draw(generators) if table.std[k] > 0 else torch.zeros(len(generators), 2, dtype=torch.float64)
    )


def test_no_pass_is_wasted():
    for steps in (1, 2, K):
        policy = CountingField(shifted(some_shifts(), TABLES[1]))
        method = make("draft", policy, 1, draft_steps=steps)
        collected = collect(method)
        assert len(policy.calls) == K - steps
        losses(method, collected, size=2)
        assert len(policy.calls) == K - steps + 2 * steps
        assert policy.vjps == []


def refl(shifts, i, last_steps, **given):
    return make("refl", shifted(shifts, TABLES[i]), i, refl_last_steps=last_steps, **given)


def test_refl_draws_one_of_the_last_steps_for_all_and_rewards_its_clean_estimate():
    table, shifts, seen = TABLES[0], some_shifts(), set()
    for iteration in range(20):
        method = refl(shifts, 0, 3)
        collected = collect(method, iteration=iteration)
        sigma = collected.examples.table.sigmas[0]
        k = int((table.sigmas == sigma).nonzero()[0])
        seen.add(k)
        again = collect(refl(shifts, 0, 3), iteration=iteration).examples
        assert torch.equal(again.latents, collected.examples.latents)
        shifts.grad = None
        loss, mean_reward = losses(method, collected)
        loss.backward()
        assert sorted(shifts.grad.abs().sum(1).nonzero()[:, 0].tolist()) == [k]  # a single call
        x = collected.examples.latents
        clean = x - sigma * shifted(shifts, table)(x, sigma.expand(4), None)
        assert mean_reward == pytest.approx(reward(clean, None).mean().item(), rel=1e-12)
    assert seen == {3, 4, 5}


def test_refl_of_the_last_step_is_draft_of_one_step():
    found = []
    for method_of in (lambda s: refl(s, 1, 1), lambda s: draft(s, 1, 1)):
        shifts = some_shifts()
        method = method_of(shifts)
        losses(method, collect(method))[0].backward()
        found.append(shifts.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "method_of",
    [lambda s, **given: draft(s, 1, 2, **given), lambda s, **given: refl(s, 1, 2, **given)],
)
@pytest.mark.parametrize("size", [1, 2, 5, None])
def test_rewards_take_so_many_samples_at_once_and_the_gradient_stays(method_of, size):
    """Identity; when a pass of the reward begins, the graph of the one before is gone."""
    found = []
    for own in (None, size):
        shifts, calls, graphs = some_shifts(), [], []

        def noted(x, prompts, calls=calls, graphs=graphs):
            assert all(graph() is None for graph in graphs)
            calls.append(len(x))
            inside = torch.exp(x)  # kept for the backward pass
            graphs.append(weakref.ref(inside))
            return inside.log()[:, 0].sin() - 0.3 * x.square().sum(1)

        method = method_of(shifts, sizes=Sizes(reward=own), reward=noted)
        loss, mean_reward = losses(method, collect(method, 5))
        loss.backward()
        found.append((loss.item(), mean_reward, shifts.grad))
    assert sum(calls) == 5
    assert max(calls) == (size or 5)
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-13)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-12, atol=1e-15)
    assert found[0][2].abs().max() > 1e-2


@pytest.mark.parametrize("method_of", [draft, refl])
def test_a_linear_reward_goes_up(method_of):
    """By far more than the .2 of noise of 32 samples."""
    shifts = torch.zeros(K, 2, dtype=torch.float64, requires_grad=True)
    method, rewards = method_of(shifts, 0, 2, reward=lambda x, prompts: x[:, 0]), []
    optimizer = torch.optim.Adam([shifts], lr=0.1)
    for iteration in range(30):
        optimizer.zero_grad()
        loss, mean_reward = losses(method, collect(method, 32, iteration))
        loss.backward()
        optimizer.step()
        rewards.append(mean_reward)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.5


def test_wrong_settings_and_rewards_are_errors():
    for steps, rule in ((K + 1, "from 1 to num_inference_steps, 6, got 7"), (0, "from 1 .*, got 0")):
        with pytest.raises(ValueError, match=f"--draft_steps must be {rule}"):
            draft(some_shifts(), 0, steps)
    for steps, rule in ((K + 1, "from 1 to num_inference_steps, 6, or null, got 7"), (0, "from 1 .*, got 0")):
        with pytest.raises(ValueError, match=f"--refl_last_steps must be {rule}"):
            refl(some_shifts(), 0, steps)
    with pytest.raises(ValueError, match="--reward_scale must be positive"):
        draft(some_shifts(), 0, 1, reward_scale=-1.0)
    method = draft(some_shifts(), 0, 1, reward=lambda x, prompts: x.detach().sum(1))
    examples = collect(method).examples
    with pytest.raises(ValueError, match="requires_grad=False; use a reward with `differentiable = True`"):
        method.loss(examples)
    assert examples.describe().startswith("ends from sigma 0.1667, prompts ['prompt 0'")
    assert method.needs_reward_gradient
    assert not method.aims_at_tilt


def test_a_reward_that_is_not_a_number_names_the_prompt():
    def broken(x, prompts):
        return x.sum(1) / float64(1, 0, 1, 1) - x.sum(1) / float64(1, 0, 1, 1)

    method = draft(some_shifts(), 0, 1, reward=broken)
    with pytest.raises(NonFiniteError, match="prompt 1"):
        method.loss(collect(method).examples)
