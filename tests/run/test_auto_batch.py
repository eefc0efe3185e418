"""Micro-batches of size auto: the search, what the probes run, and a run under a limit of memory."""

from contextlib import nullcontext

import pytest
import torch
from test_trainer_runs import make_run, run_losses

from am_diffusers.models.base import Model
from am_diffusers.noise import LatentSpec
from am_diffusers.run.micro_batches import Passes, headroom, largest_fitting
from am_diffusers.system.failures import PhaseMemoryError
from am_diffusers.velocity import CallableField
from finetune_runs import write_rewards
from oracles import THREE_MODES, CountingField, unconditional

AUTO = {f"{name}_micro_batch_size": "auto" for name in ("rollout", "reward", "loss")}


def fits_up_to(limit, tried, error=torch.OutOfMemoryError):
    def run(size):
        tried.append(size)
        if size > limit:
            raise error("no memory")

    return run


@pytest.mark.parametrize(("limit", "found"), [(12, 12), (11, 6), (5, 3), (1, 1)])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError,
        PhaseMemoryError,
        lambda _: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        lambda _: torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_the_size_is_halved_until_it_fits(limit, found, error):
    tried = []
    assert largest_fitting("s", 12, fits_up_to(limit, tried, error), bool) == found
    assert tried == [12, 6, 3, 1][: [12, 6, 3, 1].index(found) + 1]


def test_all_processes_find_what_the_smallest_one_does():
    votes = iter([False, False, True])
    tried = []
    assert largest_fitting("s", 8, fits_up_to(8, tried), lambda mine: next(votes) and mine) == 2
    assert tried == [8, 4, 2]


def test_nothing_fits_names_what_remains():
    with pytest.raises(
        ValueError, match=r"--loss_micro_batch_size auto: not even 1 fits .*checkpointing.*resol"
    ):
        largest_fitting("loss_micro_batch_size", 4, fits_up_to(0, []), bool)


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="bug"):
        largest_fitting("s", 4, fits_up_to(0, [], lambda _: RuntimeError("bug")), bool)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_card_is_tried_with_less_than_is_free_and_gets_it_back(monkeypatch, error):
    """20 of 80 GB are another program's, 10 this one's: 60 are to be had, of which 92 % are tried."""
    limits = [1.0]
    card = {
        "mem_get_info": lambda _: (50 << 30, 80 << 30),
        "memory_reserved": lambda _: 10 << 30,
        "get_per_process_memory_fraction": lambda _: limits[-1],
        "set_per_process_memory_fraction": lambda fraction, _: limits.append(fraction),
    }
    for name, function in card.items():
        monkeypatch.setattr(torch.cuda, name, function)
    with pytest.raises(error) if error else nullcontext(), headroom(torch.device("cuda", 0)):
        assert limits[-1] == pytest.approx(0.92 * 60 / 80)
        if error:
            raise error
    assert limits[-1] == 1.0


def test_a_probe_runs_the_real_passes_and_leaves_no_gradient():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    base, rewarded, batches = CountingField(THREE_MODES.field()), [], []

    def policy(x, sigma, cond):
        batches.append(len(x))
        assert torch.is_grad_enabled()
        return x * weight

    def reward(x, prompts):
        rewarded.append((len(x), len(prompts), x.requires_grad))
        return x.sum(1)

    passes = Passes(
        base,
        CallableField(policy),
        reward,
        LatentSpec((2,), dtype=torch.float64),
        lambda prompts: unconditional(len(prompts)),
        ["a", "b"],
        [weight],
        num_steps=4,
        num_rows=9,
    )
    passes.sweep(5, 2)
    assert (base.vjps, rewarded) == ([0.5], [(2, 2, True), (2, 2, True), (1, 1, True)])
    passes.loss(9)
    assert batches == [9]
    assert weight.grad is None


@pytest.fixture
def little_memory(monkeypatch):
    """A device whose memory holds 3 rows of the transformer with gradients and 1 decoded picture."""
    velocity, decode = Model.velocity, Model.decode

    def limited(self, x, *rest):
        if torch.is_grad_enabled() and len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return velocity(self, x, *rest)

    def limited_decode(self, latents):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latents)

    monkeypatch.setattr(Model, "velocity", limited)
    monkeypatch.setattr(Model, "decode", limited_decode)


def test_a_run_with_auto_is_the_run_with_the_sizes_found(
    tiny_sd3_dir,
    tmp_path,
    little_memory,
    capsys,
):
    write_rewards(tmp_path)
    run = make_run(
        tiny_sd3_dir, tmp_path, tmp_path, **AUTO, output_dir=str(tmp_path / "auto"), certificate_images=0
    )
    sizes = run.trainer.method.sizes
    assert (sizes.rollout, sizes.reward) == (2, 1)
    assert run.trainer.method.terminal.options.batch_size == 1
    assert run.trainer.options.loss_micro_batch_size == 3
    assert "reward_micro_batch_size: auto found 1\n" in capsys.readouterr().out
    sizes = {"rollout_micro_batch_size": 2, "reward_micro_batch_size": 1, "loss_micro_batch_size": 3}
    explicit = make_run(tiny_sd3_dir, tmp_path, tmp_path, **sizes, certificate_images=0)
    assert run_losses(run, 2) == run_losses(explicit, 2)
