"""What the report's template shows: tables, figures, largest changes, and the numbers its script works on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evaluating import figures
from evaluating.figures import Point
from evaluating.findings import CategoryFinding, Finding, candidate_labels
from evaluating.report_pictures import Embedded, gain_order
from evaluating.results import Results
from markupsafe import Markup

from am_diffusers.evaluation import Array, Interval

EXTREMES = 4
MAX_CATEGORIES = 30
DIGITS = 6
# Settings that a reader looks for first, in words; the others stand below them.
WORDS = {
    "pretrained_model_name_or_path": "base model",
    "sampler": "sampler",
    "seed": "seed",
    "resolution": "resolution",
}


class Pair(NamedTuple):
    """A base and a tuned picture from the same noise, with their scores by one reward."""

    prompt: int
    image: int
    base: float
    tuned: float


def report_context(
    results: Results, findings: Sequence[Finding], embedded: Mapping[int, Embedded]
) -> dict[str, Any]:
    """Variables of report.html.jinja.

    Args:
        results: of the evaluation.
        findings: of its tuned candidates, in their order.
        embedded: pictures by prompt and candidate key.
    """
    rewards = list(dict.fromkeys(reward.reward for finding in findings for reward in finding.rewards))
    columns = list(results.prompts.categories.values())
    return {
        "results": results,
        "num_images": next(iter(results.scores[results.tuned[0].key].values())).shape[1],
        "findings": findings,
        "rewards": rewards,
        "labels": candidate_labels(results.candidates),
        "settings": {WORDS.get(name, name): results.settings[name] for name in _settings_order(results)},
        "reach": max(max(-r.gain.low, r.gain.high, 0.1) for f in findings for r in f.rewards),
        "charts": [_charts(results, finding) for finding in findings],
        "trade_offs": _trade_offs(findings),
        "extremes": [_extremes(results, finding) for finding in findings],
        "max_categories": MAX_CATEGORIES,
        "largest": largest,
        "prompt_categories": list(zip(*columns, strict=True)) if columns else [()] * len(results.prompts),
        "pictures": embedded,
        "data": _data(results, rewards),
    }


def largest(categories: Sequence[CategoryFinding]) -> list[CategoryFinding]:
    """Up to `MAX_CATEGORIES` with the most prompts, in their own order."""
    kept = sorted(categories, key=lambda category: -category.num_prompts)[:MAX_CATEGORIES]
    return [category for category in categories if category in kept]


def _settings_order(results: Results) -> list[str]:
    first = [name for name in WORDS if name in results.settings]
    return [*first, *(name for name in results.settings if name not in first)]


def _data(results: Results, rewards: Sequence[str]) -> dict[str, Any]:
    """What the page's script needs: who is compared with whom, and all scores."""
    places = {candidate.key: place for place, candidate in enumerate(results.candidates)}
    return {
        "rewards": rewards,
        "bases": [None if c.is_base else places[c.base.key] for c in results.candidates],
        "scores": [[_rounded(results.scores[c.key][r]) for r in rewards] for c in results.candidates],
    }


def _rounded(scores: Array) -> list[list[float]]:
    """Scores (P, S) with as many digits as a reader could want: half the page would be digits otherwise."""
    return [[float(f"{score:.{DIGITS}g}") for score in row] for row in scores.tolist()]


def _charts(results: Results, finding: Finding) -> dict[str, list[Markup]]:
    """Figures of one candidate: score distributions, and gains by category for each category column."""
    base, tuned = results.scores[finding.candidate.base.key], results.scores[finding.candidate.key]
    names = [reward.reward for reward in finding.rewards]
    charts = {
        "": [figures.distributions(name, base[name], tuned[name]) for name in names],
        **{column: [_category_chart(name, c) for name in names] for column, c in finding.categories.items()},
    }
    return {name: [Markup(svg) for svg in group if svg] for name, group in charts.items()}


def _category_chart(reward: str, categories: Sequence[CategoryFinding]) -> str:
    """Figure of the gains by category; "" where no category has one."""
    known = [category for category in largest(categories) if reward in category.gains]
    names = [f"{figures.shorten(category.name)} ({category.num_prompts})" for category in known]
    return figures.category_gains(reward, names, [c.gains[reward] for c in known]) if known else ""


def _trade_offs(findings: Sequence[Finding]) -> dict[str, list[Markup]]:
    """Figures over all candidates, by what the gain cost: gain against it, for every reward."""
    features = dict.fromkeys(name for finding in findings for name in finding.kept)
    costs = {f"diversity ({name})": [f.kept.get(name) for f in findings] for name in features}
    charts = {
        name: _cost_charts(findings, found, figures.gain_against_diversity) for name, found in costs.items()
    }
    kls = [finding.path_kl for finding in findings]
    if any(kls):
        charts["path KL"] = _cost_charts(findings, kls, figures.gain_against_path_kl)
    return charts


def _cost_charts(findings: Sequence[Finding], costs: Sequence[Interval | None], draw: Any) -> list[Markup]:
    """One figure a reward of the candidates whose cost is known."""
    points: dict[str, list[Point]] = {}
    for number, (finding, cost) in enumerate(zip(findings, costs, strict=True), 1):
        for reward in finding.rewards if cost else ():
            point = Point(number, finding.candidate.name, cost, reward.gain)
            points.setdefault(reward.reward, []).append(point)
    return [Markup(draw(reward, found)) for reward, found in points.items()]


def _extremes(results: Results, finding: Finding) -> dict[str, tuple[list[Pair], list[Pair]]]:
    """By reward: the largest gains and the largest losses, at most one picture a prompt."""
    scores = results.scores
    return {
        reward.reward: _ends(
            scores[finding.candidate.base.key][reward.reward], scores[finding.candidate.key][reward.reward]
        )
        for reward in finding.rewards
    }


def _ends(base: Array, tuned: Array) -> tuple[list[Pair], list[Pair]]:
    order = gain_order(base, tuned)
    pairs = [Pair(*place, float(base[place]), float(tuned[place])) for place in order]
    gains = _one_a_prompt([pair for pair in pairs if pair.tuned > pair.base])
    losses = _one_a_prompt([pair for pair in reversed(pairs) if pair.tuned < pair.base])
    return gains, losses


def _one_a_prompt(pairs: Sequence[Pair]) -> list[Pair]:
    first: dict[int, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.prompt, pair)
    return list(first.values())[:EXTREMES]
