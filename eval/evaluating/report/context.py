"""Content of the report's template: tables, figures, largest changes, and the numbers its script works on."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from am_diffusers.evaluation.statistics import Array, Comparison, Estimate
from evaluating.report import figures
from evaluating.report.costs import find_costs, set_distances, trade_offs
from evaluating.report.findings import Finding, candidate_labels
from evaluating.report.images import Embedded, gain_order
from evaluating.summary.results import Results
from evaluating.summary.summary import FEWEST_PROMPTS, Summary

EXTREMES = 4
MAX_CATEGORIES = 30
DIGITS = 6
# Settings that a reader looks for first, in words.
WORDS = {
    "prompt_source": "prompts",
    "pretrained_model_name_or_path": "base model",
    "sampler": "sampler",
    "seed": "seed",
    "resolution": "resolution",
}
# Shown elsewhere on the page, or a checksum.
UNSHOWN = ("prompts", "num_prompts", "num_images_per_prompt")


class Pair(NamedTuple):
    """A base and a tuned image from the same noise, with their scores by one reward."""

    prompt: int
    image: int
    base: float
    tuned: float


def report_context(
    results: Results, summary: Summary, findings: Sequence[Finding], embedded: Mapping[int, Embedded]
) -> dict[str, Any]:
    """Return the variables of report.html.jinja.

    Args:
        results: results of the evaluation.
        summary: summary of the same results.
        findings: findings on its tuned candidates, in their order.
        embedded: images by prompt and candidate key.
    """
    rewards = list(dict.fromkeys(name for finding in findings for name in finding.against.rewards))
    columns = list(results.prompts.categories.values())
    labels = candidate_labels(results.candidates)
    costs = find_costs(findings)
    return {
        "results": results,
        "num_images": next(iter(results.scores[results.tuned[0].key].values())).shape[1],
        "findings": findings,
        "rewards": rewards,
        "labels": labels,
        "settings": _settings(results),
        "bars": _bars([gain for finding in findings for gain in finding.gains.values()]),
        "charts": [_charts(results, finding) for finding in findings],
        "costs": costs,
        "trade_offs": trade_offs(findings, costs, labels),
        "distances": set_distances(summary, findings, labels),
        "extremes": [_extremes(results, finding) for finding in findings],
        "num_bases": len({finding.against.base for finding in findings}),
        "fewest_prompts": FEWEST_PROMPTS,
        "max_categories": MAX_CATEGORIES,
        "prompt_categories": list(zip(*columns, strict=True)) if columns else [()] * len(results.prompts),
        "pictures": embedded,
        "data": _data(results, rewards),
    }


def _settings(results: Results) -> dict[str, str]:
    """Return the settings that hold for all candidates, in words; a LoRA's too if it is the only one."""
    first = [name for name in WORDS if name in results.settings]
    names = [*first, *(name for name in results.settings if name not in (*first, *UNSHOWN))]
    shown = {name: results.settings[name] for name in names if results.settings[name] is not None}
    settings = {WORDS.get(name, name): _text(value) for name, value in shown.items()}
    weights = [f"{name} from {model}" for name, model in results.reward_models.items() if model]
    if weights:
        settings["reward models"] = ", ".join(weights)
    if len(results.tuned) > 1:
        return settings
    tuned = next(iter(results.tuned))
    return settings | {
        "LoRA": str(tuned.lora),
        "LoRA scale": f"{tuned.lora_scale:g}",
        "steps": str(tuned.num_inference_steps),
        "guidance": f"{tuned.guidance_scale:g}" + " (off)" * (tuned.guidance_scale == 1),
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _bars(gains: Sequence[Estimate]) -> Callable[[float], str]:
    """Return a function that places gains in the bars of the table, all on one scale: 0 to 100 with zero."""
    ends = [end for gain in gains for end in (gain.low, gain.value, gain.high) if end is not None]
    low, high = min([0, *ends]), max([0, *ends])
    return lambda gain: f"{100 * (gain - low) / ((high - low) or 1):.1f}"


def _data(results: Results, rewards: Sequence[str]) -> dict[str, Any]:
    """Return the data of the page's script: who is compared with whom, and all scores."""
    places = {candidate.key: place for place, candidate in enumerate(results.candidates)}
    return {
        "rewards": rewards,
        "bases": [None if c.is_base else places[c.base.key] for c in results.candidates],
        "scores": [[_rounded(results.scores[c.key][r]) for r in rewards] for c in results.candidates],
    }


def _rounded(scores: Array) -> list[list[float]]:
    """Round scores (P, S) to as many digits as a reader could want: else half the page would be digits."""
    return [[float(f"{score:.{DIGITS}g}") for score in row] for row in scores.tolist()]


def _charts(results: Results, finding: Finding) -> dict[str, list[Markup]]:
    """Draw one candidate: score distributions under "", and gains by category under the column."""
    base, tuned = results.scores[finding.candidate.base.key], results.scores[finding.candidate.key]
    names = list(finding.against.rewards)
    charts = {
        "": [figures.distributions(name, base[name], tuned[name]) for name in names],
        **{
            column: [_category_chart(name, finding.category_gains(name, column)) for name in names]
            for column in results.prompts.categories
        },
    }
    return {name: [Markup(svg) for svg in group if svg] for name, group in charts.items() if any(group)}


def _category_chart(reward: str, found: Mapping[str, Comparison]) -> str:
    """Draw the gains in the categories with the most prompts; "" where no category has a gain."""
    most = sorted(found, key=lambda name: -found[name].num_prompts)[:MAX_CATEGORIES]
    shown = {name: comparison for name, comparison in found.items() if name in most}
    names = [f"{figures.shorten(name)} ({comparison.num_prompts})" for name, comparison in shown.items()]
    gains = [comparison.gain for comparison in shown.values() if comparison.gain is not None]
    return figures.category_gains(reward, names, gains) if gains else ""


def _extremes(results: Results, finding: Finding) -> dict[str, tuple[list[Pair], list[Pair]]]:
    """Return the largest gains and the largest losses by reward, at most one image per prompt."""
    base, tuned = results.scores[finding.candidate.base.key], results.scores[finding.candidate.key]
    return {reward: _ends(base[reward], tuned[reward]) for reward in finding.against.rewards}


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
