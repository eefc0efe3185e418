"""Training by the real method and a torch optimizer: rewards go up, and the tilted law is reached."""

import pytest
import torch

from am_diffusers.noise import LatentSpec
from am_diffusers.rollout import sample
from am_diffusers.transitions import memoryless_local_linear, ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField
from method_training import end_moments, linear_policy, train
from methods_around import adjoint_matching
from oracles import THREE_MODES, Mixture, float64, gaussian, unconditional


@pytest.mark.parametrize(
    ("transitions", "pairing"),
    [
        ("memoryless_local_linear", "right"),
        ("memoryless_local_linear", "trapezoid"),
        ("memoryless_euler", "left"),
        ("ancestral", "right"),
    ],
)
def test_a_linear_reward_goes_up(transitions, pairing):
    """32 samples of standard deviation ~1: the gain of 2 * variance is far above the noise of .2."""
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    base = THREE_MODES.field()
    method = adjoint_matching(
        CallableField(lambda x, sigma, cond: base(x, sigma, cond) + shift),
        base,
        reward=lambda x, prompts: x[:, 0],
        transitions=transitions,
        pairing=pairing,
    )
    rewards = train(method, [shift], num_samples=32, iterations=30, lr=0.1)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.5
    assert shift[0] < 0  # a velocity points from clean to noise


@pytest.mark.parametrize("adjoint", ["lean", pytest.param("full", marks=pytest.mark.slow)])
def test_training_on_a_gaussian_with_a_quadratic_reward_reaches_the_tilted_law(adjoint):
    """Within 2 % by the table's own sampler, 3 % by the ODE; base .30, .71, tilted .65, .50.

    The moments of the tuned chain are exact; 6,400 training trajectories leave about .7 % of noise in
    them, the discrete optimum itself is 1 % off at K = 80.
    """
    law, table = gaussian(0.3, 0.5), memoryless_local_linear(uniform_sigmas(80))
    policy, weights = linear_policy(law, table)
    method = adjoint_matching(
        policy,
        law.field(),
        reward=lambda x, prompts: -0.5 * (x[:, 0] - 1) ** 2,
        latents=LatentSpec((1,), dtype=torch.float64),
        num_inference_steps=80,
        adjoint=adjoint,
        mask_quantile=None,
    )
    train(method, [weights], num_samples=64, iterations=100, lr=0.05)
    tilted = law.tilted(float64(2.0), curvature=2.0)
    expected = tilted.mean().item(), tilted.variances.item() ** 0.5
    assert expected == pytest.approx((0.65, 0.5))
    assert end_moments(table, policy, law.field()) == pytest.approx(expected, rel=0.02)
    assert end_moments(ode_euler(table.sigmas), policy, law.field()) == pytest.approx(expected, rel=0.03)


def mlp_policy(law: Mixture, width: int = 32):
    """Base velocity plus a small network of x, the base's clean estimate and sigma, zero at first."""
    torch.manual_seed(0)
    sizes = [(9, width), (width, width), (width, 2)]
    layers = [torch.nn.Linear(i, o, dtype=torch.float64) for i, o in sizes]
    torch.nn.init.zeros_(layers[-1].weight)
    torch.nn.init.zeros_(layers[-1].bias)
    net = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])

    def velocity(x, sigma, cond):
        base, s = law.velocity(x, sigma), sigma[:, None]
        waves = [f(c * s) for c in (3, 6) for f in (torch.sin, torch.cos)]
        return base + net(torch.cat([x, x - s * base, s, *waves], dim=1))

    return CallableField(velocity), list(net.parameters())


@pytest.mark.slow
def test_training_on_a_2d_mixture_reaches_the_tilted_law():
    """Mean, covariance and mode weights in closed form, by SDE and ODE sampling of the tuned field.

    The tolerances hold the discretisation (weights .02 at K = 40 for two such modes on a 1-D grid) and
    Monte Carlo errors of 20,000 samples (four standard errors: weights .014, mean .022, covariance .03);
    untuned, the largest deviations are .27, .53 and .26.
    """
    law, grid, num = THREE_MODES, uniform_sigmas(40), 20_000
    slope, curvature, reward_scale = float64(0.8, -0.4), 0.4, 2.0
    policy, parameters = mlp_policy(law)
    method = adjoint_matching(
        policy,
        law.field(),
        reward=lambda x, prompts: (x @ slope - 0.5 * curvature * x.square().sum(1)) / reward_scale,
        num_inference_steps=40,
        reward_scale=reward_scale,
        loss_steps=20,
        mask_quantile=None,
    )
    train(method, parameters, num_samples=128, iterations=300, lr=0.02)
    generator, tilted = torch.Generator().manual_seed(0), law.tilted(slope, curvature)

    def noise(_=0):
        return torch.randn(num, 2, generator=generator, dtype=torch.float64)

    for table in (memoryless_local_linear(grid), ode_euler(grid)):
        x = sample(policy, table, unconditional(num), noise(), noise)
        torch.testing.assert_close(tilted.mode_weights(x), tilted.weights, rtol=0, atol=0.04)
        torch.testing.assert_close(x.mean(0), tilted.mean(), rtol=0, atol=0.06)
        torch.testing.assert_close(x.T.cov(), tilted.covariance(), rtol=0, atol=0.06)
