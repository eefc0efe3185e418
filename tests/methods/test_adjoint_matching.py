"""The method without training: passes, noise, rows, masks, wrong input."""

import pytest
import torch

from am_diffusers.noise import generator_for, generators_for
from am_diffusers.transitions import TRANSITIONS, memoryless_local_linear, ode_euler, uniform_sigmas
from am_diffusers.velocity import CallableField, Conditioning, GuidedField
from methods_around import BASE, OFFSET, collect, total_loss
from methods_around import adjoint_matching as make
from oracles import CountingField, float64

TABLE = memoryless_local_linear(uniform_sigmas(8))


# ------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("tails", [1, 3])
@pytest.mark.parametrize("pairing", ["right", "left", "trapezoid"])
def test_no_pass_is_wasted(pairing, tails):
    """The sweep ends at the earliest step that is trained, with its adjoint only where the pairing asks."""
    grid, earliest = uniform_sigmas(8).tolist(), set()
    options = {"pairing": pairing, "tail_samples": tails, "mask_quantile": None}
    for steps, iteration in [("all", 0), *((2, i) for i in range(12))]:
        policy, base = CountingField(OFFSET), CountingField(BASE)
        method = make(policy, base, loss_steps=steps, **options)
        examples = collect(method, iteration=iteration).examples
        first = grid.index(examples.sigmas.max().item())
        earliest.add(first)
        left = pairing != "right" and first > 0
        assert policy.calls == grid[:7]
        assert base.vjps == [grid[7]] * tails + grid[6 : first - left : -1]
        assert base.calls == ([] if left else [grid[first]])
        parts = examples.split(5)
        for part in parts:
            method.loss(part)
        assert len(policy.calls) - 7 == len(parts) == -(-len(examples) // 5)
        assert policy.vjps == []
        assert len(base.calls + base.vjps) == 7 + tails - first
    assert {0, 1, 3} < earliest


@pytest.mark.parametrize("kind", ["lean", "full"])
@pytest.mark.parametrize("pairing", ["right", "left", "trapezoid"])
def test_a_sweep_that_stops_early_makes_the_targets_of_the_whole_one(kind, pairing):
    """Equivalence, 1e-12: rows of some steps are those rows among the rows of all."""
    options = {"adjoint": kind, "pairing": pairing, "mask_quantile": None}
    every = collect(make(**options)).examples
    some = collect(make(loss_steps=2, **options), iteration=0).examples
    assert some.sigmas.max() < 1
    rows = [
        next(j for j in range(len(every)) if every.samples[j] == i and every.sigmas[j] == sigma)
        for i, sigma in zip(some.samples.tolist(), some.sigmas.tolist(), strict=True)
    ]
    torch.testing.assert_close(some.target, every.target[rows], rtol=0, atol=1e-12)


def test_a_rollout_by_another_field_costs_one_policy_call_per_selected_step():
    policy, other = CountingField(OFFSET), CountingField(BASE)
    guided = collect(make(policy, rollout=other, loss_steps=3, mask_quantile=None)).examples
    assert other.calls == uniform_sigmas(8).tolist()[:7]
    assert sorted(policy.calls) == sorted(set(guided.sigmas.tolist()))
    along_other = collect(make(BASE, loss_steps=3, mask_quantile=None)).examples
    assert torch.equal(guided.latents, along_other.latents)
    assert torch.equal(guided.target, along_other.target)


def conditional(field):
    """A field of its own for the negative prompt, so that guidance changes states and Jacobians."""

    def velocity(x, sigma, cond):
        shift = torch.zeros(len(x), 1).double() if cond.embeddings is None else cond.embeddings[:, 0]
        return field(x, sigma, cond) + shift * torch.sin(2 * x)

    return CallableField(velocity)


@pytest.mark.parametrize("adjoint", ["lean", "full"])
def test_guidance_everywhere_is_adjoint_matching_of_the_guided_fields(adjoint):
    """Against fields that combine both branches in one function, with derivatives by autograd."""
    cond = Conditioning(
        tuple("abc"),
        torch.full((3, 1, 1), 0.7).double(),
        negative_embeddings=torch.full((3, 1, 1), -0.4).double(),
    )

    def combined(field):
        def velocity(x, sigma, cond):
            low, high = (conditional(field)(x, sigma, c) for c in (cond.negative(), cond))
            return low + 3 * (high - low)

        return CallableField(velocity)

    results = []
    for wrap in (lambda field: GuidedField(conditional(field), 3.0), combined):
        method = make(wrap(OFFSET), wrap(BASE), adjoint=adjoint, mask_quantile=None)
        generators = generators_for(0, 0, range(3))
        results.append(method.collect(cond, generators, generator_for(0, 0, "shared")))
        results[-1].metrics["loss"] = total_loss(method, results[-1])
    ours, theirs = results
    torch.testing.assert_close(ours.examples.target, theirs.examples.target, rtol=1e-11, atol=1e-11)
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-11)
    unguided = make(conditional(OFFSET), conditional(BASE), adjoint=adjoint, mask_quantile=None)
    other = unguided.collect(cond, generators_for(0, 0, range(3)), generator_for(0, 0, "shared"))
    assert not torch.allclose(other.examples.target, ours.examples.target, rtol=0.01)


# ------------------------------------------------------------------------------ rows, noise, metrics


def test_the_loss_is_the_mean_over_rows_of_the_weighted_distance_to_the_targets():
    method = make(mask_quantile=None)
    examples = collect(method).examples
    assert len(examples) == 6 * 7
    k = (8 * (1 - examples.sigmas)).round().long()
    weight = (TABLE.v_coef[k] / TABLE.std[k]) ** 2
    distance = (OFFSET(examples.latents, examples.sigmas, None) - examples.target).square().sum(1)
    assert total_loss(method, collect(method)) == pytest.approx((weight * distance).mean().item(), rel=1e-12)


def test_metrics_describe_rewards_path_kl_and_adjoints():
    collected = collect(make())
    metrics, rewards = collected.metrics, collected.rewards
    assert metrics["reward"] == pytest.approx(rewards.mean().item())
    assert metrics["reward_std"] == pytest.approx(rewards.std(correction=0).item())
    assert sorted(name for name in metrics if "/" in name) == [f"adjoint_norm/{k:02d}" for k in range(1, 9)]
    assert metrics["path_kl"] > 0
    assert metrics["path_kl_first"] > 0
    same = collect(make(BASE, mask_quantile=None)).metrics
    assert same["path_kl"] == pytest.approx(0, abs=1e-20)
    assert same["masked"] == 0


def test_metrics_of_steps_that_the_sweep_does_not_reach_are_left_out():
    """The path KL is of all steps from 1 on or not there: it means the same whatever was selected."""
    every = collect(make(mask_quantile=None)).metrics
    for iteration in range(12):
        found = collect(make(loss_steps=2, mask_quantile=None), iteration=iteration)
        first = round(8 * (1 - found.examples.sigmas.max().item()))
        norms = sorted(name for name in found.metrics if "/" in name)
        assert norms == [f"adjoint_norm/{k:02d}" for k in range(first + 1, 9)]
        assert ("path_kl" in found.metrics) == (first <= 1)
        assert ("path_kl_first" in found.metrics) == (first == 0)
        if iteration == 0:
            assert first > 1
            assert found.metrics.items() <= every.items() | {("masked", 0.0)}


def test_pairings_and_adjoints_reach_the_targets():
    targets = {
        (adjoint, pairing): collect(
            make(adjoint=adjoint, pairing=pairing, mask_quantile=None)
        ).examples.target
        for adjoint in ("lean", "full")
        for pairing in ("right", "left", "trapezoid")
    }
    distinct = [
        a for i, a in enumerate(targets.values()) for b in list(targets.values())[:i] if torch.allclose(a, b)
    ]
    assert distinct == []


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("rollout", [None, BASE])
def test_masked_rows_leave_loss_and_denominator(rollout):
    method = make(mask_quantile=0.7, rollout=rollout)
    kept = collect(method, num=20)
    assert kept.metrics["masked"] == pytest.approx(1 - len(kept.examples) / (20 * 7))
    assert 0.25 < kept.metrics["masked"] < 0.35
    rows = collect(make(mask_quantile=None, rollout=rollout), num=20).examples
    distance = (OFFSET(rows.latents, rows.sigmas, None) - rows.target).square().sum(1)
    residuals = rows.weight * len(rows) * distance
    thresholds = method.state_dict()["mask"]
    limit = float64(*[thresholds[str(round(8 * (1 - sigma)))] for sigma in rows.sigmas.tolist()])
    expected = residuals[residuals.sqrt() <= limit].mean().item()
    assert total_loss(method, kept) == pytest.approx(expected, rel=1e-10)


def test_a_batch_that_is_masked_entirely_gives_a_zero_loss_not_an_error():
    method = make(mask_quantile=0.9)
    method.load_state_dict({"mask": {str(k): 1e-9 for k in range(7)}, "clip_norm": None})
    method.mask.decay = 1 - 1e-9
    collected = collect(method)
    assert collected.metrics["masked"] == 1
    assert len(collected.examples) == 1
    assert total_loss(method, collected) == 0


# -------------------------------------------------------------------------------------- wrong input


def test_wrong_settings_and_tables_are_errors(monkeypatch):
    for wrong, match in [
        ({"reward_scale": -1.0}, "--reward_scale"),
        ({"pairing": "middle"}, "--pairing must be right, left or trapezoid, got middle"),
        ({"adjoint": "thin"}, "--adjoint must be lean or full, got thin"),
        ({"loss_steps": 8}, "--loss_steps must be 'all' or from 1 to num_inference_steps - 1.*, got 8"),
    ]:
        with pytest.raises(ValueError, match=match):
            make(**wrong)
    with pytest.raises(ValueError, match="without a rollout field"):
        make(adjoint="full", rollout=BASE)
    with pytest.raises(ValueError, match=r"1 \.\. 6 or 'all', got 7"):
        collect(make(loss_steps=7, sigmas=lambda steps: uniform_sigmas(steps - 1)))
    monkeypatch.setitem(TRANSITIONS, "memoryless_local_linear", ode_euler)
    with pytest.raises(ValueError, match="memoryless table"):
        collect(make())
