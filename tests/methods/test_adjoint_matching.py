"""The method without training: passes, noise, rows, masks over ranks, wrong input."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from am_diffusers.methods import METHODS
from am_diffusers.methods.adjoint_matching import AdjointMatching, AdjointMatchingSettings
from am_diffusers.noise import LatentSpec, generator_for, generators_for
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.terminal_cost import GradientOptions
from am_diffusers.transitions import (
    jitter_sigmas,
    memoryless_local_linear,
    ode_euler,
    uniform_sigmas,
)
from am_diffusers.velocity import CallableField, Conditioning, GuidedField
from oracles import (
    THREE_MODES,
    CountingField,
    float64,
    unconditional,
)

BASE = THREE_MODES.field()
OFFSET = CallableField(lambda x, sigma, cond: THREE_MODES.velocity(x, sigma) + 0.3 * torch.tanh(x))
TABLE = memoryless_local_linear(uniform_sigmas(8))
SETTINGS = AdjointMatchingSettings(reward_scale=2.0)
LATENTS = LatentSpec((2,), dtype=torch.float64)


def reward(x, prompts):
    return x[:, 0] - 0.3 * x.square().sum(1)


def make(policy=OFFSET, base=BASE, transitions=TABLE, **changes) -> AdjointMatching:
    gather = {"gather": changes.pop("gather")} if "gather" in changes else {}
    rollout_policy = changes.pop("rollout_policy", None)
    settings = replace(SETTINGS, **changes)
    return AdjointMatching(
        policy,
        base,
        reward,
        transitions,
        latents=LATENTS,
        settings=settings,
        rollout_policy=rollout_policy,
        **gather,
    )


def collect(method, num=6, iteration=0, first=0):
    """Samples first .. first + num - 1 of an iteration."""
    generators = generators_for(0, iteration, range(first, first + num))
    cond = unconditional(first + num).index(range(first, first + num))
    return method.collect(cond, generators, generator_for(0, iteration, "shared"))


def total_loss(method, collected, size=100) -> float:
    return sum(method.loss(part)[0].item() for part in collected.examples.split(size))


# ------------------------------------------------------------------------------------------- passes


def test_no_pass_is_wasted():
    grid, first_selected = uniform_sigmas(8).tolist(), set()
    for steps, iteration in [("all", 0), *((2, i) for i in range(12))]:
        policy, base = CountingField(OFFSET), CountingField(BASE)
        method = make(policy, base, steps=steps, mask_quantile=None)
        examples = collect(method, iteration=iteration).examples
        with_first = 1.0 in examples.sigmas
        first_selected.add(with_first)
        assert policy.calls == grid[:7]
        assert base.vjps == grid[7:0:-1]
        assert base.calls == ([1.0] if with_first else [])
        parts = examples.split(5)
        for part in parts:
            method.loss(part)
        assert len(policy.calls) - 7 == len(parts) == -(-len(examples) // 5)
        assert policy.vjps == []
        assert len(base.calls + base.vjps) == 7 + with_first
    assert first_selected == {True, False}


def test_a_rollout_by_another_field_costs_one_policy_call_per_selected_step():
    policy, other = CountingField(OFFSET), CountingField(BASE)
    guided = collect(make(policy, rollout_policy=other, steps=3, mask_quantile=None)).examples
    assert other.calls == uniform_sigmas(8).tolist()[:7]
    assert sorted(policy.calls) == sorted(set(guided.sigmas.tolist()))
    along_other = collect(make(BASE, steps=3, mask_quantile=None)).examples
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
        tuple("abc"), torch.full((3, 1, 1), 0.7).double(), None, torch.full((3, 1, 1), -0.4).double()
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


@pytest.mark.parametrize("adjoint", ["lean", "full"])
def test_batch_sizes_change_nothing(adjoint):
    whole = collect(make(adjoint=adjoint))
    parts = collect(make(adjoint=adjoint, collect_batch_size=4, gradient=GradientOptions(batch_size=1)))
    for name in ("latents", "sigmas", "target", "weight", "samples"):
        torch.testing.assert_close(
            getattr(parts.examples, name), getattr(whole.examples, name), rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(parts.rewards, whole.rewards, rtol=1e-12, atol=0)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-12)


def test_iterations_differ_and_repeat():
    method = make(mask_quantile=None)
    first, again, second = (collect(method, iteration=i).examples.latents for i in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, second).any()


def test_a_jittered_grid_is_drawn_from_the_shared_generator():
    def jittered(generator):
        return memoryless_local_linear(jitter_sigmas(uniform_sigmas(8), 0.3, generator))

    sigmas = [
        set(collect(make(transitions=jittered), iteration=i).examples.sigmas.tolist()) for i in (0, 0, 1)
    ]
    assert sigmas[0] == sigmas[1]
    assert sigmas[0] & sigmas[2] == {1.0}


def test_metrics_describe_rewards_path_kl_and_adjoints():
    collected = collect(make())
    metrics, rewards = collected.metrics, collected.rewards
    assert metrics["reward"] == pytest.approx(rewards.mean().item())
    assert metrics["reward_std"] == pytest.approx(rewards.std(correction=0).item())
    assert [name for name in metrics if "/" in name] == [f"adjoint_norm/{k:02d}" for k in range(1, 9)]
    assert metrics["path_kl"] > 0
    assert metrics["path_kl_first"] > 0
    same = collect(make(policy=BASE, steps=1, mask_quantile=None)).metrics
    assert same["path_kl"] == pytest.approx(0, abs=1e-20)
    assert same["masked"] == 0


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


# ---------------------------------------------------------------------------------- masks and ranks


@pytest.mark.parametrize("rollout_policy", [None, BASE])
def test_masked_rows_leave_loss_and_denominator(rollout_policy):
    method = make(mask_quantile=0.7, rollout_policy=rollout_policy)
    kept = collect(method, num=20)
    assert kept.metrics["masked"] == pytest.approx(1 - len(kept.examples) / (20 * 7))
    assert 0.25 < kept.metrics["masked"] < 0.35
    rows = collect(make(mask_quantile=None, rollout_policy=rollout_policy), num=20).examples
    distance = (OFFSET(rows.latents, rows.sigmas, None) - rows.target).square().sum(1)
    residuals = rows.weight * len(rows) * distance
    thresholds = method.state_dict()["mask"]
    limit = float64(*[thresholds[str(round(8 * (1 - sigma)))] for sigma in rows.sigmas.tolist()])
    expected = residuals[residuals.sqrt() <= limit].mean().item()
    assert total_loss(method, kept) == pytest.approx(expected, rel=1e-10)


def test_a_batch_that_is_masked_entirely_gives_a_zero_loss_not_an_error():
    method = make()
    method.load_state_dict({"mask": {str(k): 1e-9 for k in range(7)}, "clip_norm": None})
    method.mask.decay = 1 - 1e-9
    collected = collect(method)
    assert collected.metrics["masked"] == 1
    assert len(collected.examples) == 1
    assert total_loss(method, collected) == 0


def test_the_state_continues_a_run():
    method, resumed = make(mask_quantile=0.5), make(mask_quantile=0.5)
    for i in range(3):
        collect(method, iteration=i)
    resumed.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert total_loss(resumed, collect(resumed, iteration=3)) == total_loss(
        method, collect(method, iteration=3)
    )
    assert resumed.state_dict() == method.state_dict()
    fresh = make(mask_quantile=0.5)
    collect(fresh, iteration=3)
    assert fresh.state_dict() != method.state_dict()
    make(mask_quantile=None).load_state_dict(make(mask_quantile=None).state_dict())


class Ranks:
    """Runs one function per rank in threads, with a gather that meets the other ranks' tensors."""

    def __init__(self, num: int) -> None:
        self.num, self.barrier, self.parts = num, threading.Barrier(num), {}

    def run(self, function: Callable):
        results = {}

        def work(rank):
            def gather(values):
                self.parts[rank] = values
                self.barrier.wait()
                joined = torch.cat([self.parts[r] for r in range(self.num)])
                self.barrier.wait()
                return joined

            try:
                results[rank] = function(rank, gather)
            except Exception:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in range(self.num)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_together_equal_one_process(num_ranks):
    def three_iterations(first, num, **gather):
        method = make(mask_quantile=0.6, steps=4, **gather)
        collected = [collect(method, num=num, iteration=i, first=first) for i in range(3)]
        losses = [total_loss(method, c) for c in collected]
        return (
            losses,
            [c.metrics for c in collected],
            method.state_dict(),
            [len(c.examples) for c in collected],
        )

    losses, metrics, state, num_rows = three_iterations(0, 12)
    share = 12 // num_ranks
    ranks = Ranks(num_ranks).run(lambda rank, gather: three_iterations(rank * share, share, gather=gather))
    assert torch.tensor([r[0] for r in ranks]).sum(0).tolist() == pytest.approx(losses, rel=1e-6)
    for _, rank_metrics, rank_state, rank_rows in ranks:
        for got, expected in zip(rank_metrics, metrics, strict=True):
            assert got == pytest.approx(expected, rel=1e-9)
        assert rank_state["mask"] == pytest.approx(state["mask"], rel=1e-12)
        assert rank_rows == ranks[0][3]  # so that all ranks make the same number of backward passes
        assert all(n * num_ranks >= whole for n, whole in zip(rank_rows, num_rows, strict=True))


# -------------------------------------------------------------------------------------- wrong input


def test_wrong_settings_and_tables_are_errors():
    for wrong, match in [
        ({"reward_scale": -1.0}, "reward_scale"),
        ({"pairing": "middle"}, "pairing"),
        ({"adjoint": "thin"}, "adjoint"),
    ]:
        with pytest.raises(ValueError, match=match):
            make(**wrong)
    with pytest.raises(ValueError, match="rollout_policy"):
        make(adjoint="full", rollout_policy=BASE)
    with pytest.raises(ValueError, match="memoryless table"):
        collect(make(transitions=ode_euler(uniform_sigmas(4))))
    with pytest.raises(ValueError, match=r"1 \.\. 7 or 'all', got 8"):
        collect(make(steps=8))


def test_a_reward_that_is_not_a_number_stops_the_iteration_and_names_the_prompt():
    method = make()
    method.terminal.reward = lambda x, prompts: (
        x.sum(1) / torch.tensor([float(p != "prompt 2") for p in prompts])
    )
    with pytest.raises(NonFiniteError, match="prompt 2"):
        collect(method)


def test_methods_by_name():
    assert METHODS["adjoint_matching"] is AdjointMatching
    assert AdjointMatching.needs_reward_gradient
