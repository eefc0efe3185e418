"""Made-up records of a benchmark, for its tests."""

import dataclasses

import numpy as np

from am_diffusers.evaluation.statistics import Estimate
from benching.images.curves import Curve, make_curve
from benching.images.records import Record, Reward, Snapshot, record_file, write_record
from benching.images.study import EvaluationOptions, Mark, Study
from benching.images.work import Work

OPTIONS = EvaluationOptions("prompts.txt", ["pickscore", "hpsv2"], 2, 2)
P = 8


def study(settings: dict[str, str], **changes: object) -> Study:
    """Settings by name with their methods."""
    marks = [Mark(seconds=10.0), Mark(seconds=20.0)]
    flags = {name: {"method": method} for name, method in settings.items()}
    made = Study("", marks, "20-s", [0, 1], "best", {"reward_scale": 2.0}, flags, OPTIONS)
    return dataclasses.replace(made, **changes)


def snapshot(mark: str, seconds: float, trained: float, held_out: float, calls: float = 0) -> Snapshot:
    def reward(role: str, gain: float) -> Reward:
        by_prompt = gain + np.linspace(-0.1, 0.1, P)
        return Reward(role, Estimate(gain, None, None), by_prompt.tolist())

    rewards = {"pickscore": reward("trained", trained), "hpsv2": reward("held-out", held_out)}
    kept = Estimate(1 - trained / 10, None, None)
    return Snapshot(mark, seconds, calls, int(seconds), rewards, kept, trained / 100)


def record(work: Work, setting: str, gains: tuple[float, float], seed: int = 0) -> Record:
    """A record whose trained and held-out gain grow linearly to `gains`."""
    trained, held_out = gains
    half = snapshot("10-s", 10, trained / 2, held_out / 2, calls=50)
    snapshots = [half, snapshot("20-s", 20, trained, held_out, calls=100)]
    method = str(work.study.flags(setting)["method"])
    return Record(setting, method, seed, work.declared(setting), {}, snapshots)


def made_up(work: Work, setting: str, seed: int) -> Record:
    """A record of any study: gains, seconds and calls grow evenly over its marks."""
    marks = work.study.marks
    snapshots = [
        snapshot(mark.name, 10.0 * place, place / len(marks), place / 10, calls=50 * place)
        for place, mark in enumerate(marks, start=1)
    ]
    method = str(work.study.flags(setting)["method"])
    return Record(setting, method, seed, work.declared(setting), {}, snapshots)


def put(work: Work, setting: str, gains: tuple[float, float], seed: int = 0) -> None:
    write_record(record(work, setting, gains, seed), record_file(work.data, setting, seed))


def curve(work: Work, setting: str, gains: tuple[float, float], seeds: int = 1) -> Curve:
    return make_curve([record(work, setting, gains, seed) for seed in range(seeds)])
