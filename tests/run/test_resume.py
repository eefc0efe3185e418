"""Runs that stop anywhere and go on as if they had not; the method is a toy with a state of its own."""

import dataclasses
import math
import resource
import signal

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from am_diffusers.matching import MatchingBatch, matching_loss
from am_diffusers.methods.base import Collected, Method
from am_diffusers.run.folder import lock_folder
from am_diffusers.run.resume import find_checkpoint
from am_diffusers.system.processes import Processes
from am_diffusers.system.signals import Interrupted, StopSignal
from am_diffusers.training.checkpoint import Saver, changes
from am_diffusers.training.checkpoint_folder import CheckpointError, Checkpoints, DiskFullError
from am_diffusers.training.metrics import MetricsLog
from am_diffusers.training.state import TrainState
from am_diffusers.training.trainer import Hooks, IterationError, Trainer, TrainOptions
from am_diffusers.velocity import CallableField, Conditioning
from finetune_runs import read_metrics

LENGTH = 12


class Buffered(Method):
    """Regression on the mean of the last three iterations' targets: a fake replay buffer."""

    needs_reward_gradient = False

    @classmethod
    def law(cls, shared, own):
        return ""

    def __init__(self, weight):
        self.policy = CallableField(lambda x, sigma, cond: x * weight)
        self.buffer: list[torch.Tensor] = []
        self.count = 0
        self.trouble = lambda method, place: None

    def collect(self, cond, generators, shared):
        self.trouble(self, "collect")
        latents = torch.stack([torch.randn(3, generator=g) for g in generators])
        self.buffer = [*self.buffer, latents.roll(1, 1)][-3:]
        self.count += 1
        target = torch.stack(self.buffer).mean(0)
        rows = torch.ones(len(cond)) / len(cond)
        batch = MatchingBatch(latents, rows * 2, target, rows, torch.arange(len(cond)), cond)
        return Collected(batch, rows, {"reward": target.mean().item()})

    def loss(self, example):
        self.trouble(self, "loss")
        return matching_loss(self.policy, example), {}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def local_state_dict(self):
        return {"buffer": list(self.buffer)}

    def load_local_state_dicts(self, states, share):
        (state,) = states
        self.buffer = list(state["buffer"])


def make_trainer(folder, *, wanted="latest", validate=lambda iteration: {}, use_ema=True, **changes):
    """A trainer as `build` puts it together: restored from the newest checkpoint in `folder`."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3))
    method, stop = Buffered(weight), StopSignal()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1 / (1 + iteration))
    state = TrainState({"w": weight}, optimizer, schedule, EMAModel([weight], 0.9) if use_ema else None)
    processes = Processes(Accelerator(cpu=True), stop)
    checkpoints = Checkpoints(folder, total_limit=2)
    saver = Saver(checkpoints, processes, state, method, {}, lambda folder: None)
    found = find_checkpoint(checkpoints, wanted, processes)
    if found is not None:
        saver.restore(found)
    sizes = {"seed": 7, "train_batch_size": 4, "max_train_steps": LENGTH, "loss_micro_batch_size": 2}
    intervals = {"max_grad_norm": 1e9, "validation_steps": 4, "checkpointing_steps": 3}
    return Trainer(
        method,
        state,
        TrainOptions(**{**sizes, **intervals, **changes}),
        prompts=["a", "b", "c"],
        hooks=Hooks(lambda prompts: Conditioning(tuple(prompts)), validate, saver.save),
        processes=processes,
        log=MetricsLog(folder / "metrics.jsonl", total=LENGTH, start=state.iteration),
    )


def everything(trainer):
    """The whole state, with what a comparison needs."""
    state = trainer.state.state_dict()
    return [
        *state["parameters"].values(),
        *state["optimizer"]["state"][0].values(),
        *state["ema"]["shadow_params"],
        *trainer.method.buffer,
    ], [trainer.method.count, state["progress"], state["lr_schedule"]["last_epoch"]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("whole"), []
    trainer = make_trainer(folder, validate=lambda iteration: seen.append(iteration) or {})
    trainer.train()
    assert seen == [0, 4, 8, 12]
    return everything(trainer), read_metrics(folder)


def assert_as_uninterrupted(trainer, folder, uninterrupted):
    (tensors, numbers), lines = uninterrupted
    own_tensors, own_numbers = everything(trainer)
    assert all(torch.equal(a, b) for a, b in zip(own_tensors, tensors, strict=True))
    assert own_numbers == numbers
    own_lines = read_metrics(folder)
    for line in [*own_lines, *lines]:
        line.pop("seconds", None)
    assert own_lines == lines


class Killed(BaseException):
    """Like a SIGKILL: nothing in the trainer catches it."""


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6, 7, 11, 12])
@pytest.mark.parametrize("place", ["collect", "loss"])
def test_killed_at_any_moment_it_ends_bit_identical(tmp_path, uninterrupted, at, place):
    trainer = make_trainer(tmp_path)

    def kill(method, where):
        if method.count == at - (place == "collect") and where == place:
            raise Killed

    trainer.method.trouble = kill
    with pytest.raises(Killed):
        trainer.train()
    again = make_trainer(tmp_path)
    assert again.state.iteration == (at - 1) // 3 * 3
    again.train()
    assert_as_uninterrupted(again, tmp_path, uninterrupted)


@pytest.mark.parametrize("at", [1, 4, 12])
@pytest.mark.parametrize("place", ["collect", "loss"])
def test_a_signal_loses_nothing_but_the_running_iteration(tmp_path, uninterrupted, at, place):
    trainer = make_trainer(tmp_path)

    def stop(method, where):
        if method.count == at - (place == "collect") and where == place:
            trainer.processes.stop.number = signal.SIGTERM
        trainer.processes.poll()

    trainer.method.trouble = stop
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer.state.iteration == at - 1
    again = make_trainer(tmp_path)
    assert again.state.iteration == at - 1
    again.train()
    assert_as_uninterrupted(again, tmp_path, uninterrupted)


def test_a_signal_while_saving_waits_for_the_checkpoint(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path)
    saver = trainer.hooks.save.__self__  # pyright: ignore[reportFunctionMemberAccess]

    def save_lora(folder):
        trainer.processes.stop.number = signal.SIGTERM
        trainer.processes.poll()

    object.__setattr__(saver, "save_lora", save_lora)
    with pytest.raises(Interrupted):
        trainer.train()
    again = make_trainer(tmp_path)
    assert again.state.iteration == trainer.state.iteration == 3
    again.train()
    assert_as_uninterrupted(again, tmp_path, uninterrupted)


def test_a_signal_while_validating_validates_again(tmp_path, uninterrupted):
    seen = []

    def validate(iteration):
        seen.append(iteration)
        if seen == [0, 4]:
            trainer.processes.stop.number = signal.SIGTERM
            trainer.processes.poll()
        return {}

    trainer = make_trainer(tmp_path, validate=validate)
    with pytest.raises(Interrupted):
        trainer.train()
    again = make_trainer(tmp_path, validate=validate)
    again.train()
    assert seen == [0, 4, 4, 8, 12]
    assert_as_uninterrupted(again, tmp_path, uninterrupted)


def test_a_finished_run_does_nothing_more(tmp_path, uninterrupted):
    make_trainer(tmp_path).train()
    seen = []
    again = make_trainer(tmp_path, validate=lambda iteration: seen.append(iteration) or {})
    again.train()
    assert seen == []
    assert_as_uninterrupted(again, tmp_path, uninterrupted)


def test_not_finite_iterations_are_skipped_and_counted_up_to_a_limit(tmp_path):
    trainer = make_trainer(tmp_path, max_skipped_iterations=2)
    nans = iter([False, False, True, True, False, True, True, True])
    good = trainer.method.loss
    trainer.method.loss = lambda example: (good(example)[0] * (math.nan if next(nans) else 1), {})
    trainer.options = dataclasses.replace(trainer.options, loss_micro_batch_size=4)
    with pytest.raises(IterationError, match="iteration 7: loss is nan"):
        trainer.train()
    assert [line.get("skipped") for line in read_metrics(tmp_path)] == [None, None, 1, 2, None, 3, 4]
    assert (trainer.method.count, len(trainer.method.buffer)) == (3, 3), "as after the last good iteration"
    assert make_trainer(tmp_path).state.progress == trainer.state.progress, "saved before it stopped"


def test_a_log_that_fails_does_not_make_a_step_count_twice(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path)
    write = trainer.log.write

    def full(iteration, metrics):
        if iteration == 4:
            raise OSError("No space left on device")
        write(iteration, metrics)

    trainer.log.write = full
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    again = make_trainer(tmp_path)
    assert again.state.iteration == again.method.count == 5
    again.train()
    assert all(torch.equal(a, b) for a, b in zip(everything(again)[0], uninterrupted[0][0], strict=True))


def test_changed_rates_and_decays_are_those_of_the_run_that_goes_on(tmp_path):
    make_trainer(tmp_path, max_train_steps=3).train()
    changed = make_trainer(tmp_path, wanted="latest")
    state, saved = changed.state, make_trainer(tmp_path).state.state_dict()
    state.optimizer.param_groups[0].update(lr=7.0, initial_lr=0.5, betas=(0.5, 0.6), weight_decay=0.25)
    state.lr_schedule.base_lrs = [0.5]
    state.ema.decay = 0.5
    state.load_state_dict(saved)
    (group,) = state.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5 / 4, (0.5, 0.6), 0.25)
    assert state.lr_schedule.get_last_lr() == [0.5 / 4]
    assert (state.ema.decay, state.ema.optimization_step) == (0.5, 3)


def test_a_failure_leaves_a_checkpoint_of_the_last_finished_iteration(tmp_path):
    trainer = make_trainer(tmp_path)

    def fail(method, where):
        if method.count == 5 and where == "loss":
            raise RuntimeError("the VAE broke")

    trainer.method.trouble = fail
    with pytest.raises(RuntimeError, match="the VAE broke"):
        trainer.train()
    assert make_trainer(tmp_path).state.iteration == trainer.state.iteration == 4


def test_early_stopping_counts_validations_over_restarts(tmp_path):
    scores = {0: 1.0, 4: 2.0, 8: 1.5, 12: 1.9, 16: 1.0}
    changes = {"early_stopping_patience": 2, "early_stopping_metric": "score", "max_train_steps": 20}

    def validate(iteration):
        return {"score": scores[iteration]}

    trainer = make_trainer(tmp_path, validate=validate, **changes)
    trainer.method.trouble = lambda method, where: signal_at(trainer, 10)
    with pytest.raises(Interrupted):
        trainer.train()
    again = make_trainer(tmp_path, validate=validate, **changes)
    again.train()
    assert (again.state.iteration, again.state.progress.best_score) == (12, 2.0)
    assert again.state.progress.worse_validations == 2


def signal_at(trainer, iteration):
    if trainer.state.iteration == iteration:
        trainer.processes.stop.number = signal.SIGTERM
        trainer.processes.poll()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_full_disk_stops_or_skips_the_checkpoint(tmp_path, monkeypatch, caplog, policy):
    trainer = make_trainer(tmp_path)
    saver = trainer.hooks.save.__self__  # pyright: ignore[reportFunctionMemberAccess]
    object.__setattr__(saver, "on_full_disk", policy)

    def begin(self, iteration, expected):
        if iteration == 6:
            raise DiskFullError("no room")
        return original(self, iteration, expected)

    original = Checkpoints.begin
    monkeypatch.setattr(Checkpoints, "begin", begin)
    if policy == "stop":
        with pytest.raises(DiskFullError, match="no room"):
            trainer.train()
        assert make_trainer(tmp_path).state.iteration == 3
    else:
        trainer.train()
        assert "no checkpoint after iteration 6: no room" in caplog.text
        assert make_trainer(tmp_path).state.iteration == LENGTH


def test_a_write_that_fails_half_way_leaves_the_last_checkpoint(tmp_path):
    """The system's own refusal, in the middle of a safetensors file: a limit on the size of files."""
    trainer = make_trainer(tmp_path, max_train_steps=3)
    trainer.train()
    again = make_trainer(tmp_path)
    again.method.state_dict = lambda: {"buffer": [torch.zeros(1_000_000)], "count": 3}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"cannot write a checkpoint .*File too large"):
            again.hooks.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000003", "metrics.jsonl"]
    assert make_trainer(tmp_path).state.iteration == 3


def test_an_explicit_checkpoint_that_is_not_sound_or_not_the_newest_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        make_trainer(tmp_path, wanted=str(tmp_path / "nowhere"))
    older, newest = tmp_path / "checkpoint-000009", tmp_path / "checkpoint-000012"
    with pytest.raises(CheckpointError, match=r"newer checkpoints \(checkpoint-000012\)"):
        make_trainer(tmp_path, wanted=str(older))
    (newest / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-000012/state\.json has 2 bytes"):
        make_trainer(tmp_path, wanted=str(newest))
    assert make_trainer(tmp_path).state.iteration == 9
    (older / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="there are checkpoints and none is sound"):
        make_trainer(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_whole(tmp_path):
    make_trainer(tmp_path, max_train_steps=3).train()
    with pytest.raises(CheckpointError, match="use_ema must be as it was"):
        make_trainer(tmp_path, use_ema=False)
    state = TrainState({"v": torch.nn.Parameter(torch.ones(2))}, *[None] * 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the checkpoint's v has shape None, this run's \(2,\)"):
        state.load_state_dict(make_trainer(tmp_path).state.state_dict())


def test_ema_weights_are_there_inside_and_gone_outside(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    state = trainer.state
    assert state.ema is not None
    before = state.parameters["w"].detach().clone()
    with state.ema_weights():
        assert torch.equal(state.parameters["w"], state.ema.shadow_params[0])
        assert not torch.equal(state.parameters["w"], before)
    assert torch.equal(state.parameters["w"], before)


def test_changes_are_listed():
    assert changes({"a": 1, "b": [1], "c": None}, {"a": 2, "b": [1], "d": "x"}) == {
        "a": "1 -> 2",
        "d": 'null -> "x"',
    }


def test_two_runs_can_not_share_a_folder(tmp_path):
    lock = lock_folder(tmp_path)
    with pytest.raises(ValueError, match=r"in use by another run \(process \d+ on "):
        lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()


def test_metrics_of_iterations_that_come_again_and_torn_lines_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 0, "a": 1}\n{"iteration": 1}\n{"iteration": 2}\n{"iterat')
    log = MetricsLog(file, total=4, start=2)
    log.write(2, {"a": 3.0})
    log.close()
    assert read_metrics(tmp_path) == [{"iteration": 0, "a": 1}, {"iteration": 1}, {"iteration": 2, "a": 3.0}]
