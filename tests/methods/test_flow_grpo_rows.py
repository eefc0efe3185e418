"""Rows that Flow-GRPO keeps for further passes: network calls, checkpoints, roll-backs, ranks, metrics."""

from unittest.mock import Mock

import pytest
import torch

from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.system.processes import PeerNotFiniteError
from am_diffusers.system.signals import Interrupted
from am_diffusers.training.state_files import load_state, save_state
from am_diffusers.velocity import CallableField
from grpo_chain import (
    LAW,
    K,
    collect,
    make,
    quadratic,
    shifted,
    some_shifts,
    total_loss,
)
from oracles import CountingField
from small_trainer import make_trainer


@pytest.mark.parametrize(("steps", "passes"), [("all", 1), (2, 3)])
def test_no_pass_is_wasted(steps, passes):
    seen = []

    def counted(x, prompts):
        seen.append((len(x), torch.is_grad_enabled()))
        return torch.round(quadratic(x, prompts), decimals=1)  # not differentiable

    policy, base = CountingField(shifted(some_shifts())), CountingField(LAW.field())
    method = make(policy, base, loss_steps=steps, grpo_passes=passes, reward=counted)
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


def test_a_run_goes_on_in_the_middle_of_its_passes(tmp_path):
    whole = make(LAW.field(), sigma_jitter=0.3, grpo_passes=3)
    runs = [collect(whole, iteration=i) for i in range(5)]
    for stop in range(1, 5):
        method = make(LAW.field(), sigma_jitter=0.3, grpo_passes=3)
        for i in range(stop):
            collect(method, iteration=i)
        state = saved(method, tmp_path)
        assert bool(state["local"]) == (stop % 3 != 0)  # nothing to keep after the last pass
        resumed = make(LAW.field(), sigma_jitter=0.3, grpo_passes=3)
        resumed.load_state_dict(state["own"])
        resumed.load_local_state_dicts([state["local"]], PartShare())
        for i in range(stop, 5):
            found = collect(resumed, iteration=i)
            assert same_rows(found.examples, runs[i].examples)
            assert torch.equal(found.rewards, runs[i].rewards)
            assert found.metrics == runs[i].metrics


def test_only_a_new_rollout_reports_rewards():
    """Of the rewards of a kept rollout nothing is repeated: they would look like the policy's of now."""
    method = make(LAW.field(), grpo_passes=2)
    runs = [collect(method, iteration=i) for i in range(4)]
    for first, second in (runs[:2], runs[2:]):
        assert set(first.metrics) == {"reward", "reward_std", "advantage_std", "grpo_pass"}
        assert len(first.rewards) == 8
        assert second.metrics == {"grpo_pass": 2.0}
        assert len(second.rewards) == 0
    assert runs[0].metrics["reward"] != runs[2].metrics["reward"]


def test_an_iteration_that_failed_does_not_use_up_a_pass_and_its_rows_are_made_again():
    method = make(LAW.field(), grpo_passes=2)
    roll_back = method.snapshot()
    failed = collect(method, iteration=0).examples
    roll_back(None)  # as the trainer does
    assert method.local_state_dict() == {}
    again = collect(method, iteration=1).examples
    assert not torch.isclose(again.latents, failed.latents).any()
    roll_back = method.snapshot()
    second = collect(method, iteration=2)
    roll_back(None)
    retried = collect(method, iteration=3)
    assert same_rows(retried.examples, second.examples)
    assert retried.metrics["grpo_pass"] == 2


def grpo_trainer(tmp_path, passes):
    """A trainer of 8 samples of Flow-GRPO, on a policy with one trained shift; it may skip an iteration."""
    sizes = {"train_batch_size": 8, "samples_per_prompt": 4, "max_skipped_iterations": 1}
    trainer, _, weight = make_trainer(tmp_path, **sizes)
    policy = CallableField(lambda x, sigma, cond: LAW.velocity(x, sigma) + weight[0])
    trainer.method = method = make(policy, grpo_passes=passes)
    return trainer, method


def iterate(trainer):
    metrics = trainer.iterate()
    trainer.state.progress.iteration += 1
    return metrics


def kept_states(method):
    return method.local_state_dict()["examples"]["rows"]["latents"]


@pytest.mark.parametrize("error", [NonFiniteError("loss is nan"), PeerNotFiniteError("elsewhere")])
def test_a_second_pass_that_is_not_finite_is_followed_by_a_new_rollout(tmp_path, monkeypatch, error):
    """The kept rows would meet the same policy again: every retry would fail like the first."""
    trainer, method = grpo_trainer(tmp_path, passes=3)
    assert iterate(trainer)["grpo_pass"] == 1
    before = kept_states(method)
    with monkeypatch.context() as broken:
        broken.setattr(method, "loss", Mock(side_effect=error))
        assert iterate(trainer)["skipped"] == 1
    assert method.local_state_dict() == {}
    metrics = iterate(trainer)
    assert metrics["grpo_pass"] == 1
    assert "reward" in metrics
    assert not torch.isclose(kept_states(method), before).any()


def test_a_second_pass_that_a_signal_ended_is_done_again_on_its_rows(tmp_path, monkeypatch):
    """So that a run that was stopped goes on as if it had not been."""
    trainer, method = grpo_trainer(tmp_path, passes=3)
    iterate(trainer)
    before = kept_states(method)
    with monkeypatch.context() as broken:
        broken.setattr(method, "loss", Mock(side_effect=Interrupted(15)))
        with pytest.raises(Interrupted):
            trainer.iterate()
    assert torch.equal(kept_states(method), before)
    assert iterate(trainer)["grpo_pass"] == 2


def test_rows_are_shared_anew_when_the_number_of_ranks_changes(tmp_path):
    """Two ranks of 8 samples to one of 16 to four of 4, the loss of all being the same."""
    shifts = some_shifts()
    double, times = {"gather": lambda values: values.repeat(2)}, []
    methods = [make(shifted(shifts), grpo_passes=2, loss_steps=2, **double) for _ in range(2)]
    collected = [collect(method, 8, first=8 * rank) for rank, method in enumerate(methods)]
    times.append(sum(total_loss(m, c)[0].item() for m, c in zip(methods, collected, strict=True)))
    states = [saved(method, tmp_path / str(rank)) for rank, method in enumerate(methods)]

    def restored(rank, ranks):
        method = make(shifted(shifts), grpo_passes=2, loss_steps=2)
        method.load_state_dict(states[0]["own"])
        share = PartShare(rank, ranks, parts=2)
        method.load_local_state_dicts([states[part]["local"] for part in share.needed], share)
        own = collect(method, 16 // ranks, iteration=1)
        assert len(own.examples.cond) == 16 // ranks
        pooled = own.examples.cond.index(own.examples.samples.tolist()).pooled
        first = rank * 16 // ranks
        assert pooled[::2, 0].tolist() == list(range(first, first + 16 // ranks))
        return total_loss(method, own)[0].item()

    for ranks in (1, 2, 4):
        times.append(sum(restored(rank, ranks) for rank in range(ranks)))
    assert times == pytest.approx([times[0]] * 4, rel=1e-12)
    lost = make(shifted(shifts), grpo_passes=2)
    lost.load_state_dict(states[0]["own"])
    lost.load_local_state_dicts([{}], PartShare(1, 2, 2))
    assert collect(lost, iteration=1).metrics["grpo_pass"] == 1
