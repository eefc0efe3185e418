"""Flow-GRPO: its gradient against REINFORCE and closed forms, clip, KL, passes, kept rows, ranks, errors."""

import math

import pytest
import torch
from oracles import CountingField, affine, gaussian

from am_diffusers.methods import METHODS
from am_diffusers.methods.base import PartShare
from am_diffusers.methods.flow_grpo import FlowGRPO, FlowGRPOSettings
from am_diffusers.methods.values import Advantages
from am_diffusers.rollout import LatentSpec, generator_for, generators_for
from am_diffusers.state_files import load_state, save_state
from am_diffusers.transitions import (
    jitter_sigmas,
    memoryless_local_linear,
    ode_euler,
    uniform_sigmas,
)
from am_diffusers.velocity import CallableField, Conditioning

K = 5
LAW = gaussian(0.3, 0.5)
TABLE = memoryless_local_linear(uniform_sigmas(K))
LATENTS = LatentSpec((1,), dtype=torch.float64)
BASE = LAW.field()


def reward(x, prompts):
    return 0.7 * x[:, 0]


def quadratic(x, prompts):
    return -((x[:, 0] - 1) ** 2)


def some_shifts():
    return torch.tensor([0.3, -0.2, 0.1, -0.4, 0.0], dtype=torch.float64, requires_grad=True)


def shifted(shifts):
    """The base's velocity plus a number of its own at each step."""

    def velocity(x, sigma, cond):
        return LAW.velocity(x, sigma) + shifts[torch.searchsorted(-TABLE.sigmas, -sigma)][:, None]

    return CallableField(velocity)


def make(policy, base=BASE, table=TABLE, scale=2.0, group=4, kind="centred", **changes):
    gather = {"gather": changes.pop("gather")} if "gather" in changes else {}
    function = changes.pop("reward", quadratic)
    settings = FlowGRPOSettings(Advantages(scale, group, kind), **changes)
    return FlowGRPO(policy, base, function, table, latents=LATENTS, settings=settings, **gather)


def collect(method, num=8, iteration=0, first=0, group=4):
    ids = range(first, first + num)
    prompts = tuple(f"prompt {i // group}" for i in ids)
    pooled = torch.tensor([[float(i)] for i in ids])
    cond = Conditioning(prompts, pooled=pooled)
    return method.collect(cond, generators_for(0, iteration, ids), generator_for(0, iteration, "shared"))


def total_loss(method, collected, size=1000):
    parts = [method.loss(part) for part in collected.examples.split(size)]
    return sum(loss for loss, _ in parts), {name: sum(p[1][name] for p in parts) for name in parts[0][1]}


def gradient(method, shifts, collected, size=1000):
    (found,) = torch.autograd.grad(total_loss(method, collected, size)[0], shifts)
    return found


# --------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("kind", ["centred", "normalised"])
def test_with_one_pass_the_gradient_is_the_reinforce_estimator(kind):
    """States remade by hand: minus the mean of A times the scores of all its steps, plus that of the KL."""
    shifts, num = some_shifts(), 8
    method = make(shifted(shifts), kind=kind, kl_weight=0.3)
    collected = collect(method, num)
    generators = generators_for(0, 0, range(num))
    x, log_prob, path_kl = LATENTS.draw(generators), 0.0, 0.0
    for k in range(K - 1):
        velocity = LAW.velocity(x, TABLE.sigmas[k]) + shifts[k]
        noise, std = LATENTS.draw(generators), TABLE.std[k]
        mean = TABLE.x_coef[k] * x + TABLE.v_coef[k] * velocity
        after = (mean + std * noise).detach()
        log_prob = log_prob - 0.5 * (((after - mean) / std) ** 2).sum(1)
        path_kl = path_kl + 0.5 * (TABLE.v_coef[k] / std * shifts[k]) ** 2
        x = after
    final = x - TABLE.sigmas[K - 1] * LAW.velocity(x, TABLE.sigmas[K - 1])  # the base's
    rewards = quadratic(final, None)
    torch.testing.assert_close(collected.rewards, rewards, rtol=1e-12, atol=1e-14)
    advantages = Advantages(2.0, 4, kind)(rewards, ["a"] * 4 + ["b"] * 4)
    (expected,) = torch.autograd.grad(-(advantages * log_prob).mean() + 0.3 * path_kl, shifts)
    torch.testing.assert_close(gradient(method, shifts, collected), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(method, shifts, collected, 5), expected, rtol=1e-10, atol=1e-12)


def test_rounding_that_depends_on_the_batch_clips_nothing_in_the_first_pass():
    """As in half precision; exaggerated: rows alone have another velocity than eight together."""
    shifts = some_shifts()
    exact = shifted(shifts)

    def rounded(x, sigma, cond):
        return exact(x, sigma, cond) + (0.5 if len(x) == 1 else 0.0)

    method = make(CallableField(rounded), passes=2, clip_range=0.05)
    _, metrics = total_loss(method, collect(method), size=1)
    assert metrics["clipped"] == 0
    _, metrics = total_loss(method, collect(method, iteration=1), size=1)
    assert metrics["clipped"] > 0


def test_the_expected_gradient_is_that_of_the_mean_reward():
    """Linear reward on a 1-D Gaussian chain, 4 standard errors of 50 batches of 200 samples."""
    shifts, num_batches = some_shifts(), 50
    method = make(shifted(shifts), reward=reward, kl_weight=0.0)
    found = torch.stack(
        [gradient(method, shifts, collect(method, 200, iteration=i)) for i in range(num_batches)]
    )
    expected, onward = torch.zeros(K, dtype=torch.float64), 1.0
    for k in range(K - 1, -1, -1):
        if k < K - 1:
            expected[k] = -2.0 * 0.7 * TABLE.v_coef[k] * onward
        slope, _ = affine(LAW.field(), TABLE.sigmas[k].item())
        onward = onward * (TABLE.x_coef[k] + TABLE.v_coef[k] * slope).item()
    errors = found.std(0) / num_batches**0.5
    assert ((found.mean(0) - expected).abs()[:-1] < 4 * errors[:-1]).all()
    assert (expected[:-1].abs() > 7 * errors[:-1]).all()  # so that a wrong factor would be seen
    assert not found[:, -1].any()  # the last step is the base's


def test_the_gradient_of_the_kl_is_exact():
    """Equal rewards have no advantage; the KL of a step is (v_coef / std * shift)^2 / 2."""
    shifts = some_shifts()
    method = make(shifted(shifts), reward=lambda x, prompts: x[:, 0] * 0, kl_weight=0.3)
    collected = collect(method)
    ratio = (TABLE.v_coef[:-1] / TABLE.std[:-1]) ** 2
    expected = torch.zeros(K, dtype=torch.float64)
    expected[:-1] = 0.3 * ratio * shifts.detach()[:-1]
    torch.testing.assert_close(gradient(method, shifts, collected), expected, rtol=1e-12, atol=1e-14)
    loss, numbers = total_loss(method, collected, size=3)
    path_kl = 0.5 * (ratio * shifts.detach()[:-1] ** 2).sum().item()
    assert numbers == pytest.approx({"path_kl": path_kl, "clipped": 0})
    assert loss.item() == pytest.approx(0.3 * path_kl, rel=1e-12)


def test_a_subset_of_steps_stands_for_all():
    """One step of four has four times its gradient; over many draws each is drawn equally often."""
    shifts, drawn = some_shifts(), []
    full = make(shifted(shifts))
    expected = (K - 1) * gradient(full, shifts, collect(full))
    for i in range(200):
        method = make(shifted(shifts), steps=1)
        cond = Conditioning(("a",) * 4 + ("b",) * 4)
        shared = generator_for(i, "shared")
        collected = method.collect(cond, generators_for(0, 0, range(8)), shared)
        (k,) = set(collected.examples.steps.tolist())
        drawn.append(k)
        if i < 10:
            found = gradient(method, shifts, collected)
            assert found[k].item() == pytest.approx(expected[k].item(), rel=1e-10)
            assert len(found.nonzero()) == 1
    counts = [drawn.count(k) for k in range(K - 1)]
    assert all(abs(n - 50) < 4 * math.sqrt(200 * 0.25 * 0.75) for n in counts), counts


def test_a_ratio_beyond_the_clip_has_no_gradient_where_that_would_gain():
    """Each row against PPO's minimum, once the policy has moved; the hinge adds a constant to it."""
    shifts = some_shifts()
    method = make(shifted(shifts), passes=2, kl_weight=0.0, clip_range=0.1)
    before = collect(method, 40)
    with torch.no_grad():
        shifts += torch.tensor([0.1, -0.2, 0.15, 0.1, 0.0])
    examples = collect(method, 40, iteration=1).examples
    assert torch.equal(examples.latents, before.examples.latents)
    ratios, outcomes = [], set()
    for row in examples.split(1):
        loss, _ = method.loss(row)
        (found,) = torch.autograd.grad(loss, shifts)
        k, advantage = row.steps.item(), row.advantage.item()
        velocity = LAW.velocity(row.latents, TABLE.sigmas[k]) + shifts[k]
        log_prob = TABLE.log_prob(k, row.next_latents, row.latents, velocity)
        ratio = (log_prob - row.log_prob).exp()
        clipped = ratio.clamp(0.9, 1.1)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        (expected,) = torch.autograd.grad(-surrogate.sum() / 40, shifts, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        constant = 1.1 * max(advantage, 0)
        assert loss.item() == pytest.approx((constant - surrogate.item()) / 40, rel=1e-9)
        assert loss.item() >= 0
        ratios.append(ratio.item())
        outcomes.add((ratio.item() > 1.1, ratio.item() < 0.9, advantage > 0, bool(found.any())))
        gains = (ratio.item() > 1.1 and advantage > 0) or (ratio.item() < 0.9 and advantage < 0)
        assert bool(found.any()) != gains
    assert len(outcomes) == 6  # above, below and inside, with both signs
    share = sum(abs(ratio - 1) > 0.1 for ratio in ratios) / len(ratios)
    assert method.loss(examples)[1]["clipped"] == pytest.approx(share)


@pytest.mark.parametrize("kind", ["centred", "normalised"])
def test_a_quadratic_reward_goes_up_with_several_passes(kind):
    """From -.99 of the base to above -.6, far above the noise of 64 samples."""
    shifts = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    method = make(shifted(shifts), kind=kind, passes=2, kl_weight=0.1)
    optimizer, rewards = torch.optim.Adam([shifts], lr=0.05), []
    for iteration in range(60):
        collected = collect(method, 64, iteration)
        rewards.append(collected.metrics["reward"])
        optimizer.zero_grad()
        total_loss(method, collected)[0].backward()
        optimizer.step()
    assert sum(rewards[-10:]) / 10 > sum(rewards[:4]) / 4 + 0.25


# ------------------------------------------------------------------------------------ passes and rows


@pytest.mark.parametrize(("steps", "passes"), [("all", 1), (2, 3)])
def test_passes_through_the_networks_are_those_announced(steps, passes):
    seen = []

    def counted(x, prompts):
        seen.append((len(x), torch.is_grad_enabled()))
        return torch.round(quadratic(x, prompts), decimals=1)  # not differentiable

    policy, base = CountingField(shifted(some_shifts())), CountingField(LAW.field())
    method = make(policy, base, steps=steps, passes=passes, reward=counted)
    trained = K - 1 if steps == "all" else steps
    for iteration in range(2 * passes):
        collected = collect(method, iteration=iteration)
        rollouts = iteration // passes + 1
        assert collected.metrics["grpo_pass"] == iteration % passes + 1
        assert len(collected.examples) == 8 * trained
        total_loss(method, collected, size=8)
        assert len(policy.calls) == rollouts * (K - 1) + (iteration + 1) * trained
        assert len(base.calls) == rollouts * (trained + 1)
        assert seen == [(8, False)] * rollouts
    assert policy.vjps == base.vjps == []


def test_batch_sizes_and_ranks_change_nothing():
    shifts = some_shifts()
    whole = make(shifted(shifts), steps=2)
    expected = total_loss(whole, collect(whole, 12))[0].item()
    parts = make(shifted(shifts), steps=2, collect_batch_size=5, reward_batch_size=1)
    assert total_loss(parts, collect(parts, 12), size=3)[0].item() == pytest.approx(expected, rel=1e-12)
    ranks = [
        total_loss(method, collect(method, 4, first=first))[0].item()
        for first in (0, 4, 8)
        for method in [make(shifted(shifts), steps=2, gather=lambda values: values.repeat(3))]
    ]
    assert sum(ranks) == pytest.approx(expected, rel=1e-12)


def saved(method, folder):
    """What a checkpoint keeps of a method, written and read."""
    folder.mkdir(exist_ok=True)
    save_state(folder, "method", {"own": method.state_dict(), "local": method.local_state_dict()})
    return load_state(folder, "method")


def same_rows(a, b):
    a, b = a.state_dict(), b.state_dict()
    for part in ("rows", "table"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    assert a["cond"]["prompts"] == b["cond"]["prompts"]
    assert torch.equal(a["cond"]["pooled"], b["cond"]["pooled"])
    return True


def jittered(shared):
    return memoryless_local_linear(jitter_sigmas(uniform_sigmas(K), 0.3, shared))


def test_a_run_goes_on_in_the_middle_of_its_passes(tmp_path):
    whole = make(LAW.field(), table=jittered, passes=3)
    runs = [collect(whole, iteration=i) for i in range(5)]
    for stop in range(1, 5):
        method = make(LAW.field(), table=jittered, passes=3)
        for i in range(stop):
            collect(method, iteration=i)
        state = saved(method, tmp_path)
        assert bool(state["local"]) == (stop % 3 != 0)  # nothing to keep after the last pass
        resumed = make(LAW.field(), table=jittered, passes=3)
        resumed.load_state_dict(state["own"])
        resumed.load_local_state_dicts([state["local"]], PartShare())
        for i in range(stop, 5):
            found = collect(resumed, iteration=i)
            assert same_rows(found.examples, runs[i].examples)
            assert torch.equal(found.rewards, runs[i].rewards)
            assert found.metrics == runs[i].metrics


def test_an_iteration_that_failed_does_not_use_up_a_pass_and_its_rows_are_made_again():
    method = make(LAW.field(), passes=2)
    roll_back = method.snapshot()
    failed = collect(method, iteration=0).examples
    roll_back()  # as the trainer does
    assert method.local_state_dict() == {}
    again = collect(method, iteration=1).examples
    assert not torch.isclose(again.latents, failed.latents).any()
    roll_back = method.snapshot()
    second = collect(method, iteration=2)
    roll_back()
    retried = collect(method, iteration=3)
    assert same_rows(retried.examples, second.examples)
    assert retried.metrics["grpo_pass"] == 2


def test_rows_are_shared_anew_when_the_number_of_ranks_changes(tmp_path):
    """Two ranks of 8 samples to one of 16 to four of 4, the loss of all being the same."""
    shifts = some_shifts()
    double, times = {"gather": lambda values: values.repeat(2)}, []
    methods = [make(shifted(shifts), passes=2, steps=2, **double) for _ in range(2)]
    collected = [collect(method, 8, first=8 * rank) for rank, method in enumerate(methods)]
    times.append(sum(total_loss(m, c)[0].item() for m, c in zip(methods, collected, strict=True)))
    states = [saved(method, tmp_path / str(rank)) for rank, method in enumerate(methods)]

    def restored(rank, ranks):
        method = make(shifted(shifts), passes=2, steps=2)
        method.load_state_dict(states[0]["own"])
        share = PartShare(rank, ranks, len(states))
        method.load_local_state_dicts([states[part]["local"] for part in share.needed], share)
        own = collect(method, 16 // ranks, iteration=1)
        assert len(own.rewards) == len(own.examples.cond) == 16 // ranks
        pooled = own.examples.cond.index(own.examples.samples.tolist()).pooled
        first = rank * 16 // ranks
        assert pooled[::2, 0].tolist() == list(range(first, first + 16 // ranks))
        return total_loss(method, own)[0].item()

    for ranks in (1, 2, 4):
        times.append(sum(restored(rank, ranks) for rank in range(ranks)))
    assert times == pytest.approx([times[0]] * 4, rel=1e-12)
    lost = make(shifted(shifts), passes=2)
    lost.load_state_dict(states[0]["own"])
    lost.load_local_state_dicts([{}], PartShare(1, 2, 2))
    assert collect(lost, iteration=1).metrics["grpo_pass"] == 1


def test_the_rows_say_what_they_are():
    method = make(LAW.field(), steps=1)
    collected = collect(method)
    row = collected.examples.split(1)[0]
    assert row.describe().startswith(f"steps {row.steps.tolist()}, prompts ['prompt 0'], advantages [")
    assert collected.metrics["reward"] == pytest.approx(collected.rewards.mean().item())
    assert collected.metrics["reward_std"] == pytest.approx(collected.rewards.std(correction=0).item())


def test_names_and_wrong_settings():
    assert METHODS["flow_grpo"] is FlowGRPO
    assert not FlowGRPO.needs_reward_gradient
    assert FlowGRPO.compares_samples
    for wrong in ({"passes": 0}, {"clip_range": 1.0}, {"kl_weight": -1.0}):
        with pytest.raises(ValueError, match="passes >= 1, 0 < clip_range < 1 and kl_weight >= 0"):
            make(LAW.field(), **wrong)
    with pytest.raises(ValueError, match=r"1 \.\. 4 or 'all', got 5"):
        collect(make(LAW.field(), steps=5))
    with pytest.raises(ValueError, match="memoryless table"):
        collect(make(LAW.field(), table=ode_euler(uniform_sigmas(4))))
    with pytest.raises(ValueError, match="groups of 4 neighbouring samples"):
        collect(make(LAW.field()), 6)
