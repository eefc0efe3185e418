"""Costs of the gains in the report: diversity, path KL, change, and images as sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from am_diffusers.evaluation.statistics import Estimate
from evaluating.report.cost_figures import Plane, Point, gain_against_diversity, gain_against_path_kl
from evaluating.report.findings import Finding
from evaluating.summary.frechet import FrechetFromBase
from evaluating.summary.summary import Summary
from evaluating.summary.tilt import TiltComparison


class Cost(NamedTuple):
    """A column of the table of what the gains cost.

    Attributes:
        kind: diversity, path_kl or change.
        title: title of the column.
        estimates: one per finding; None = not measured.
    """

    kind: str
    title: str
    estimates: list[Estimate | None]


@dataclass(frozen=True)
class SetDistance:
    """A row of the table of Frechet distances.

    Attributes:
        label: label of the candidate.
        number: number of the finding; None for a base.
        from_base: distances by name of the features; empty for a base.
        to_reference: distances by name of the features; empty without reference images.
    """

    label: str
    number: int | None
    from_base: Mapping[str, FrechetFromBase]
    to_reference: Mapping[str, float]


def find_costs(findings: Sequence[Finding]) -> list[Cost]:
    """Return the costs that were measured beside the rewards."""
    found = [finding.against for finding in findings]
    features = dict.fromkeys(name for against in found for name in against.diversity_kept)
    columns = [
        Cost("diversity", f"Diversity kept ({name})", [against.diversity_kept.get(name) for against in found])
        for name in features
    ]
    columns.append(Cost("path_kl", "Path KL in nats", [against.path_kl for against in found]))
    columns.append(Cost("change", "Change (LPIPS)", [against.change for against in found]))
    return [column for column in columns if any(column.estimates)]


def set_distances(
    summary: Summary, findings: Sequence[Finding], labels: Mapping[str, str]
) -> list[SetDistance]:
    """Return the Frechet distances of the candidates; bases have them from reference images only."""
    numbers = {finding.candidate.key: finding.number for finding in findings}
    rows = [
        SetDistance(
            labels[candidate.key],
            numbers.get(candidate.key),
            candidate.against_base.frechet if candidate.against_base else {},
            candidate.reference,
        )
        for candidate in summary.candidates
    ]
    return [row for row in rows if row.from_base or row.to_reference]


def trade_offs(
    findings: Sequence[Finding], costs: Sequence[Cost], labels: Mapping[str, str]
) -> dict[str, list[list[Markup]]]:
    """Draw gain against what it cost, by the cost's title: a row per base, a figure per reward.

    Gains, diversity kept and path KL are relative to a base: candidates with other steps or guidance have
    another base, and so a plot of their own.
    """
    planes = {labels[base]: found for base, found in find_planes(findings).items()}

    def path_kl(reward: str, base: str, points: Sequence[Point]) -> str:
        return gain_against_path_kl(reward, base, points, planes.get(base, ()))

    draw = {"diversity": gain_against_diversity, "path_kl": path_kl}
    groups = {c.title: _charts(findings, c.estimates, labels, draw[c.kind]) for c in costs if c.kind in draw}
    return {title: group for title, group in groups.items() if group}


def find_planes(findings: Sequence[Finding]) -> dict[str, list[Plane]]:
    """Return by base what it offers: one plane for all candidates that aim at tilts by the same reward."""
    found: dict[str, list[Plane]] = {}
    for finding in findings:
        tilt = finding.against.tilt
        if tilt is None:
            continue
        planes = found.setdefault(finding.against.base, [])
        plane = Plane([finding.candidate.name], tilt.frontier, tilt.best_of_n, _aims(tilt))
        alike = [place for place, known in enumerate(planes) if known.curves == plane.curves]
        for place in alike:
            planes[place] = planes[place].joined(plane)
        if not alike:
            planes.append(plane)
    return found


def _aims(tilt: TiltComparison) -> list[tuple[float, dict[str, float]]]:
    """Return the tilt that a run aimed at, where it is told, in a list."""
    gains = {name: each.value for name, each in tilt.predicted.items()}
    return [(tilt.predicted_kl.value, gains)] if tilt.predicted_kl else []


def _charts(
    findings: Sequence[Finding],
    costs: Sequence[Estimate | None],
    labels: Mapping[str, str],
    draw: Callable[[str, str, Sequence[Point]], str],
) -> list[list[Markup]]:
    """Draw the candidates whose cost is known; rising LoRA scales are joined."""
    bases: dict[str, dict[str, list[Point]]] = {}
    known = zip(findings, costs, strict=True)
    for finding, cost in sorted(known, key=lambda each: each[0].candidate.lora_scale):
        if cost is None:
            continue
        rewards = bases.setdefault(finding.against.base, {})
        for reward, gain in finding.gains.items():
            number = finding.number if len(findings) > 1 else None
            point = Point(number, finding.candidate.name, cost, gain)
            rewards.setdefault(reward, []).append(point)
    return [
        [Markup(draw(reward, labels[base], found)) for reward, found in rewards.items()]
        for base, rewards in bases.items()
        if rewards
    ]
