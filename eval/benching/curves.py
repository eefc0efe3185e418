"""From records to what is compared: the way of a setting, and its points of equal trained reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from am_diffusers.comparison import Estimate, estimate
from am_diffusers.evaluation import Array
from benching.records import Record, Snapshot


@dataclass(frozen=True)
class Point:
    """A place on the way, means over seeds.

    Attributes:
        mark: its name; "" between two marks.
        seconds: of training.
        calls: of the transformer, a sample each.
        iterations: optimizer steps.
        gains: of each reward by prompt, (P,), in base standard deviations.
        roles: `trained` or `held-out` by reward.
        diversity: share of the base's that is kept.
        frechet: squared Frechet distance to the base's pictures, less the floor.
    """

    mark: str
    seconds: float
    calls: float
    iterations: float
    gains: Mapping[str, Array]
    roles: Mapping[str, str]
    diversity: float
    frechet: float

    def by_prompt(self, role: str) -> Array:
        """Mean gain of the rewards of a role by prompt, (P,)."""
        return np.mean([gain for name, gain in self.gains.items() if self.roles[name] == role], axis=0)

    def gain(self, role: str) -> float:
        """Mean gain of the rewards of a role."""
        return float(self.by_prompt(role).mean())


@dataclass(frozen=True)
class Curve:
    """The way of a setting.

    Attributes:
        setting: its name.
        method: of the setting.
        seeds: how many runs it is the mean of.
        points: by time, the unchanged base first.
        spread: by mark, least and largest trained gain of the seeds.
    """

    setting: str
    method: str
    seeds: int
    points: Sequence[Point]
    spread: Mapping[str, tuple[float, float]]

    def at(self, mark: str) -> Point:
        """The point of a mark."""
        return next(point for point in self.points if point.mark == mark)

    @property
    def best(self) -> float:
        """Largest trained gain of its marks."""
        return max(point.gain("trained") for point in self.points)

    def where(self, level: float) -> Point | None:
        """Where the trained gain first is `level` > 0, between two marks linearly; None if nowhere."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            start, end = before.gain("trained"), after.gain("trained")
            if start < level <= end:
                return _between(before, after, (level - start) / (end - start))
        return None


def make_curve(records: Sequence[Record]) -> Curve:
    """The mean over the runs of one setting.

    Args:
        records: one a seed, at least one.
    """
    marks = [snapshot.mark for snapshot in records[0].snapshots]
    points = [_mean([record.at(mark) for record in records]) for mark in marks]
    points.sort(key=lambda point: point.seconds)
    spread = {
        mark: (min(trained), max(trained))
        for mark in marks
        if (trained := [record.at(mark).gain("trained") for record in records])
    }
    first = records[0]
    return Curve(first.setting, first.method, len(records), [_start(points[0]), *points], spread)


def difference(first: Point, second: Point, role: str) -> Estimate:
    """Mean gain of the rewards of a role at `first` less that at `second`, its interval over prompts."""
    return estimate(np.mean, first.by_prompt(role) - second.by_prompt(role))


def _mean(snapshots: Sequence[Snapshot]) -> Point:
    first = snapshots[0]
    return Point(
        mark=first.mark,
        seconds=_average([each.seconds for each in snapshots]),
        calls=_average([each.calls for each in snapshots]),
        iterations=_average([each.iterations for each in snapshots]),
        gains={
            name: np.mean([each.rewards[name].by_prompt for each in snapshots], axis=0)
            for name in first.rewards
        },
        roles={name: reward.role for name, reward in first.rewards.items()},
        diversity=_average([each.diversity_kept.value for each in snapshots]),
        frechet=_average([each.frechet for each in snapshots]),
    )


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _start(like: Point) -> Point:
    """The base itself."""
    none = {name: np.zeros_like(gain) for name, gain in like.gains.items()}
    return Point("base", 0, 0, 0, none, like.roles, 1, 0)


def _between(before: Point, after: Point, share: float) -> Point:
    def mix(a: float, b: float) -> float:
        return a + share * (b - a)

    return Point(
        mark="",
        seconds=mix(before.seconds, after.seconds),
        calls=mix(before.calls, after.calls),
        iterations=mix(before.iterations, after.iterations),
        gains={name: gain + share * (after.gains[name] - gain) for name, gain in before.gains.items()},
        roles=before.roles,
        diversity=mix(before.diversity, after.diversity),
        frechet=mix(before.frechet, after.frechet),
    )
