"""Targets, weights, masks and batches of the matching regression."""

import json

import pytest
import torch

from am_diffusers.matching import (
    MatchingBatch,
    QuantileMask,
    matching_loss,
    matching_target,
    matching_weight,
    residual,
)
from am_diffusers.methods.parts.step_selection import select_steps
from am_diffusers.transitions import (
    ancestral,
    memoryless_euler,
    memoryless_local_linear,
    ode_euler,
    uniform_sigmas,
)
from am_diffusers.velocity import CallableField
from oracles import THREE_MODES, float64, unconditional

STOCHASTIC = [memoryless_euler, memoryless_local_linear, ancestral]
PAIRINGS = ("right", "left", "trapezoid")
TABLE = memoryless_local_linear(uniform_sigmas(6))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(4, 3, 2, dtype=torch.float64)


@pytest.mark.parametrize("build", STOCHASTIC)
def test_the_right_target_minimises_path_kl_plus_the_adjoint_times_the_mean(build, tensors):
    table, (x, base, adjoint, _) = build(uniform_sigmas(6)), tensors
    for k in range(5):
        target = matching_target(table, k, velocity_base=base, adjoint_right=adjoint, adjoint_left=None)
        target.requires_grad_(True)
        cost = table.path_kl(k, target, base) + (adjoint * table.mean(k, x, target)).sum(1)
        (gradient,) = torch.autograd.grad(cost.sum(), target)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", STOCHASTIC)
def test_the_weighted_distance_of_two_velocities_is_twice_their_path_kl(build, tensors):
    table, (policy, base, _, _) = build(uniform_sigmas(6)), tensors
    for k in range(5):
        got = residual(policy, base, matching_weight(table, k))
        torch.testing.assert_close(got, 2 * table.path_kl(k, policy, base), rtol=0, atol=1e-12)


def test_pairings_use_their_adjoints_and_agree_at_pure_noise(tensors):
    base, right, left, _ = tensors
    targets = {
        (pairing, k): matching_target(
            TABLE, k, velocity_base=base, adjoint_right=right, adjoint_left=left, pairing=pairing
        )
        for pairing in PAIRINGS
        for k in (0, 3)
    }
    ratio, eta = (TABLE.std[3] ** 2 / TABLE.v_coef[3]).item(), 1.0  # sigma[3] = 0.5
    torch.testing.assert_close(targets["left", 3], base - ratio * left)
    torch.testing.assert_close(targets["trapezoid", 3], base + (eta * left - ratio * right) / 2)
    for pairing in PAIRINGS:
        torch.testing.assert_close(targets[pairing, 0], targets["right", 0], rtol=0, atol=0)


@pytest.mark.parametrize("build", STOCHASTIC)
def test_pairings_agree_as_the_step_shrinks(build, tensors):
    """With one adjoint for both ends, `trapezoid` - `right` tends to 0 like the step."""
    base, adjoint, _, _ = tensors
    gaps = []
    for num_steps in (100, 200):
        table, k = build(uniform_sigmas(num_steps)), num_steps // 4
        right, trapezoid = (
            matching_target(
                table, k, velocity_base=base, adjoint_right=adjoint, adjoint_left=adjoint, pairing=pairing
            )
            for pairing in ("right", "trapezoid")
        )
        gaps.append((right - trapezoid).abs().max().item())
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.1)


def test_targets_that_do_not_exist_are_errors(tensors):
    base, right, _, _ = tensors
    with pytest.raises(ValueError, match="adjoint_left"):
        matching_target(TABLE, 3, velocity_base=base, adjoint_right=right, adjoint_left=None, pairing="left")
    with pytest.raises(ValueError, match="pairing must be"):
        matching_target(TABLE, 3, velocity_base=base, adjoint_right=right, adjoint_left=right, pairing="up")
    with pytest.raises(ValueError, match="step 5 is deterministic"):
        matching_weight(TABLE, 5)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    latents, target = torch.randn(2, 7, 2, dtype=torch.float64)
    sigmas, weight = torch.rand(2, 7, dtype=torch.float64)
    samples = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    return MatchingBatch(latents, sigmas, target, weight, samples, unconditional(3))


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_losses_and_gradients_of_micro_batches_add_up(batch, size):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    policy = CallableField(lambda x, sigma, cond: scale * THREE_MODES.velocity(x, sigma))
    losses = [matching_loss(policy, part) for part in batch.split(size)]
    torch.stack(losses).sum().backward()
    velocity = THREE_MODES.velocity(batch.latents, batch.sigmas)
    expected = (batch.weight[:, None] * (velocity - batch.target) ** 2).sum()
    torch.testing.assert_close(sum(losses).detach(), expected, rtol=1e-12, atol=0)
    derivative = (2 * batch.weight[:, None] * (velocity - batch.target) * velocity).sum()
    torch.testing.assert_close(scale.grad, derivative, rtol=1e-12, atol=0)


def test_rows_are_conditioned_on_their_own_sample(batch):
    seen = []
    policy = CallableField(lambda x, sigma, cond: seen.append(cond.prompts) or x)
    for part in batch.split(4):
        matching_loss(policy, part)
    assert [p.split()[1] for prompts in seen for p in prompts] == list("0011222")


def test_a_batch_checks_its_shapes(batch):
    with pytest.raises(ValueError, match="MatchingBatch"):
        MatchingBatch(batch.latents, batch.sigmas[:3], batch.target, batch.weight, batch.samples, batch.cond)


def test_steps_to_train_on_are_the_last_ones_and_random_others():
    generator = torch.Generator().manual_seed(0)
    table = memoryless_local_linear(uniform_sigmas(40))
    assert select_steps(table, "all", generator) == list(range(39))
    counts = torch.zeros(39)
    for _ in range(2000):
        steps = select_steps(table, 20, generator)
        assert steps == sorted(set(steps))
        assert steps[-10:] == list(range(29, 39))
        counts[steps] += 1
    share = counts[:29] / 2000  # each 10/29 +- 4 standard errors
    assert (share - 10 / 29).abs().max() < 4 * (10 / 29 * 19 / 29 / 2000) ** 0.5
    assert select_steps(table, 39, generator) == list(range(39))
    assert len(select_steps(table, 1, generator)) == 1
    for wrong in (0, 40):
        with pytest.raises(ValueError, match=r"1 \.\. 39 or 'all'"):
            select_steps(table, wrong, generator)
    with pytest.raises(ValueError, match="memoryless table"):
        select_steps(ode_euler(uniform_sigmas(4)), "all", generator)


def test_mask_keeps_its_quantile_of_every_step_whatever_the_scale():
    torch.manual_seed(0)
    mask, scale = QuantileMask(0.9, decay=0.5), float64(1e-3, 1.0, 1e4)
    shares = []
    for _ in range(20):
        residuals = torch.randn(500, 3, dtype=torch.float64) ** 2 * scale
        mask.update([4, 7, 9], residuals)
        shares.append(mask.keep([4, 7, 9], residuals).double().mean(0))
    share = torch.stack(shares).mean(0)  # standard error (.09 / 10000)^.5 = .003
    torch.testing.assert_close(share, float64(0.9, 0.9, 0.9), rtol=0, atol=0.012)


def test_mask_threshold_is_a_moving_average_that_starts_at_the_first_quantile():
    mask = QuantileMask(0.5, decay=0.75)
    mask.update([0], float64(1, 4, 9)[:, None])  # median of the roots: 2
    assert mask.state_dict() == {"0": 2.0}
    mask.update([0, 3], float64(16, 36, 64)[:, None].expand(3, 2))  # 6
    assert mask.state_dict() == {"0": 3.0, "3": 6.0}
    assert mask.keep([0, 3], float64(9, 9.1)[:, None].expand(2, 2)).tolist() == [[True, True], [False, True]]


def test_mask_state_survives_json():
    mask, other = QuantileMask(0.8), QuantileMask(0.8)
    mask.update([0, 5], torch.rand(9, 2))
    other.load_state_dict(json.loads(json.dumps(mask.state_dict())))
    assert other.state_dict() == mask.state_dict()
    residuals = torch.rand(50, 2)
    assert torch.equal(other.keep([0, 5], residuals), mask.keep([0, 5], residuals))


@pytest.mark.parametrize(("quantile", "decay"), [(0.0, 0.9), (1.0, 0.9), (0.9, 1.0), (0.9, -0.1)])
def test_mask_numbers_out_of_range_are_errors(quantile, decay):
    with pytest.raises(ValueError, match="quantile"):
        QuantileMask(quantile, decay)
