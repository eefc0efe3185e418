"""Made-up records of a benchmark, for its tests."""

import dataclasses

import numpy as np
import torch

from am_diffusers.evaluation.scores import save_scores
from am_diffusers.evaluation.statistics import Estimate
from am_diffusers.run.base_scores import CERTIFICATE
from benching.images.curves import Curve, make_curve
from benching.images.records import Chain, Judged, Record, Reward, Snapshot, record_file, write_record
from benching.images.study import CertificateOptions, EvaluationOptions, Mark, Study
from benching.images.work import Work

CHAIN = CertificateOptions(6, 4, 16, 2, 1.0)
OPTIONS = EvaluationOptions("prompts.txt", ["pickscore", "hpsv2"], 2, 2, CHAIN)
COMMON = {"reward_scale": 2.0, "rewards": [{"name": "pickscore", "mean": 20.0, "std": 2.0}]}
P = 8


def study(settings: dict[str, str], **changes: object) -> Study:
    """Settings by name with their methods."""
    marks = [Mark(seconds=10.0), Mark(seconds=20.0)]
    flags = {name: {"method": method} for name, method in settings.items()}
    made = Study("", marks, "20-s", [0, 1], "best", COMMON, flags, OPTIONS)
    return dataclasses.replace(made, **changes)


def snapshot(
    mark: str, seconds: float, trained: float, held_out: float, calls: float = 0, prompts: int = 4
) -> Snapshot:
    """Results at a mark, their chain of so many prompts."""

    def reward(role: str, gain: float) -> Reward:
        by_prompt = gain + np.linspace(-0.1, 0.1, P)
        return Reward(role, Estimate(gain, None, None), by_prompt.tolist())

    rewards = {"pickscore": reward("trained", trained), "hpsv2": reward("held-out", held_out)}
    kept = Estimate(1 - trained / 10, None, None)
    clean, base = np.linspace(0, 1, P), np.full(P, 0.5)
    return Snapshot(
        mark,
        seconds,
        calls,
        int(seconds),
        rewards,
        kept,
        trained / 100,
        judged=Judged(clean.tolist(), (0.9 * clean).tolist()),
        judged_base=Judged(base.tolist(), base.tolist()),
        chain=Chain((trained + np.linspace(-0.1, 0.1, prompts)).tolist(), [trained**2] * prompts),
    )


def put_base_scores(work: Work, images: int = 16) -> None:
    """Scores of base images of 4 prompts by the chain, normal with the mean and deviation of `COMMON`."""
    prompts = work.study.evaluation.certificate.num_prompts
    scores = torch.randn((prompts, images), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = 20 + 2 * (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    work.base_scores.mkdir(parents=True)
    save_scores(
        work.base_scores / CERTIFICATE, [f"prompt {p}" for p in range(prompts)], {"pickscore": scores}
    )


def record(work: Work, setting: str, gains: tuple[float, float], seed: int = 0) -> Record:
    """A record whose trained and held-out gain grow linearly to `gains`."""
    trained, held_out = gains
    half = snapshot("10-s", 10, trained / 2, held_out / 2, calls=50)
    snapshots = [half, snapshot("20-s", 20, trained, held_out, calls=100)]
    method = str(work.study.flags(setting)["method"])
    return Record(setting, method, seed, work.declared(setting), {}, snapshots)


def made_up(work: Work, setting: str, seed: int) -> Record:
    """A record of any study: gains, seconds and calls grow evenly over its marks."""
    marks, prompts = work.study.marks, work.study.evaluation.certificate.num_prompts
    snapshots = [
        snapshot(mark.name, 10.0 * place, place / len(marks), place / 10, 50 * place, prompts)
        for place, mark in enumerate(marks, start=1)
    ]
    method = str(work.study.flags(setting)["method"])
    return Record(setting, method, seed, work.declared(setting), {}, snapshots)


def put(work: Work, setting: str, gains: tuple[float, float], seed: int = 0) -> None:
    write_record(record(work, setting, gains, seed), record_file(work.data, setting, seed))


def curve(work: Work, setting: str, gains: tuple[float, float], seeds: int = 1) -> Curve:
    return make_curve([record(work, setting, gains, seed) for seed in range(seeds)])
