"""Flow-GRPO: its gradient against REINFORCE and closed forms, clip, KL, steps, batch sizes, errors."""

import math

import pytest
import torch

from am_diffusers.methods.flow_grpo import FlowGRPO
from am_diffusers.methods.parts.advantages import Advantages
from am_diffusers.noise import generator_for, generators_for
from am_diffusers.transitions import TRANSITIONS, ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning
from grpo_chain import (
    LATENTS,
    LAW,
    TABLE,
    K,
    collect,
    gradient,
    make,
    quadratic,
    reward,
    shifted,
    some_shifts,
    total_loss,
)
from oracles import affine


@pytest.mark.parametrize("kind", ["centred", "normalised"])
def test_with_one_pass_the_gradient_is_the_reinforce_estimator(kind):
    """States remade by hand: minus the mean of A times the scores of all its steps, plus that of the KL."""
    shifts, num = some_shifts(), 8
    method = make(shifted(shifts), advantages=kind, grpo_kl_weight=0.3)
    collected = collect(method, num)
    generators = generators_for(0, 0, range(num))
    x, log_prob, path_kl = LATENTS.draw(generators), 0.0, 0.0
    for k in range(K - 1):
        velocity = LAW.velocity(x, TABLE.sigmas[k]) + shifts[k]
        noise, std = LATENTS.draw(generators), TABLE.std[k]
        mean = TABLE.x_coef[k] * x + TABLE.v_coef[k] * velocity
        after = (mean + std * noise).detach()
        log_prob = log_prob - 0.5 * (((after - mean) / std) ** 2).sum(1)
        path_kl = path_kl + 0.5 * (TABLE.v_coef[k] / std * shifts[k]) ** 2
        x = after
    final = x - TABLE.sigmas[K - 1] * LAW.velocity(x, TABLE.sigmas[K - 1])  # the base's
    rewards = quadratic(final, None)
    torch.testing.assert_close(collected.rewards, rewards, rtol=1e-12, atol=1e-14)
    advantages = Advantages(2.0, 4, kind)(rewards, ["a"] * 4 + ["b"] * 4)
    (expected,) = torch.autograd.grad(-(advantages * log_prob).mean() + 0.3 * path_kl, shifts)
    torch.testing.assert_close(gradient(method, shifts, collected), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(method, shifts, collected, 5), expected, rtol=1e-10, atol=1e-12)


def test_rounding_that_depends_on_the_batch_clips_nothing_in_the_first_pass():
    """As in half precision; exaggerated: rows alone have another velocity than eight together."""
    shifts = some_shifts()
    exact = shifted(shifts)

    def rounded(x, sigma, cond):
        return exact(x, sigma, cond) + (0.5 if len(x) == 1 else 0.0)

    method = make(CallableField(rounded), grpo_passes=2, grpo_clip_range=0.05)
    _, metrics = total_loss(method, collect(method), size=1)
    assert metrics["clipped"] == 0
    _, metrics = total_loss(method, collect(method, iteration=1), size=1)
    assert metrics["clipped"] > 0


def test_the_expected_gradient_is_that_of_the_mean_reward():
    """Linear reward on a 1-D Gaussian chain, 4 standard errors of 50 batches of 200 samples."""
    shifts, num_batches = some_shifts(), 50
    method = make(shifted(shifts), reward=reward, grpo_kl_weight=0.0)
    found = torch.stack(
        [gradient(method, shifts, collect(method, 200, iteration=i)) for i in range(num_batches)]
    )
    expected, onward = torch.zeros(K, dtype=torch.float64), 1.0
    for k in range(K - 1, -1, -1):
        if k < K - 1:
            expected[k] = -2.0 * 0.7 * TABLE.v_coef[k] * onward
        slope, _ = affine(LAW.field(), TABLE.sigmas[k].item())
        onward = onward * (TABLE.x_coef[k] + TABLE.v_coef[k] * slope).item()
    errors = found.std(0) / num_batches**0.5
    assert ((found.mean(0) - expected).abs()[:-1] < 4 * errors[:-1]).all()
    assert (expected[:-1].abs() > 7 * errors[:-1]).all()  # so that a wrong factor would be seen
    assert not found[:, -1].any()  # the last step is the base's


def test_the_gradient_of_the_kl_is_exact():
    """Equal rewards have no advantage; the KL of a step is (v_coef / std * shift)^2 / 2."""
    shifts = some_shifts()
    method = make(shifted(shifts), reward=lambda x, prompts: x[:, 0] * 0, grpo_kl_weight=0.3)
    collected = collect(method)
    ratio = (TABLE.v_coef[:-1] / TABLE.std[:-1]) ** 2
    expected = torch.zeros(K, dtype=torch.float64)
    expected[:-1] = 0.3 * ratio * shifts.detach()[:-1]
    torch.testing.assert_close(gradient(method, shifts, collected), expected, rtol=1e-12, atol=1e-14)
    loss, numbers = total_loss(method, collected, size=3)
    path_kl = 0.5 * (ratio * shifts.detach()[:-1] ** 2).sum().item()
    assert numbers == pytest.approx({"path_kl": path_kl, "clipped": 0})
    assert loss.item() == pytest.approx(0.3 * path_kl, rel=1e-12)


def test_a_subset_of_steps_stands_for_all():
    """One step of four has four times its gradient; over many draws each is drawn equally often."""
    shifts, drawn = some_shifts(), []
    full = make(shifted(shifts))
    expected = (K - 1) * gradient(full, shifts, collect(full))
    for i in range(200):
        method = make(shifted(shifts), loss_steps=1)
        cond = Conditioning(("a",) * 4 + ("b",) * 4)
        shared = generator_for(i, "shared")
        collected = method.collect(cond, generators_for(0, 0, range(8)), shared)
        (k,) = set(collected.examples.steps.tolist())
        drawn.append(k)
        if i < 10:
            found = gradient(method, shifts, collected)
            assert found[k].item() == pytest.approx(expected[k].item(), rel=1e-10)
            assert len(found.nonzero()) == 1
    counts = [drawn.count(k) for k in range(K - 1)]
    assert all(abs(n - 50) < 4 * math.sqrt(200 * 0.25 * 0.75) for n in counts), counts


def test_a_ratio_beyond_the_clip_has_no_gradient_where_that_would_gain():
    """Each row against PPO's minimum, once the policy has moved; the hinge adds a constant to it."""
    shifts = some_shifts()
    method = make(shifted(shifts), grpo_passes=2, grpo_kl_weight=0.0, grpo_clip_range=0.1)
    before = collect(method, 40)
    with torch.no_grad():
        shifts += torch.tensor([0.1, -0.2, 0.15, 0.1, 0.0])
    examples = collect(method, 40, iteration=1).examples
    assert torch.equal(examples.latents, before.examples.latents)
    ratios, outcomes = [], set()
    for row in examples.split(1):
        loss, _ = method.loss(row)
        (found,) = torch.autograd.grad(loss, shifts)
        k, advantage = row.steps.item(), row.advantage.item()
        velocity = LAW.velocity(row.latents, TABLE.sigmas[k]) + shifts[k]
        log_prob = TABLE.log_prob(k, row.next_latents, row.latents, velocity)
        ratio = (log_prob - row.log_prob).exp()
        clipped = ratio.clamp(0.9, 1.1)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        (expected,) = torch.autograd.grad(-surrogate.sum() / 40, shifts, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        constant = 1.1 * max(advantage, 0)
        assert loss.item() == pytest.approx((constant - surrogate.item()) / 40, rel=1e-9)
        assert loss.item() >= 0
        ratios.append(ratio.item())
        outcomes.add((ratio.item() > 1.1, ratio.item() < 0.9, advantage > 0, bool(found.any())))
        gains = (ratio.item() > 1.1 and advantage > 0) or (ratio.item() < 0.9 and advantage < 0)
        assert bool(found.any()) != gains
    assert len(outcomes) == 6  # above, below and inside, with both signs
    share = sum(abs(ratio - 1) > 0.1 for ratio in ratios) / len(ratios)
    assert method.loss(examples)[1]["clipped"] == pytest.approx(share)


@pytest.mark.parametrize("kind", ["centred", "normalised"])
def test_a_quadratic_reward_goes_up_with_several_passes(kind):
    """From -.99 of the base to above -.6, far above the noise of 64 samples."""
    shifts = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    method = make(shifted(shifts), advantages=kind, grpo_passes=2, grpo_kl_weight=0.1)
    optimizer, rewards = torch.optim.Adam([shifts], lr=0.05), []
    for iteration in range(60):
        collected = collect(method, 64, iteration)
        if "reward" in collected.metrics:
            rewards.append(collected.metrics["reward"])
        optimizer.zero_grad()
        total_loss(method, collected)[0].backward()
        optimizer.step()
    assert len(rewards) == 30
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.25


def test_the_rows_say_what_they_are():
    method = make(LAW.field(), loss_steps=1)
    collected = collect(method)
    row = collected.examples.split(1)[0]
    assert row.describe().startswith(f"steps {row.steps.tolist()}, prompts ['prompt 0'], advantages [")
    assert collected.metrics["reward"] == pytest.approx(collected.rewards.mean().item())
    assert collected.metrics["reward_std"] == pytest.approx(collected.rewards.std(correction=0).item())


def test_wrong_settings_tables_and_groups(monkeypatch):
    assert FlowGRPO.compares_samples
    for wrong, match in (
        ({"grpo_passes": 0}, "--grpo_passes must be from 1 to 1000, got 0"),
        ({"grpo_clip_range": 1.0}, r"--grpo_clip_range must be in \(0, 1\), got 1.0"),
        ({"grpo_kl_weight": -1.0}, "--grpo_kl_weight must be 0 or positive, got -1.0"),
        ({"advantages": "raw"}, "--advantages must be centred or normalised, got raw"),
        ({"loss_steps": 5}, "--loss_steps must be 'all' or from 1 to num_inference_steps - 1.*, got 5"),
    ):
        with pytest.raises(ValueError, match=match):
            make(LAW.field(), **wrong)
    with pytest.raises(ValueError, match=r"1 \.\. 3 or 'all', got 4"):
        collect(make(LAW.field(), loss_steps=4, sigmas=lambda steps: uniform_sigmas(steps - 1)))
    with pytest.raises(ValueError, match="groups of 4 neighbouring samples"):
        collect(make(LAW.field()), 6)
    monkeypatch.setitem(TRANSITIONS, "memoryless_local_linear", ode_euler)
    with pytest.raises(ValueError, match="memoryless table"):
        collect(make(LAW.field()))
