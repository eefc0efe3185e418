"""From records to training curves: each setting's path from the base, run by run and prompt by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from am_diffusers.evaluation.statistics import Array, Estimate, estimate
from benching.images.records import Judged, Record, Snapshot

Rows = NDArray[np.intp]
BASE = "base"
ROLES = ("trained", "held-out")


class Place(NamedTuple):
    """Point of a training curve, means over seeds and prompts.

    Attributes:
        trained: mean gain of the trained rewards, in base standard deviations.
        held_out: mean gain of the held-out rewards.
        seconds: CPU seconds of training.
        calls: transformer calls, counted per sample.
        iterations: optimizer steps.
        diversity: share of the base's diversity that is kept.
        frechet: squared Frechet distance to the base's images, less the floor.
    """

    trained: float
    held_out: float
    seconds: float
    calls: float
    iterations: float
    diversity: float
    frechet: float


@dataclass(frozen=True)
class Curve:
    """Training curve of one setting: S runs, M marks by time, the unchanged base first, P prompts.

    Attributes:
        setting: name of the setting.
        method: method of the setting.
        marks: names of the marks, `base` first.
        gains: gains of each reward, (S, M, P), in base standard deviations.
        roles: `trained` or `held-out` by reward.
        others: seconds, calls, iterations, diversity and Frechet distance, (5, S, M).
        judged: shares of clean images, and of clean and right ones, (2, S, M, P).
        chain: gain and path KL by the chain of the certificate, (2, S, M, its prompts).
    """

    setting: str
    method: str
    marks: Sequence[str]
    gains: Mapping[str, Array]
    roles: Mapping[str, str]
    others: Array
    judged: Array
    chain: Array

    @property
    def seeds(self) -> int:
        """Number of runs."""
        return self.others.shape[1]

    def by_prompt(self, role: str) -> Array:
        """Return the mean gain of the rewards of a role, (S, M, P); NaN if there are none."""
        gains = [gain for name, gain in self.gains.items() if self.roles[name] == role]
        return np.mean(gains, axis=0) if gains else np.full_like(next(iter(self.gains.values())), np.nan)

    def places(self, seeds: Rows | None = None, prompts: Rows | None = None) -> Array:
        """Return the fields of `Place` at the marks, (7, M), for some or all runs and prompts."""
        seeds = np.arange(self.seeds) if seeds is None else seeds
        roles = [self.by_prompt(role)[seeds] for role in ROLES]
        chosen = roles if prompts is None else [role[..., prompts] for role in roles]
        gains = np.stack([role.mean(axis=(0, 2)) for role in chosen])
        return np.concatenate([gains, self.others[:, seeds].mean(axis=1)])

    def at(self, mark: str) -> Place:
        """Return the place of a mark."""
        return Place(*self.places()[:, self.marks.index(mark)].tolist())


def make_curve(records: Sequence[Record]) -> Curve:
    """Make the curve of one setting's runs.

    Args:
        records: one per seed, at least one, with the same marks.
    """
    first = records[0]
    snapshots = sorted(first.snapshots, key=lambda snapshot: snapshot.seconds)
    marks = [snapshot.mark for snapshot in snapshots]
    runs = [[record.at(mark) for mark in marks] for record in records]
    gains = {
        name: np.array([[each.rewards[name].by_prompt for each in run] for run in runs])
        for name in snapshots[0].rewards
    }
    base = (0, 0, 0, 1, 0.0)
    judged = [[_judged(run[0].judged_base), *(_judged(each.judged) for each in run)] for run in runs]
    chain = np.array([[(each.chain.gain, each.chain.path_kl) for each in run] for run in runs])
    others = np.array([[base, *map(_others, run)] for run in runs]).transpose(2, 0, 1)
    return Curve(
        setting=first.setting,
        method=first.method,
        marks=[BASE, *marks],
        gains={name: np.concatenate([0 * gain[:, :1], gain], axis=1) for name, gain in gains.items()},
        roles={name: reward.role for name, reward in snapshots[0].rewards.items()},
        others=others,
        judged=np.array(judged).transpose(2, 0, 1, 3),
        chain=np.concatenate([0 * chain[:, :1], chain], axis=1).transpose(2, 0, 1, 3),
    )


def _judged(judged: Judged) -> tuple[list[float], list[float]]:
    return judged.clean, judged.right


def _others(snapshot: Snapshot) -> tuple[float, ...]:
    spent = (snapshot.seconds, snapshot.calls, snapshot.iterations)
    return *spent, snapshot.diversity_kept.value, snapshot.frechet


def gain_of(curve: Curve, reward: str, mark: str) -> Estimate:
    """Return the gain of one reward at a mark, mean over runs, its interval over prompts."""
    return estimate(np.mean, curve.gains[reward][:, curve.marks.index(mark)].mean(axis=0))


def clean_share(curve: Curve, mark: str) -> Estimate:
    """Return the share of images that are clean at a mark, its interval over prompts."""
    clean, _ = _judged_at(curve, mark)
    return estimate(np.mean, clean, span=(0, 1))


def right_share(curve: Curve, mark: str) -> Estimate | None:
    """Return the share of right ones among clean images at a mark; None if none is clean."""
    clean, right = _judged_at(curve, mark)
    if not clean.any():
        return None
    return estimate(lambda c, r, axis: r.sum(axis) / c.sum(axis), clean, right, span=(0, 1))


def _judged_at(curve: Curve, mark: str) -> Array:
    """Return the shares of each prompt, means over runs, (2, P)."""
    return curve.judged[:, :, curve.marks.index(mark)].mean(axis=1)


def where(places: Array, level: float) -> Place | None:
    """Find where the trained gain first is `level` > 0, linearly between two marks; None if nowhere.

    Args:
        places: points of the curve, see `Curve.places`.
        level: gain in base standard deviations.
    """
    trained = places[0]
    crossed = np.flatnonzero((trained[:-1] < level) & (level <= trained[1:]))
    if not len(crossed):
        return None
    before = crossed[0]
    share = (level - trained[before]) / (trained[before + 1] - trained[before])
    return Place(*(places[:, before] + share * (places[:, before + 1] - places[:, before])).tolist())
