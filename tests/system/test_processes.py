"""Stopping and failing together."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from am_diffusers.rewards import Brightness, RewardScale, WeightedRewards
from am_diffusers.run.training import raw_rewards
from am_diffusers.system.failures import NonFiniteError
from am_diffusers.system.processes import PeerError, PeerNotFiniteError, Processes, is_secondhand
from am_diffusers.system.signals import Interrupted, StopSignal
from am_diffusers.training.checkpoint import Saver
from am_diffusers.training.checkpoint_folder import CheckpointError, DiskFullError


class Hub:
    """Two processes as two threads; a gather that nobody answers is an error after 5 s."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=5)
        self.values: list = [None, None]

    def processes(self, index):
        def gather(values):
            self.values[index] = values
            self.barrier.wait()
            both = torch.cat(self.values)
            self.barrier.wait()
            return both

        accelerator = SimpleNamespace(
            num_processes=2,
            process_index=index,
            is_main_process=index == 0,
            device=torch.device("cpu"),
            gather=gather,
            reduce=lambda values, how: gather(values[None]).sum(0),
        )
        processes = Processes(accelerator)
        processes._gather_numbers = gather  # threads have no group of torch's
        return processes


def run_both(work):
    """`work(processes)` on two processes; what each returned or raised."""
    hub, results = Hub(), [None, None]

    def run(index):
        try:
            results[index] = work(hub.processes(index))
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.barrier.n_waiting == 0
    assert not hub.barrier.broken
    return results


def test_gather_and_sum_over_processes():
    def work(processes):
        with processes.together():
            values = torch.tensor([processes.index + 1.0])
            return processes.gather(values).tolist(), processes.sum(values).tolist()

    assert run_both(work) == [([1.0, 2.0], [3.0])] * 2


FAILURES = {
    "early": lambda processes: None,
    "between": lambda processes: processes.sum(torch.ones(1)),
    "late": lambda processes: [processes.gather(torch.ones(1)) for _ in range(3)],
}


@pytest.mark.parametrize("before", FAILURES)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("error", "others"),
    [
        (NonFiniteError("nan"), PeerNotFiniteError),
        (ValueError("bad"), PeerError),
        (Interrupted(15), Interrupted),
    ],
)
def test_what_one_process_raises_all_leave_with(before, index, error, others):
    def work(processes):
        with processes.together():
            FAILURES[before](processes)
            if processes.index == index:
                raise error
            for _ in range(2):
                processes.sum(torch.ones(1))
        return "finished"

    results = run_both(work)
    assert results[index] is error
    assert type(results[1 - index]) is others


@pytest.mark.parametrize("index", [0, 1])
def test_a_failure_in_a_block_within_another_ends_both_blocks(index):
    def work(processes):
        with processes.together():
            with processes.together():
                if processes.index == index:
                    raise ArithmeticError("bad")
            processes.sum(torch.ones(1))

    results = run_both(work)
    assert type(results[index]) is ArithmeticError
    assert type(results[1 - index]) is PeerError
    assert str(results[1 - index]) == "another process failed with ArithmeticError: see its message"


def test_a_failure_while_all_leave_because_of_another_is_everybodys_too():
    """As when a run fails and its last checkpoint can't be written either."""

    def work(processes):
        try:
            with processes.together():
                if processes.index:
                    raise ArithmeticError("bad")
        except ValueError as error:
            processes.on_main(lambda: 1 / 0)
            raise error
        except ArithmeticError:
            processes.on_main(lambda: None)

    main, other = run_both(work)
    assert isinstance(main, ZeroDivisionError)
    assert isinstance(other, PeerError)


def test_failing_counts_more_than_being_stopped():
    def work(processes):
        with processes.together():
            raise (ValueError("bad") if processes.index else Interrupted(15))

    stopped, failed = run_both(work)
    assert isinstance(stopped, PeerError)
    assert str(failed) == "bad"


def test_a_signal_to_one_process_stops_both_at_the_next_exchange():
    def work(processes):
        if processes.index:
            processes.stop.number = signal.SIGUSR1
        with processes.together():
            processes.sum(torch.ones(1))
        return "finished"

    results = run_both(work)
    assert [type(result) for result in results] == [Interrupted, Interrupted]
    assert results[1].number == signal.SIGUSR1


def test_unstoppable_work_is_finished_and_main_alone_does_it():
    done = []

    def work(processes):
        processes.stop.number = signal.SIGTERM
        processes.on_main(lambda: (processes.poll(), done.append(processes.index)))
        with pytest.raises(Interrupted):
            processes.poll()
        return "finished"

    assert run_both(work) == ["finished"] * 2
    assert done == [0]


class FullDisk:
    """Stands for what a Saver saves; `begin` finds no room."""

    iteration, parameters = 3, {}
    state_dict = staticmethod(lambda: {"parameters": {}})

    local_state_dict = clean = staticmethod(dict)

    def begin(self, iteration, expected):
        raise DiskFullError("no room")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_full_disk_is_met_by_all_processes_alike(policy):
    def work(processes):
        saver = Saver(FullDisk(), processes, FullDisk(), FullDisk(), {}, lambda folder: None, policy)
        saver.save()
        processes.agree()
        return "went on"

    main, other = run_both(work)
    if policy == "skip":
        assert main == other == "went on"
    else:
        assert isinstance(main, DiskFullError)
        assert type(other) is CheckpointError
        assert is_secondhand(other)
        assert not is_secondhand(main)


def test_a_failure_on_main_is_everybodys():
    def work(processes):
        processes.on_main(lambda: 1 / 0)

    main, other = run_both(work)
    assert isinstance(main, ZeroDivisionError)
    assert isinstance(other, PeerError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_noted_and_handlers_come_back(number):
    stop, before = StopSignal(), signal.getsignal(number)
    processes = Processes(Accelerator(cpu=True), stop)
    with stop.listening():
        processes.poll()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # handed on by a launcher
        with pytest.raises(Interrupted, match=signal.Signals(number).name):
            processes.poll()
    assert signal.getsignal(number) == before


def test_an_impatient_person_is_obeyed():
    stop = StopSignal(patience=0.01)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGTERM


def test_numbers_are_summed_by_name():
    numbers = [{"loss": 1.5, "clipped": 0.25}, {"loss": -4.0, "clipped": 0.5}]
    assert (
        run_both(lambda processes: processes.sum_numbers(numbers[processes.index]))
        == [{"loss": -2.5, "clipped": 0.75}] * 2
    )


def test_an_iteration_without_pictures_logs_no_rewards():
    """Methods that train several times on the same pictures score them once."""
    reward = WeightedRewards([Brightness()], [RewardScale()])
    assert run_both(lambda processes: raw_rewards(reward, processes)) == [{}, {}]
