"""Rewards of final latents to the start of the adjoint: gradients, smoothing, clipping, wrong input."""

import pytest
import torch

from am_diffusers.divergences import Divergence, Tilt
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.terminal_cost import PLAIN, GradientOptions, TerminalCost, reward_gradient
from oracles import unconditional

COND = unconditional(5)


def reward(x, prompts):
    return torch.sin(x[:, 0]) - 0.3 * x.square().sum(1)


@pytest.fixture
def noises():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, generator=generator, dtype=torch.float64)]


@pytest.mark.parametrize("size", [None, 1, 2, 5])
def test_reward_gradient_in_micro_batches(size, noises):
    x = noises[0].clone().requires_grad_(True)
    expected = reward(x, COND.prompts)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.no_grad():
        got = reward_gradient(reward, noises[0], COND.prompts, batch_size=size)
    torch.testing.assert_close(got, (expected.detach(), gradient), rtol=0, atol=1e-12)


def test_reward_gradient_scores_each_sample_with_its_own_prompt(noises):
    def by_prompt(x, prompts):
        return x[:, 0] * torch.tensor([float(p.split()[1]) for p in prompts], dtype=x.dtype)

    _, gradient = reward_gradient(by_prompt, noises[0], COND.prompts, batch_size=2)
    assert gradient[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_rewards_that_cannot_be_used_are_named(noises):
    with pytest.raises(ValueError, match="differentiable"):
        reward_gradient(lambda x, prompts: x.detach().sum(1), noises[0], COND.prompts)
    with pytest.raises(ValueError, match=r"\(5,\), got \(\)"):
        reward_gradient(lambda x, prompts: x.sum(), noises[0], COND.prompts)
    poison = torch.tensor([0, 0, 0, float("nan"), 0])
    with pytest.raises(NonFiniteError, match=r"reward is NaN or infinite for 1 of 5 samples: \['prompt 3'\]"):
        reward_gradient(lambda x, prompts: x.sum(1) + poison, noises[0], COND.prompts)
    edge = noises[0].clone()
    edge[2] = 0
    with pytest.raises(NonFiniteError, match=r"gradient .* \['prompt 2'\]"):
        reward_gradient(lambda x, prompts: x.square().sum(1).sqrt(), edge, COND.prompts)


def start(noises, options=PLAIN, *, tilt=None, noise=None, scale=2.0):
    cost = TerminalCost(reward, scale, options, tilt)
    return cost, cost(noises[0], COND.prompts, noise or (lambda: torch.zeros_like(noises[0])))


def test_the_adjoint_starts_with_minus_the_scaled_gradient(noises):
    _, terminal = start(noises)
    rewards, gradient = reward_gradient(reward, noises[0], COND.prompts)
    assert torch.equal(terminal.adjoint, -2 * gradient)
    assert torch.equal(terminal.rewards, rewards)
    assert torch.equal(terminal.gradient_norms, gradient.norm(dim=1))
    assert terminal.slopes.tolist() == [1] * 5


def test_a_tilt_multiplies_each_sample_by_its_slope(noises):
    tilt = Tilt(Divergence("pearson_chi2"), 2.0, pooled=-1.5, by_prompt={"prompt 3": -2.5})
    plain, tilted = start(noises)[1], start(noises, tilt=tilt)[1]
    normalisers = torch.tensor([-1.5, -1.5, -1.5, -2.5, -1.5], dtype=torch.float64)
    expected = (1 / (1 + 2 * (plain.rewards - normalisers)).clamp(min=0.1)).clamp(max=10)
    torch.testing.assert_close(tilted.slopes, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tilted.adjoint, expected[:, None] * plain.adjoint, rtol=0, atol=1e-12)


def test_smoothing_gives_the_gradient_of_the_local_mean(noises):
    """E sin(x + s e) = sin(x) exp(-s^2 / 2), and squares gain 3 s^2: 4,000 copies, 4 standard errors."""
    generator, std = torch.Generator().manual_seed(1), 0.5

    def noise():
        return torch.randn(noises[0].shape, generator=generator, dtype=torch.float64)

    options = GradientOptions(smoothing_std=std, smoothing_samples=4000, batch_size=2)
    _, terminal = start(noises, options, noise=noise, scale=1.0)
    x, damped = noises[0], torch.exp(torch.tensor(-(std**2) / 2, dtype=torch.float64))
    gradient = -0.6 * x
    gradient[:, 0] += damped * x[:, 0].cos()
    torch.testing.assert_close(-terminal.adjoint, gradient, rtol=0, atol=4 * 0.5 / 4000**0.5)
    rewards = damped * x[:, 0].sin() - 0.3 * (x.square().sum(1) + 3 * std**2)
    torch.testing.assert_close(terminal.rewards, rewards, rtol=0, atol=4 * 0.9 / 4000**0.5)


def test_clipping_shortens_the_longest_gradients_to_a_running_quantile(noises):
    options = GradientOptions(clip_quantile=0.5, clip_decay=0.75)
    cost, terminal = start(noises, options)
    norms = terminal.gradient_norms
    assert torch.equal(terminal.adjoint, start(noises)[1].adjoint), "no threshold is known yet"
    cost.update(norms)
    assert cost.clip_norm == norms.median().item()
    clipped = cost(noises[0], COND.prompts, noises[0].clone)
    torch.testing.assert_close(clipped.adjoint.norm(dim=1), 2 * norms.clamp(max=norms.median()))
    assert torch.equal(clipped.gradient_norms, norms), "the threshold must not follow its own clipping"
    directions = torch.cosine_similarity(clipped.adjoint, terminal.adjoint)
    torch.testing.assert_close(directions, torch.ones_like(directions))
    cost.update(2 * norms)
    assert cost.clip_norm == pytest.approx(1.25 * norms.median().item())


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing_std": -1.0},
        {"smoothing_samples": 3},
        {"smoothing_samples": 0},
        {"clip_quantile": 0.0},
        {"clip_quantile": 1.0},
        {"clip_quantile": 0.5, "clip_decay": 1.0},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        GradientOptions(**options)


def test_gradients_that_vanish_neither_stop_the_others_nor_become_nan():
    """A clamped reward: most gradients are 0, and so would be the threshold."""
    cost = TerminalCost(
        lambda x, prompts: (x * torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None]).sum(1),
        2.0,
        GradientOptions(clip_quantile=0.5),
    )
    for _ in range(2):
        found = cost(torch.ones(4, 3), ["a"] * 4, lambda: torch.zeros(4, 3))
        cost.update(found.gradient_norms)
        assert torch.equal(found.adjoint[3], torch.full((3,), -2.0))
        assert torch.equal(found.adjoint[:3], torch.zeros(3, 3))
    cost.clip_norm = 0.5
    assert cost(torch.ones(4, 3), ["a"] * 4, lambda: torch.zeros(4, 3)).adjoint.isfinite().all()
