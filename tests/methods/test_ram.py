"""RAM: its targets' mean and fixed points on Gaussian data in closed form, passes, rows, ranks, errors."""

import numpy as np
import pytest
import torch

from am_diffusers.methods.parts.advantages import Advantages
from am_diffusers.methods.parts.surroundings import Sizes
from am_diffusers.methods.ram import RAM
from am_diffusers.noise import LatentSpec, generators_for
from am_diffusers.transitions import ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField
from methods_around import collect as collect_samples
from methods_around import make_method, total_loss
from oracles import CountingField, affine, gaussian
from ram_fixed_point import (
    SIGMAS,
    Gaussian,
    Quadratic,
    distance,
    end_points,
    euler_end_points,
    fixed_point,
    mean_target,
    regressed,
)

BASE, OTHER = gaussian(0.0, 1.0), gaussian(0.4, 0.6)
POLICY_FIELD, BASE_FIELD = OTHER.field(), BASE.field()
LATENTS = LatentSpec((1,), dtype=torch.float64)
TABLE = ode_euler(uniform_sigmas(8))
REWARD = Quadratic(slope=0.3, curvature=1.0, best=1.5)


def reward(x, prompts):
    return REWARD.slope * x[:, 0] - REWARD.curvature / 2 * (x[:, 0] - REWARD.best) ** 2


def make(policy=POLICY_FIELD, base=BASE_FIELD, **given):
    """Rewards of groups of 4 are compared, by half their centred values."""
    plain = {"reward": reward, "latents": LATENTS, "reward_scale": 0.5, "samples_per_prompt": 4}
    return make_method("ram", policy, base, **(plain | given))


def collect(method, num, iteration=0):
    return collect_samples(method, num, iteration, group=4)


# ------------------------------------------------------------------------------------------- the law


def test_the_mean_of_the_targets_given_the_state_is_that_of_the_closed_form():
    """4 standard errors of 1000 groups (of 4 pictures, 4 noises each), against 1, x and x^2."""
    scale, mean, gain = 0.5, 0.0, 1.0
    for k, sigma in enumerate(TABLE.sigmas[:-1].tolist()):
        slope, intercept = affine(OTHER.field(), sigma)
        factor = 1 + TABLE.v_coef[k].item() * slope
        mean, gain = factor * mean + TABLE.v_coef[k].item() * intercept, factor * gain
    ends = Gaussian(mean, gain**2)  # not the law whose velocity the policy is: the steps are few
    examples = collect(make(reward_scale=scale), 4000).examples
    x, sigma = examples.latents[:, 0].numpy(), examples.sigmas.numpy()
    expected = mean_target(
        x,
        sigma,
        base=Gaussian(0.0, 1.0).velocity(sigma),
        policy=Gaussian(0.4, 0.6).velocity(sigma),
        law=ends,
        reward=REWARD,
        scale=scale,
    )
    for power in range(3):
        groups = ((examples.target[:, 0].numpy() - expected) * x**power).reshape(1000, -1).mean(1)
        assert abs(groups.mean()) < 4 * groups.std() / np.sqrt(1000), power


def test_the_bias_of_a_quadratic_reward_is_of_second_order_in_its_scale():
    """Slope 2 within .3 of log error over log scale, falling below 2 as the tilt saturates."""
    law, quadratic = Gaussian(0.0, 1.0), Quadratic(curvature=1.0, best=1.5)
    scales = np.array([0.0125, 0.025, 0.05, 0.1])
    learned = [fixed_point(law, quadratic, scale) for scale in scales]
    tilted = [quadratic.tilted(law, scale) for scale in scales]
    errors = [distance(policy, target) for policy, target in zip(learned, tilted, strict=True)]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(scales))
    assert slopes == pytest.approx([2, 2, 2], abs=0.3)
    for policy, target in zip(learned, tilted, strict=True):
        assert law.mean < end_points(policy).mean < target.mean  # the reward pulls too weakly
    strong = distance(fixed_point(law, quadratic, 0.4), quadratic.tilted(law, 0.4))
    assert np.log(strong / errors[-1]) / np.log(4) < 1.7


@pytest.mark.parametrize("scale", [0.1, 0.4])
def test_a_linear_reward_on_gaussian_data_has_no_bias(scale):
    """Up to the quadrature of the ODE."""
    law, linear = Gaussian(0.3, 0.5), Quadratic(slope=1.0)
    policy = fixed_point(law, linear, scale)
    assert distance(policy, linear.tilted(law, scale)) < 1e-6
    assert end_points(policy).mean == pytest.approx(0.3 + scale * 0.5, abs=1e-6)


@pytest.mark.parametrize(("scale", "stable"), [(0.5, True), (0.9, True), (1.3, False), (1.6, False)])
def test_the_fixed_point_is_stable_only_while_advantages_deviate_by_less_than_1(scale, stable):
    """Linear reward on N(0, 1), where the tilt is the fixed point whatever its scale, and std(A) = scale.

    The mismatch with the states' own velocity comes back times scale * std(E[r | x]), largest at small sigma.
    """
    law, linear = Gaussian(0.0, 1.0), Quadratic(slope=1.0)
    tilted = linear.tilted(law, scale)
    policy = tilted.velocity(SIGMAS) + 1e-4
    before = distance(policy, tilted)
    for _ in range(60):
        policy = policy + 0.3 * (regressed(policy, law, linear, scale, end_points) - policy)
    assert (distance(policy, tilted) < before / 10) == stable
    assert (distance(policy, tilted) > before * 10) != stable


NODES = torch.linspace(0, 1, 9, dtype=torch.float64)


def test_training_reaches_the_fixed_point_and_not_the_tilt():
    """Mean of the end points .349 and not .429, within 4 %: 25,600 pictures leave about 1.5 % of noise."""
    weights = torch.zeros(9, 2, dtype=torch.float64, requires_grad=True)
    law, quadratic, scale = Gaussian(0.0, 1.0), Quadratic(curvature=1.0, best=1.5), 0.4

    def velocity(x, sigma, cond):
        place = (sigma * 8).clamp(max=8 - 1e-9)
        left = place.long()
        a, b = torch.lerp(weights[left], weights[left + 1], (place - left)[:, None]).split(1, 1)
        return BASE.velocity(x, sigma) + a * x + b

    method = make(
        CallableField(velocity),
        num_inference_steps=40,
        reward_scale=scale,
        reward=lambda x, prompts: -0.5 * (x[:, 0] - 1.5) ** 2,
    )
    optimizer = torch.optim.Adam([weights], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for iteration in range(100):
        optimizer.zero_grad()
        method.loss(collect(method, 256, iteration).examples)[0].backward()
        optimizer.step()
        schedule.step()
    sigma = torch.tensor(SIGMAS)
    with torch.no_grad():
        at_0, at_1 = (method.policy(torch.full((1001, 1), x).double(), sigma, None)[:, 0] for x in (0.0, 1.0))
    ends = euler_end_points(np.stack([(at_1 - at_0).numpy(), at_0.numpy()]))
    expected = euler_end_points(fixed_point(law, quadratic, scale, euler_end_points))
    assert quadratic.tilted(law, scale).mean > 1.15 * expected.mean
    assert ends.mean == pytest.approx(expected.mean, rel=0.04)
    assert ends.variance == pytest.approx(expected.variance, rel=0.04)


# ----------------------------------------------------------------------------------- rows and passes


def test_a_target_is_the_bases_velocity_plus_the_advantage_times_the_distance_to_the_pictures_own():
    examples = collect(make(ram_noises=3), 8).examples
    assert len(examples) == 24
    bins = (examples.sigmas.reshape(8, 3) * 3).ceil()
    assert torch.equal(bins, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).expand(8, 3))
    x, sigma = examples.latents, examples.sigmas
    old, base = OTHER.velocity(x, sigma), BASE.velocity(x, sigma)
    # The pictures and the advantages again, from the same generators.
    clean = collect_pictures(8)
    own = (x - clean.repeat_interleave(3, 0)) / sigma[:, None]
    advantages = Advantages(0.5, 4)(reward(clean, None), ["a"] * 4 + ["b"] * 4).repeat_interleave(3)[:, None]
    torch.testing.assert_close(examples.target, base + advantages * (own - old), rtol=1e-9, atol=1e-9)


def collect_pictures(num):
    x = LATENTS.draw(generators_for(0, 0, range(num)))
    for k, sigma in enumerate(TABLE.sigmas[:-1].tolist()):
        x = x + TABLE.v_coef[k].item() * OTHER.velocity(x, sigma)
    return x


@pytest.mark.parametrize("sampler", ["ode_euler", "memoryless_local_linear"])
def test_no_pass_is_wasted_and_the_reward_has_no_gradient(sampler):
    seen = []

    def counted(x, prompts):
        seen.append((len(x), torch.is_grad_enabled()))
        return torch.round(reward(x, prompts), decimals=1)  # not differentiable

    policy, base = CountingField(OTHER.field()), CountingField(BASE.field())
    method = make(policy, base, rollout_sampler=sampler, ram_noises=3, reward=counted, sizes=Sizes(reward=6))
    collected = collect(method, 8)
    assert (len(policy.calls), len(base.calls)) == (8 + 3, 3)
    assert seen == [(6, False), (2, False)]
    total_loss(method, collected, size=5)
    assert len(policy.calls) == 8 + 3 + 5
    assert policy.vjps == base.vjps == []


def test_what_is_logged():
    collected = collect(make(ram_noises=2), 12)
    rewards = collected.rewards
    assert rewards.tolist() == pytest.approx(reward(collect_pictures(12), None).tolist(), rel=1e-12)
    assert collected.metrics["reward"] == pytest.approx(rewards.mean().item())
    assert collected.metrics["reward_std"] == pytest.approx(rewards.std(correction=0).item())
    assert collected.metrics["advantage_std"] > 0
    x, sigma = collected.examples.latents, collected.examples.sigmas
    shift = (OTHER.velocity(x, sigma) - BASE.velocity(x, sigma)).square().sum(1).mean().item()
    assert collected.metrics["velocity_shift"] == pytest.approx(shift, rel=1e-12)


def test_wrong_settings_and_groups():
    assert RAM.compares_samples
    with pytest.raises(ValueError, match="--ram_noises must be from 1 to 1000, got 0"):
        make(ram_noises=0)
    with pytest.raises(ValueError, match="--advantages must be centred or normalised, got raw"):
        make(advantages="raw")
    with pytest.raises(ValueError, match="groups of 4 neighbouring samples"):
        collect(make(), 6)
