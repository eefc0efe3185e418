"""Network calls counted on a field of one dimension: as by hand, and as the tiny model makes them."""

from collections import Counter

import pytest
import torch

from am_diffusers.config.command_line import parse_config
from am_diffusers.methods import METHODS
from am_diffusers.methods.parts.step_selection import StepSelection
from am_diffusers.models.base import AdapterField, Model
from am_diffusers.run.build import build
from am_diffusers.run.counting import PERIODS, count
from am_diffusers.run.folder import make_accelerator
from am_diffusers.run.plan import make_plan
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from finetune_runs import tiny_config

FORWARD, VJP, LOSS = "forward", "forward and backward", "forward and backward of the loss"
POLICY, BASE, SWEEP = f"policy, {FORWARD}", f"base, {FORWARD}", f"base, {VJP}"
TRAINED = f"policy, {LOSS}"
GUIDED = {"rollout_guidance_scale": 2.0}
EVERYWHERE = GUIDED | {"guidance_mode": "everywhere"}
BUFFERED = {"method": "buffered_adjoint_matching", "buffer_size": 2}
EFFICIENT = {"method": "efficient_adjoint_matching", "num_inference_steps": 20, "eam_ode_steps": 3}
DETERMINISTIC = {"method": "deterministic_adjoint_matching", "mask_quantile": None}
GRPO = {"method": "flow_grpo", "samples_per_prompt": 2}
RAM = {"method": "ram", "samples_per_prompt": 2}
WEIGHTED = {"method": "reward_weighted_matching", "samples_per_prompt": 2}
SHORT = {
    "rewards": [{"name": "brightness"}],
    "eval_prompts": None,
    "eval_rewards": None,
    "train_batch_size": 2,
    "report_to": "none",
}


def config_of(folder, **changes):
    return parse_config(["--config", str(tiny_config("asset:tiny_sd3", folder, **(SHORT | changes)))])


# --------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("changes", "calls", "rows", "period"),
    [
        # The last step is continued four times, the default.
        ({}, {POLICY: 7, SWEEP: 6 + 4, BASE: 1, TRAINED: 7}, 7, 1),
        ({"tail_samples": 1}, {POLICY: 7, SWEEP: 6 + 1, BASE: 1, TRAINED: 7}, 7, 1),
        # The policy's own velocities are asked for the mask.
        (GUIDED, {POLICY: 2 * 7 + 7, SWEEP: 6 + 4, BASE: 1, TRAINED: 7}, 7, 1),
        (
            EVERYWHERE | {"adjoint": "full"},
            # A guided vector-Jacobian product is a call and two products.
            {
                POLICY: 2 * 7 + 6,
                f"policy, {VJP}": 2 * 6,
                SWEEP: 2 * (6 + 4),
                BASE: 2 + 6 + 4,
                TRAINED: 2 * 7,
            },
            7,
            1,
        ),
        (
            BUFFERED | {"buffer_refresh": 4},
            {POLICY: 7 / 4, SWEEP: (6 + 4) / 4, BASE: 1 / 4, TRAINED: 7},
            7,
            4,
        ),
        (DETERMINISTIC | {"truncate_steps": 3}, {POLICY: 8, SWEEP: 2, BASE: 1, TRAINED: 3}, 3, 1),
        (EFFICIENT, {POLICY: 3, SWEEP: 1, TRAINED: 4}, 4, 1),
        (EFFICIENT | {"eam_score": "renoised", "eam_rows": 2}, {POLICY: 3, BASE: 1, TRAINED: 2}, 2, 1),
        (RAM | {"ram_noises": 3}, {POLICY: 8 + 3, BASE: 3, TRAINED: 3}, 3, 1),
        (WEIGHTED | {"rwm_noises": 3}, {BASE: 8 + 3, TRAINED: 3}, 3, 1),
        (WEIGHTED | {"rwm_noises": 1} | GUIDED, {BASE: 2 * (8 + 1), TRAINED: 2}, 1, 1),
        ({"method": "draft", "draft_steps": 2} | GUIDED, {POLICY: 2 * 6, TRAINED: 2 * 2}, 1, 1),
        ({"method": "refl", "refl_last_steps": 1}, {POLICY: 7, TRAINED: 1}, 1, 1),
        (GRPO | {"grpo_passes": 2}, {POLICY: 7 / 2, BASE: (7 + 1) / 2, TRAINED: 7}, 7, 2),
        (GRPO | {"loss_steps": 2}, {POLICY: 7, BASE: 2 + 1, TRAINED: 2}, 2, 1),
    ],
)
def test_calls_rows_and_periods_are_those_counted_by_hand(tmp_path, changes, calls, rows, period):
    counted = count(config_of(tmp_path, **({"num_inference_steps": 8} | changes)))
    assert counted.calls == pytest.approx(calls, rel=1e-12)
    assert (counted.rows, counted.period) == (rows, period)
    assert type(counted.method) is METHODS[changes.get("method", "adjoint_matching")]


# ------------------------------------------------------------------------- vjps back to the earliest step

DRAWS = 2000
NUMBERS = [1, 2, 5, 6, 7, "all"]


def calls_of(folder, **changes):
    return count(config_of(folder, **({"num_inference_steps": 8} | changes))).calls


def mean_earliest(number, kind):
    """Return the mean of the earliest step that is selected of 7 steps with noise; of pps at its start."""
    number = 7 if number == "all" else number
    if kind == "last_and_random":  # the least of those drawn from the others, without putting back
        others, drawn = 7 - number // 2, number - number // 2
        return (others - drawn) / (drawn + 1)
    if kind == "stratified":
        return (7 // number - 1) / 2
    return sum(1 - step * number / 7 for step in range(1, 7 // number + 1))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", ["last_and_random", "stratified", "pps"])
def test_the_vjps_of_the_base_end_at_the_earliest_step_that_is_drawn(tmp_path, kind, number):
    """7 of them and 3 for other continuations, less the earliest of 7 steps.

    Within 4 standard errors, pps before it saw a residual.
    """
    kind = "last_and_random" if number == "all" else kind
    generator, selection = torch.Generator().manual_seed(0), StepSelection(number, kind)
    table, mean = memoryless_local_linear(uniform_sigmas(8)), mean_earliest(number, kind)
    drawn = torch.tensor([float(selection.select(table, generator).steps[0]) for _ in range(DRAWS)])
    error = 4 * drawn.std().item()
    assert drawn.mean().item() == pytest.approx(mean, abs=error / DRAWS**0.5 + 1e-6)
    changes = {"loss_steps": number} | ({} if number == "all" else {"step_selection": kind})
    counted = calls_of(tmp_path, **changes)
    share = calls_of(tmp_path, **changes, **BUFFERED, buffer_refresh=4)
    assert (counted[BASE], share[BASE]) == (1, 1 / 4)  # at the earliest step
    if kind == "pps":
        assert 4 <= counted[SWEEP] <= 10
        assert 4 <= 4 * share[SWEEP] <= 10
    else:
        assert counted[SWEEP] == pytest.approx(10 - mean, abs=error / PERIODS**0.5 + 1e-12)
        assert 4 * share[SWEEP] == pytest.approx(10 - mean, abs=error / PERIODS**0.5 + 1e-12)


def test_other_pairings_take_a_vjp_in_the_place_of_that_call(tmp_path):
    """But for step 0, where no pairing asks for it."""
    right, left = (calls_of(tmp_path, loss_steps=2, pairing=pairing) for pairing in ("right", "left"))
    assert 0 < left[BASE] < right[BASE] == 1
    assert left[SWEEP] - right[SWEEP] == pytest.approx(1 - left[BASE])


def test_a_guided_base_call_counts_twice(tmp_path):
    """Beside the call of each guided vector-Jacobian product, which has two such products."""
    guided = calls_of(tmp_path, loss_steps=2, **EVERYWHERE)
    plain = calls_of(tmp_path, loss_steps=2)[SWEEP]
    assert guided[SWEEP] == pytest.approx(2 * plain, rel=1e-12)
    assert guided[BASE] == pytest.approx(2 + plain, rel=1e-12)


# ---------------------------------------------------------------------------------------- of a real run

CASES = {
    "adjoint_matching": [{}, {"adjoint": "full"}, GUIDED, EVERYWHERE | {"adjoint": "full"}],
    "buffered_adjoint_matching": [BUFFERED | {"buffer_refresh": 3}],
    "deterministic_adjoint_matching": [
        DETERMINISTIC,
        DETERMINISTIC | {"truncate_steps": 2, "cost_power": 1.5},
        DETERMINISTIC | {"truncate_steps": 1} | GUIDED,
    ],
    "draft": [{"method": "draft", "draft_steps": 2} | GUIDED],
    "efficient_adjoint_matching": [
        EFFICIENT | {"eam_rows": 2, "eam_score": "renoised"},
        EFFICIENT | {"eam_rows": 3, "eam_sigma": 0.3},
        EFFICIENT | GUIDED,
    ],
    "flow_grpo": [GRPO | {"grpo_passes": 2}, GRPO | {"loss_steps": 2} | GUIDED],
    "ram": [RAM | GUIDED],
    "refl": [{"method": "refl", "refl_last_steps": 1}],
    "reward_weighted_matching": [WEIGHTED | GUIDED],
}
"""Settings of each method whose calls are the same in every period."""


def calls_made(config, monkeypatch, iterations):
    """Return transformer calls by kind, a sample's in an iteration, of a real run."""
    accelerator, calls, inside = make_accelerator(config), Counter(), []
    run = build(make_plan(config, 1), accelerator)
    velocity, call, vjp = Model.velocity, AdapterField.__call__, AdapterField.vjp

    def counted(self, x, sigma, cond):
        calls[inside[-1]] += len(x)
        return velocity(self, x, sigma, cond)

    def within(kind, method):
        def run_it(self, *args):
            forward = LOSS if torch.is_grad_enabled() else FORWARD
            inside.append(f"{'policy' if self.adapter else 'base'}, {kind or forward}")
            try:
                return method(self, *args)
            finally:
                inside.pop()

        return run_it

    with monkeypatch.context() as patched:
        patched.setattr(Model, "velocity", counted)
        patched.setattr(AdapterField, "__call__", within(None, call))
        patched.setattr(AdapterField, "vjp", within(VJP, vjp))
        for _ in range(iterations):
            run.trainer.iterate()
            run.trainer.state.progress.iteration += 1
    samples = config.optimizer.train_batch_size * iterations
    return {kind: number / samples for kind, number in calls.items()}


def test_every_method_has_a_case():
    assert set(CASES) == set(METHODS)
    assert all(case.get("method", "adjoint_matching") == name for name, own in CASES.items() for case in own)


@pytest.mark.parametrize("changes", [case for cases in CASES.values() for case in cases], ids=str)
def test_the_counted_calls_of_every_method_are_those_a_real_run_makes(tmp_path, monkeypatch, changes):
    masks = "mask_quantile" in METHODS[changes.get("method", "adjoint_matching")].reads
    unmasked = {"mask_quantile": None} if masks else {}
    config = config_of(tmp_path, **(unmasked | {"loss_micro_batch_size": 1} | changes))
    counted = count(config)
    assert calls_made(config, monkeypatch, counted.period) == pytest.approx(counted.calls, rel=1e-12)


def test_a_real_run_that_draws_its_steps_makes_the_other_calls_as_counted(tmp_path, monkeypatch):
    """One of three steps is drawn, and the sweep ends there: after 4, 5 or 6 passes."""
    config = config_of(tmp_path, loss_steps=1, mask_quantile=None)
    counted, made = count(config).calls, calls_made(config, monkeypatch, 1)
    assert 4 < counted.pop(SWEEP) < 6
    assert made.pop(SWEEP) in (4, 5, 6)
    assert made == pytest.approx(counted, rel=1e-12)
