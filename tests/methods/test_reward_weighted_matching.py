"""Reward-weighted flow matching: its regression is the tilt's velocity in closed form, and its errors."""

import pytest
import torch

from am_diffusers.methods.parts.advantages import LEAST_WEIGHT, group_weights
from am_diffusers.noise import LatentSpec
from am_diffusers.velocity import CallableField
from methods_around import collect as collect_samples
from methods_around import make_method
from oracles import gaussian

BASE = gaussian(0.3, 0.5)
LATENTS = LatentSpec((1,), dtype=torch.float64)
SCALE, GROUP = 0.6, 64
TILTED = gaussian(0.3 + SCALE * 0.5, 0.5)
"""A linear reward moves the mean of a Gaussian by scale times its variance."""


def make(policy=None, reward=lambda x, prompts: x[:, 0], **given):
    plain = {"reward": reward, "latents": LATENTS, "reward_scale": SCALE, "samples_per_prompt": GROUP}
    return make_method("reward_weighted_matching", policy or BASE.field(), BASE.field(), **(plain | given))


def collect(method, num, iteration=0, group=GROUP):
    return collect_samples(method, num, iteration, group=group)


def slope_of_the_loss(method, examples, power):
    """Derivative of each row's loss when the policy moves by x^power, over its mean size."""
    velocity = method.policy(examples.latents, examples.sigmas, None)
    direction = examples.latents**power
    return (2 * examples.weight[:, None] * (velocity - examples.target) * direction)[:, 0]


@pytest.mark.parametrize("sigma_min", [0.0, 0.5])
def test_the_loss_is_stationary_at_the_tilt_and_not_at_the_base(sigma_min):
    """Below sigma_min at the base; 4 standard errors of 100 groups, against 1 and x."""

    def fixed_point(x, sigma, cond):
        early = (sigma >= sigma_min)[:, None]
        return torch.where(early, TILTED.velocity(x, sigma), BASE.velocity(x, sigma))

    # Few steps and small groups have a bias of some hundredths of the way.
    group, num = 256, 100
    fine = {"num_inference_steps": 512, "samples_per_prompt": group}
    method = make(CallableField(fixed_point), rwm_sigma_min=sigma_min, **fine)
    examples = collect(method, num * group, group=group).examples
    other = make(BASE.field(), rwm_sigma_min=sigma_min, **fine)
    for power in range(2):
        groups = slope_of_the_loss(method, examples, power).reshape(num, -1).sum(1)
        assert abs(groups.mean()) < 4 * groups.std() / num**0.5, power
        groups = slope_of_the_loss(other, examples, power).reshape(num, -1).sum(1)
        assert abs(groups.mean()) > 8 * groups.std() / num**0.5, power


def test_a_row_is_the_weighted_flow_matching_loss_but_for_a_term_of_mean_zero():
    """They differ by 2 n . u, n having mean 0: both levels of an image give back image, noise and weight."""
    method = make(rwm_noises=2, rwm_max_weight=1e9)
    examples = collect(method, GROUP).examples
    x, sigma = examples.latents, examples.sigmas
    base = BASE.velocity(x, sigma)
    weight = examples.weight * len(sigma) / (2 * (1 - sigma) / sigma)
    flow = base + (examples.target - base) * (weight / (weight - 1))[:, None]  # noise - clean
    clean = x - sigma[:, None] * flow
    pairs = clean.reshape(GROUP, 2)
    assert torch.allclose(pairs[:, 0], pairs[:, 1], atol=1e-9)  # both levels are of one image
    expected = torch.exp(SCALE * pairs[:, 0])
    assert torch.allclose(weight.reshape(GROUP, 2)[:, 0], expected / expected.mean())


def test_rows_below_sigma_min_hold_the_policy_to_the_base():
    examples = collect(make(rwm_sigma_min=0.5), GROUP).examples
    late = examples.sigmas < 0.5
    base = BASE.velocity(examples.latents, examples.sigmas)
    assert 0.4 < late.double().mean() < 0.6
    assert torch.equal(examples.target[late], base[late])
    assert (examples.target[~late] != base[~late]).all()


def test_images_are_those_of_the_base_whatever_the_policy():
    far = CallableField(lambda x, sigma, cond: BASE.velocity(x, sigma) + 5)
    ours, theirs = (collect(make(policy), GROUP) for policy in (far, BASE.field()))
    assert torch.equal(ours.rewards, theirs.rewards)
    assert torch.equal(ours.examples.target, theirs.examples.target)


def test_weights_have_mean_one_in_a_group_and_a_least_value():
    weights = group_weights(torch.tensor([0.0, 1.0, 500.0, 500.0]), ["a", "a", "b", "b"], 2)
    assert weights.tolist() == pytest.approx([2 / (1 + torch.e), 2 * torch.e / (1 + torch.e), 1, 1])
    assert group_weights(torch.tensor([0.0, 99.0]), ["a", "a"], 2).tolist() == pytest.approx(
        [LEAST_WEIGHT, 2]
    )
    with pytest.raises(ValueError, match="groups of 2 neighbouring samples"):
        group_weights(torch.zeros(2), ["a", "b"], 2)


def test_the_effective_share_of_the_images_is_logged():
    assert collect(make(reward=lambda x, prompts: 0 * x[:, 0]), GROUP).metrics["effective_share"] == 1
    strong = collect(make(reward_scale=1e4), GROUP).metrics["effective_share"]
    assert strong == pytest.approx(1 / GROUP, rel=0.05)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("rwm_noises", 0, "from 1 to 1000"),
        ("rwm_noises", 1001, "from 1 to 1000"),
        ("rwm_sigma_min", 1.0, r"in \[0, 1\)"),
        ("rwm_sigma_min", -0.1, r"in \[0, 1\)"),
        ("rwm_max_weight", 0.0, "positive"),
    ],
)
def test_settings_out_of_range_are_refused(flag, value, message):
    with pytest.raises(ValueError, match=f"--{flag} must be {message}"):
        make(**{flag: value})
