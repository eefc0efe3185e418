"""Selected steps: unbiased estimates of the loss over all of them, and what sampling by size gains."""

import json

import pytest
import torch

from am_diffusers.methods.parts.step_selection import UNIFORM, StepSelection, inclusion, systematic
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from methods_around import adjoint_matching as make
from methods_around import collect, total_loss
from oracles import float64

EIGHT = memoryless_local_linear(uniform_sigmas(8))
TWENTY = memoryless_local_linear(uniform_sigmas(20))
DRAWS = 2000


def residuals(samples: int = 1) -> torch.Tensor:
    """Residuals of 19 steps that span two orders of magnitude, (samples, 19), the same each time."""
    sizes = torch.logspace(0, 2, 19, dtype=torch.float64).flip(0)
    noise = torch.rand(samples, 19, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return sizes * (0.5 + noise)


def estimates(kind: str, number: int) -> torch.Tensor:
    """Estimates of the mean residual over all steps from `number` of them, (DRAWS,)."""
    generator, values, found = torch.Generator().manual_seed(0), residuals(), []
    selection = StepSelection(number, kind)
    if kind == "pps":
        selection.update(list(range(19)), residuals(64), torch.ones(64, 19))
    for _ in range(DRAWS):
        steps, factors = selection.select(TWENTY, generator)
        assert steps == sorted(set(steps))
        assert len(steps) == number
        found.append((float64(*factors) * values[0, steps]).mean())
    return torch.stack(found)


def uniform_estimates(number: int) -> torch.Tensor:
    generator, values = torch.Generator().manual_seed(0), residuals()[0]
    picks = [torch.randperm(19, generator=generator)[:number] for _ in range(DRAWS)]
    return torch.stack([values[steps].mean() for steps in picks])


@pytest.mark.parametrize("number", [1, 4, 9])
@pytest.mark.parametrize("kind", ["stratified", "pps"])
def test_estimates_are_unbiased_and_vary_less_than_uniform_ones(kind, number):
    """Within 3 standard errors over 2000 draws."""
    found, uniform = estimates(kind, number), uniform_estimates(number)
    expected = residuals().mean()
    assert abs(found.mean() - expected) < 3 * found.std() / DRAWS**0.5
    assert abs(uniform.mean() - expected) < 3 * uniform.std() / DRAWS**0.5
    if kind == "pps" or number > 1:  # one stratum is all steps
        assert found.std() < (0.5 if kind == "pps" else 0.8) * uniform.std()


def test_the_published_selection_is_not_unbiased():
    found, expected = estimates("last_and_random", 4), residuals().mean()
    assert abs(found.mean() - expected) > 30 * found.std() / DRAWS**0.5


@pytest.mark.parametrize("odds", [3.0, 0.25])
def test_late_steps_are_drawn_as_often_as_declared_and_no_step_never(odds):
    """One of the steps 0 .. 6 of 8 beside none of the last: sigma is at most .7 from step 3 on.

    Within 4 standard errors of 4000 draws.
    """
    selection, generator = StepSelection(1, odds=odds), torch.Generator().manual_seed(0)
    drawn = torch.tensor([selection.select(EIGHT, generator).steps for _ in range(4000)]).flatten()
    shares = float64(1, 1, 1, odds, odds, odds, odds) / (3 + 4 * odds)
    found = drawn.bincount(minlength=7).double() / 4000
    assert ((found - shares).abs() < 4 * (shares * (1 - shares) / 4000).sqrt()).all()
    three = StepSelection(3, odds=odds).select(EIGHT, generator)
    assert three.factors == [1, 1, 1]
    assert three.steps[-1] == 6
    assert len(set(three.steps)) == 3


def test_odds_of_one_draw_what_was_drawn_before():
    for seed in range(5):
        found = StepSelection(4).select(TWENTY, torch.Generator().manual_seed(seed)).steps
        others = torch.randperm(17, generator=torch.Generator().manual_seed(seed))[:2].tolist()
        assert found == [*sorted(others), 17, 18]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"late_step_odds": 0.0, "loss_steps": 2}, "--late_step_odds must be positive: a step that is never"),
        ({"late_step_odds": 3.0}, "--late_step_odds must be 1 unless some steps are drawn"),
        ({"late_step_odds": 3.0, "loss_steps": 2, "step_selection": "pps"}, "by last_and_random"),
    ],
)
def test_odds_that_do_not_go_together_are_refused(flags, text):
    with pytest.raises(ValueError, match=text):
        make(**flags)


def test_the_method_draws_by_its_odds():
    late = [
        collect(make(loss_steps=1, late_step_odds=1e9), iteration=i).examples.sigmas.max() for i in range(20)
    ]
    assert max(late) <= 0.7


def test_chances_follow_the_sizes_and_large_ones_are_certain():
    chances = inclusion(float64(0.7, 0.1, 0.1, 0.05, 0.05), 3)
    assert chances.tolist() == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])
    assert inclusion(float64(0.5, 0.3, 0.1, 0.1), 4).tolist() == [1] * 4
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[systematic(chances, generator)] += 1
    # 4 standard errors are .03.
    torch.testing.assert_close(counts.double() / 4000, chances, rtol=0, atol=0.03)


def test_sizes_are_running_means_of_kept_rows_mixed_with_equal_shares():
    selection = StepSelection(1, "pps", decay=0.5)
    selection.update([2, 5], float64(1, 3, 4, 100).view(2, 2), float64(1, 1, 1, 0).view(2, 2))
    assert selection.state_dict() == {"2": 2.5, "5": 3.0}
    selection.update([2], float64(0.5).view(1, 1), torch.ones(1, 1))
    assert selection.state_dict() == {"2": 1.5, "5": 3.0}
    sizes = float64(2.25, 2.25, 1.5, 2.25, 2.25, 3.0, 2.25)  # unseen ones are of mean size
    expected = (1 - UNIFORM) * sizes / sizes.sum() + UNIFORM / 7
    torch.testing.assert_close(selection._shares(7), expected, rtol=1e-12, atol=0)
    again = StepSelection(1, "pps")
    again.load_state_dict(json.loads(json.dumps(selection.state_dict())))
    assert again.state_dict() == selection.state_dict()


@pytest.mark.parametrize("kind", ["stratified", "pps"])
def test_the_methods_loss_has_the_factors(kind):
    """The weighted mean over the rows of the selected steps, exactly."""
    method = make(loss_steps=3, step_selection=kind, mask_quantile=None)
    for iteration in range(3):
        collect(method, iteration=iteration)
    before, picked = method.state_dict(), []
    select = method.selection.select
    method.selection.select = lambda *args: picked.append(select(*args)) or picked[-1]
    loss = total_loss(method, collect(method, iteration=3))
    whole = make(mask_quantile=None)
    rows = collect(whole, iteration=3).examples
    velocity = whole.policy(rows.latents, rows.sigmas, rows.cond)
    distance = (velocity - rows.target).square().sum(1)
    by_step = (rows.weight * distance * len(rows)).view(6, 7).mean(0)
    (steps, factors) = picked[0]
    assert len(set(factors)) > 1
    assert loss == pytest.approx((float64(*factors) * by_step[steps]).mean().item(), rel=1e-10)
    assert (before["selection"] != {}) == (kind == "pps")


def test_selections_that_select_nothing_or_do_not_exist_are_errors():
    with pytest.raises(ValueError, match="give their number"):
        StepSelection("all", "pps")
    with pytest.raises(ValueError, match="one of last_and_random, stratified, pps"):
        StepSelection(3, "best")  # pyright: ignore[reportArgumentType]
    selected = StepSelection(7, "pps").select(EIGHT, torch.Generator())
    assert selected == (list(range(7)), [1.0] * 7)
