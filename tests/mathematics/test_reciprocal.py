"""The Brownian reference: its table, its bridges, and Gaussian bridges solved through its rows."""

import math

import pytest
import torch

from am_diffusers.matching import matching_target, matching_weight
from am_diffusers.reciprocal import bridge, brownian, corrector_rows, noise_levels, reciprocal_rows
from am_diffusers.velocity import Conditioning
from linear_controls import LinearBridge
from oracles import float64

LEVELS = noise_levels(12, 0.05)


def normal(num, seed=1):
    return torch.randn(num, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_reference_has_variance_nu_squared_and_its_target_is_the_negative_adjoint():
    table = brownian(LEVELS, nu=1.7)
    assert table.std.square().sum().item() == pytest.approx(1.7**2, rel=1e-12)
    adjoint = normal(5)
    for k in range(table.num_steps):
        target = matching_target(
            table, k, velocity_base=torch.zeros_like(adjoint), adjoint_right=adjoint, adjoint_left=None
        )
        torch.testing.assert_close(target, -adjoint, rtol=1e-12, atol=0)
        assert matching_weight(table, k) == pytest.approx(table.v_coef[k].item(), rel=1e-12)
    assert table.std[-1] == pytest.approx(1.7 * 0.05)  # the last step keeps its noise


def test_the_bridge_is_the_chain_given_both_its_ends():
    """From the covariances of the chain's states, exactly."""
    nu, source, end = 1.7, 0.4, -2.0
    table = brownian(LEVELS, nu)
    passed = table.std.square().cumsum(0)  # variance of x_{k+1}, its covariance with the end
    for k in range(table.num_steps - 1):
        share = (passed[k] / passed[-1]).item()
        mean, variance = source + share * (end - source), passed[k].item() * (1 - share)
        at = [
            bridge(
                *(float64(number)[:, None] for number in (source, end)),
                LEVELS[k + 1 : k + 2],
                nu,
                float64(noise)[:, None],
            ).item()
            for noise in (0.0, 1.0)
        ]
        assert at[0] == pytest.approx(mean, abs=1e-12)
        assert at[1] - at[0] == pytest.approx(math.sqrt(variance), abs=1e-12)


def test_rows_of_control_and_corrector():
    source, end, adjoint = normal(3), normal(3, 2), normal(3, 3)
    cond, levels = Conditioning(("a", "b", "c")), torch.tensor([0.0, 0.5, 1.0])
    rows = reciprocal_rows(source, end, adjoint, levels, 1.5, normal(3, 4), cond, weight=torch.arange(3.0))
    torch.testing.assert_close(rows.target, -adjoint)
    torch.testing.assert_close(rows.latents[0], end[0])
    torch.testing.assert_close(rows.latents[2], source[2])
    assert rows.weight.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    rows = corrector_rows(source, end, 1.5, cond)
    torch.testing.assert_close(rows.target, (source - end) / 2.25)
    assert rows.sigmas.tolist() == [0, 0, 0]
    assert rows.latents is end


@pytest.mark.parametrize(
    ("levels", "nu", "words"),
    [
        (torch.tensor([1.0, 0.5]), 1.0, "from 1 to 0"),
        (torch.tensor([0.9, 0.0]), 1.0, "from 1 to 0"),
        (torch.tensor([1.0, 1.0, 0.0]), 1.0, "from 1 to 0"),
        (LEVELS, 0.0, "nu .* positive"),
    ],
)
def test_other_grids_are_refused(levels, nu, words):
    with pytest.raises(ValueError, match=words):
        brownian(levels, nu)


@pytest.mark.parametrize(("steps", "lowest"), [(1, 0.1), (5, 0.0), (5, 1.0)])
def test_other_numbers_of_levels_are_refused(steps, lowest):
    with pytest.raises(ValueError, match="lowest level"):
        noise_levels(steps, lowest)


def coupling_of(cross, source, target):
    """Covariance of the Gaussian law exp(f(x) + g(y) + cross x y) with the variances given, by iteration."""
    f, g = 1.0, 1.0 + cross**2  # precisions of the potentials
    for _ in range(10_000):
        f = 1 / source + cross**2 / g
        g = 1 / target + cross**2 / f
    return cross / (f * g - cross**2)


def test_the_coupling_of_a_variance_preserving_reference_is_that_of_a_brownian_one():
    """Only the product of the ends in the transition density couples: kappa / (1 - kappa^2) = 1 / nu^2."""
    kappa = math.exp(-0.5 * (0.1 + 4) / 2)
    nu_squared = (1 - kappa**2) / kappa
    assert (kappa, nu_squared) == pytest.approx((0.3588, 2.43), abs=2e-3)
    # Brownian in closed form; variance-preserving as iterated.
    brownian_cov = math.sqrt(4.0 + nu_squared**2 / 4) - nu_squared / 2
    assert coupling_of(kappa / (1 - kappa**2), 4.0, 1.0) == pytest.approx(brownian_cov, rel=1e-10)
    assert brownian_cov == pytest.approx(1.1255, abs=1e-3)


def test_adjoint_sampling_of_a_gaussian_from_a_point():
    """The bound of log Z is off by what 60 steps leave, -.019; weights mend it."""
    solved = LinearBridge((0.0, 0.0), (1.0, 0.25), 1.0, damping=0.3, num=10_000, num_steps=60)
    solved.corrector = float64(-1.0, 0.0)  # of a source at 0: (0 - x) / nu^2
    for _ in range(20):
        solved.sweep()
    found = solved.moments()
    assert found.mean == pytest.approx(1.0, abs=0.02)
    assert found.variance == pytest.approx(0.25, abs=0.01)
    ends = solved.run()
    log_target = -2 * (ends.end[:, 0] - 1).square() - 0.5 * math.log(2 * math.pi * 0.25)
    log_reference = -0.5 * ends.end[:, 0].square() - 0.5 * math.log(2 * math.pi)
    log_weights = ends.log_ratio + log_target - log_reference
    assert log_weights.mean().item() == pytest.approx(-0.019, abs=0.01)
    assert log_weights.exp().mean().log().item() == pytest.approx(0.0, abs=0.008)


def test_undamped_regression_diverges_where_the_target_is_narrow():
    """nu^2 over the variance 6.8: damping is what makes the sweeps converge."""

    def mean(damping):
        solved = LinearBridge((0.0, 0.0), (1.0, 0.25), 1.3038, damping=damping, num=2000, num_steps=60)
        solved.corrector = float64(-1 / 1.7, 0.0)
        for _ in range(16):
            solved.sweep()
        return solved.moments().mean

    assert mean(0.2) == pytest.approx(1.0, abs=0.03)
    assert abs(mean(1.0) - 1) > 1


def alternated(source, target, nu, *, stages=4, corrected=True, sign=1.0):
    solved = LinearBridge(source, target, nu, sign=sign)
    for _ in range(stages):
        if corrected:
            solved.correct()  # the first is of the uncontrolled reference
        for _ in range(8):
            solved.sweep()
    return solved.moments()


def test_the_bridge_of_two_gaussians_has_both_ends_and_the_coupling():
    """N(0, 1) -> N(1, .25), nu 1: covariance .2071, corrector -.172 x - .828."""
    found = alternated((0.0, 1.0), (1.0, 0.25), 1.0)
    assert found.mean == pytest.approx(1.0, abs=0.02)
    assert found.variance == pytest.approx(0.25, abs=0.01)
    assert found.covariance == pytest.approx(0.2071, abs=0.02)
    assert found.corrector == pytest.approx((-0.172, -0.828), abs=0.03)


def test_the_bridge_of_the_published_strength():
    """N(1.5, 4) -> N(0, 1), nu^2 2.43: covariance 1.1255, corrector .052 x + .617.

    Of a variance-preserving reference with this coupling the corrector is -.684 x + .618: its drift is in it.
    """
    found = alternated((1.5, 2.0), (0.0, 1.0), 2.43**0.5)
    assert found.mean == pytest.approx(0.0, abs=0.02)
    assert found.variance == pytest.approx(1.0, abs=0.04)
    assert found.covariance == pytest.approx(1.1255, abs=0.03)
    assert found.corrector == pytest.approx((0.0516, 0.617), abs=0.02)


def test_without_the_corrector_the_end_is_another_law():
    """The target times N(source, nu^2) in the end, given the source: in closed form, far from the target."""
    found = alternated((0.0, 1.0), (1.0, 0.25), 1.0, stages=2, corrected=False)
    assert found.mean == pytest.approx(0.8, abs=0.02)
    assert found.variance == pytest.approx(0.2 + 0.2**2, abs=0.01)
    found, share = alternated((1.5, 2.0), (0.0, 1.0), 2.43**0.5, stages=2, corrected=False), 1 / (1 + 2.43)
    assert found.mean == pytest.approx(1.5 * share, abs=0.03)
    assert found.variance == pytest.approx(2.43 * share + 4 * share**2, abs=0.04)


def test_with_the_sign_of_the_adjoint_turned_the_end_is_another_law():
    found = alternated((0.0, 1.0), (1.0, 0.25), 1.0, stages=1, sign=-1.0)
    assert not abs(found.mean - 1) < 0.5
