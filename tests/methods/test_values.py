"""Rewards as values and the advantages of a prompt's samples."""

import pytest
import torch

from am_diffusers.methods.parts.advantages import STD_FLOOR, Advantages, reward_values
from am_diffusers.system.failures import NonFiniteError

PROMPTS = ["a", "a", "a", "b", "b", "b"]
REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.3, 0.3, 0.3], dtype=torch.float64)


def test_a_centred_advantage_is_the_distance_from_the_mean_of_the_others():
    expected = [2.0 * (1 - 4), 2.0 * (2 - 3.5), 2.0 * (6 - 1.5), 0, 0, 0]
    assert Advantages(2.0, 3)(REWARDS, PROMPTS).tolist() == pytest.approx(expected, abs=1e-14)


def test_normalised_advantages_have_mean_0_and_deviation_reward_scale_in_each_group():
    found = Advantages(2.0, 3, "normalised")(REWARDS, PROMPTS).reshape(2, 3)
    assert found.mean(1).tolist() == pytest.approx([0, 0], abs=1e-14)
    std = REWARDS[:3].std(correction=0).item()
    assert found[0].std(correction=0).item() == pytest.approx(2 * std / (std + STD_FLOOR), rel=1e-12)
    assert found[1].abs().max() < 1e-10  # equal rewards: no advantage, not a division by 0


def test_normalised_advantages_of_two_samples_do_not_know_the_size_of_a_reward():
    """Only which one is better counts: no tilt by reward / deviation."""
    for rewards in ([0.0, 1.0], [0.0, 100.0], [5.0, 5.5]):
        found = Advantages(3.0, 2, "normalised")(torch.tensor(rewards, dtype=torch.float64), ["a"] * 2)
        assert found.tolist() == pytest.approx([-3.0, 3.0], rel=1e-3)


@pytest.mark.parametrize("kind", ["centred", "normalised"])
def test_a_constant_in_the_reward_of_a_prompt_changes_nothing(kind):
    shifted = REWARDS + torch.tensor([5.0] * 3 + [-7.0] * 3, dtype=torch.float64)
    advantages = Advantages(1.0, 3, kind)
    torch.testing.assert_close(advantages(shifted, PROMPTS), advantages(REWARDS, PROMPTS), rtol=0, atol=1e-10)


def test_wrong_groups_and_settings_are_errors():
    with pytest.raises(ValueError, match="set samples_per_prompt to 2 or more, got 1"):
        Advantages(1.0, 1)
    with pytest.raises(ValueError, match="reward_scale must be > 0"):
        Advantages(0.0, 2)
    with pytest.raises(ValueError, match="centred or normalised, got 'raw'"):
        Advantages(1.0, 2, "raw")  # pyright: ignore[reportArgumentType]
    for size in (2, 4):
        with pytest.raises(ValueError, match=f"groups of {size} neighbouring samples that share a prompt"):
            Advantages(1.0, size)(REWARDS, PROMPTS)


def test_rewards_are_called_in_parts_and_without_gradient():
    seen = []

    def reward(latents, prompts):
        seen.append((len(latents), tuple(prompts), torch.is_grad_enabled()))
        return latents.float().sum(1)

    latents = torch.arange(10.0, dtype=torch.float64).reshape(5, 2).requires_grad_()
    values = reward_values(reward, latents, PROMPTS[:5], batch_size=2)
    assert values.tolist() == [1, 5, 9, 13, 17]
    assert values.dtype == torch.float64
    assert not values.requires_grad
    assert seen == [(2, ("a", "a"), False), (2, ("a", "b"), False), (1, ("b",), False)]


def test_wrong_rewards_are_errors():
    latents = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"a reward per sample, \(2,\), got \(2, 2\)"):
        reward_values(lambda x, prompts: x, latents, ["a", "b"])
    with pytest.raises(NonFiniteError, match=r"1 of 2 samples: \['b'\]"):
        reward_values(lambda x, prompts: torch.tensor([1.0, float("nan")]), latents, ["a", "b"])
