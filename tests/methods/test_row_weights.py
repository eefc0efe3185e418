"""Weights of rows: where the fixed point stays, what they count, and what doesn't go together."""

import json
from itertools import product

import pytest
import torch

from am_diffusers.methods.parts.row_weights import FLOOR, Crossfit, Ramp, half_norms
from am_diffusers.methods.parts.surroundings import Sizes
from methods_around import OFFSET, collect, make_method
from methods_around import adjoint_matching as make


def crossed(norms=(2.0,)) -> Crossfit:
    weights = Crossfit()
    weights.update(torch.tensor(norms))
    return weights


# ------------------------------------------------------------------------------------------- crossfit


@pytest.mark.parametrize("tails", [2, 3])
def test_crossfitted_rows_have_the_mean_of_plain_ones_as_their_optimum(tails):
    """Identity, 1e-12: over all draws of the continuations from five adjoints, the weighted error is 0.

    By the norm of the row's own adjoint it isn't: the test can tell.
    """
    law = torch.tensor([[0.2, 0.1], [-1.0, 3.0], [5.0, -2.0], [0.0, 0.7], [-0.4, -9.0]], dtype=torch.float64)
    draws = torch.stack([law[list(which)] for which in product(range(5), repeat=tails)], 1)
    adjoint, weight = crossed()(draws)
    assert weight.std() > 0.1
    error = (weight[:, None] * (adjoint - law.mean(0))).mean(0)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-12)
    plain = draws.mean(0)
    by_itself = (1 / plain.norm(dim=1, keepdim=True) * (plain - law.mean(0))).mean(0)
    assert by_itself.norm() > 0.1


def test_a_half_weighs_by_the_other_ones_norm_relative_to_earlier_iterations():
    halves = torch.tensor([[[3.0, 0.0], [0.0, 1e-9]], [[0.0, 4.0], [2.0, 0.0]]])  # two halves, two samples
    adjoint, weight = crossed((1.0, 3.0))(halves)
    w1, w2 = torch.tensor([2 / 4, 1.0]), torch.tensor([2 / 3, 1 / FLOOR])
    torch.testing.assert_close(weight, (w1 + w2) / 2)
    expected = (w1[:, None] * halves[0] + w2[:, None] * halves[1]) / (w1 + w2)[:, None]
    torch.testing.assert_close(adjoint, expected)
    torch.testing.assert_close(half_norms(halves), torch.tensor([3.5, 1.0]))


def test_without_an_earlier_iteration_nothing_is_weighted():
    adjoints = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0))
    adjoint, weight = Crossfit()(adjoints)
    assert torch.equal(adjoint, adjoints.mean(0))
    assert torch.equal(weight, torch.ones(6))


def test_crossfit_changes_the_row_before_the_last_noisy_step_alone():
    plain, weighted = make(), make(row_weights="crossfit")
    for iteration in (0, 1):
        ours, theirs = (collect(each, iteration=iteration).examples for each in (weighted, plain))
        last = ours.sigmas == 0.25  # step 6 of 8
        changed = (ours.target != theirs.target).any(1) | (ours.weight != theirs.weight)
        assert torch.equal(changed, last & (iteration > 0))


# ----------------------------------------------------------------------------------------------- ramp


def test_the_ramp_shortens_rows_to_a_quantile_that_rises_to_all_of_them_and_ends():
    """Of 20 iterations the first 12: the quantile goes from .9 to 1 in equal parts."""
    ramp, generator, shortened = Ramp(20), torch.Generator().manual_seed(0), []
    for iteration in range(20):
        residuals = torch.randn(1000, 1, generator=generator, dtype=torch.float64).square()
        ramp.update([3], residuals)
        weights = ramp.weights([3], residuals)
        if iteration < 12:
            assert ramp.quantile == pytest.approx(0.9 + 0.1 * iteration / 12)
            limit = float(ramp.state_dict()["thresholds"]["3"])
            expected = (limit / residuals.sqrt()).clamp(max=1)
            torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
        shortened.append((weights < 1).double().mean().item())
    assert shortened[0] == pytest.approx(0.1, abs=1e-3)
    assert shortened[0] > shortened[5] > shortened[9] > 0
    assert shortened[12:] == [0] * 8


def test_the_ramp_weighs_rows_of_the_method_and_is_over_when_the_run_says_so():
    found = []
    for weights in ("none", "ramp"):
        method = make(OFFSET, row_weights=weights, iterations=5)
        found.append([collect(method, num=20, iteration=i).examples for i in range(5)])
    for iteration, (plain, ramped) in enumerate(zip(*found, strict=True)):
        ratio = ramped.weight / plain.weight
        assert torch.equal(plain.target, ramped.target)
        assert ratio.max() == 1
        assert (ratio.min() < 0.999) == (iteration < 3)


def test_a_buffers_ramp_counts_its_collections():
    options = {"row_weights": "ramp", "iterations": 30, "buffer_size": 6, "buffer_refresh": 3}
    method = make_method("buffered_adjoint_matching", **options, sizes=Sizes(batch=6))
    for iteration in range(19):
        assert method.inner.ramp.off == (iteration > 18)
        collect(method, iteration=iteration)
    assert method.inner.ramp.off  # after the 7th of 10 collections


@pytest.mark.parametrize("weights", ["crossfit", "ramp"])
def test_weights_that_are_restored_go_on(weights):
    options = {"row_weights": weights, "iterations": 10}
    method, fresh = make(**options), make(**options)
    for iteration in range(3):
        collect(method, iteration=iteration)
    fresh.load_state_dict(json.loads(json.dumps(method.state_dict())))
    ours, theirs = (collect(each, iteration=3).examples.weight for each in (fresh, method))
    assert torch.equal(ours, theirs)
    start = make(**options)
    start.load_state_dict(make(**options).state_dict())
    other = collect(start, iteration=3).examples.weight
    assert not torch.equal(other, theirs)


def test_norms_of_nothing_leave_the_mean_alone():
    weights = Crossfit()
    weights.update(torch.zeros(4))
    assert weights.state_dict() == {"mean": None}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"row_weights": "ramp", "mask_quantile": 0.9}, "--row_weights must be none with a mask"),
        ({"row_weights": "crossfit", "tail_samples": 1}, "crossfit with --tail_samples 2 or more"),
        ({"row_weights": "crossfit", "pairing": "left"}, "and --pairing right"),
        ({"row_weights": "unit"}, "--row_weights must be none, crossfit or ramp, got unit"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, text):
    with pytest.raises(ValueError, match=text):
        make(**flags)
