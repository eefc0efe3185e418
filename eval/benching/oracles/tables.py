"""The tables of docs/methods.md, from the committed results."""

import math
from collections.abc import Sequence
from pathlib import Path

from benching.oracles.problems import PROBLEMS
from benching.oracles.records import DATA, REFERENCES, Key, Record, load
from benching.oracles.variants import VARIANTS

SEEDS = (0, 1, 2)
BEGIN, END = "<!-- oracles:begin -->", "<!-- oracles:end -->"
COLUMNS = {
    "mean_bias": ("mean", "{:+.3f}"),
    "spread_bias": ("spread", "{:+.1%}"),
    "mode_error": ("wrong mode", "{:.1%}"),
    "reward_gain": ("reward", "{:+.3f}"),
}
"""Measures beside the distance: their name on the page and how they are written."""
MISSING, DIVERGED = "-", "diverged"


def render(folder: Path = DATA) -> str:
    """Return all tables as Markdown, one a problem; rows that weren't run are left out."""
    return "\n\n".join(_table(problem, folder) for problem in PROBLEMS)


def replace_block(text: str, block: str) -> str:
    """Replace the text between the marks of a page.

    Raises:
        ValueError: if the marks aren't there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def _table(problem: str, folder: Path) -> str:
    titles: dict[str, str] = {**REFERENCES, **{name: variant.title for name, variant in VARIANTS.items()}}
    names = ["row", "iterations", "W2, SDE", "W2, ODE", *(name for name, _ in COLUMNS.values())]
    lines = [f"**{PROBLEMS[problem].title}**", "", _line(names), _line(["---"] + ["---:"] * (len(names) - 1))]
    for row, title in titles.items():
        records = [record for seed in SEEDS if (record := load(Key(problem, row, seed), folder)) is not None]
        if records:
            name = f"*{title}*" if row in REFERENCES else title
            lines.append(_line([name, _iterations(records), *_cells(records)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _iterations(records: Sequence[Record]) -> str:
    """Return the number of iterations that were made, from the fewest to the most."""
    made = sorted({n for record in records if (n := record.get("iterations")) is not None})
    return MISSING if not made else str(made[0]) if len(made) == 1 else f"{made[0]}-{made[-1]}"


def _cells(records: Sequence[Record]) -> list[str]:
    """Return distances by both samplers, and the other measures as SDE / ODE."""
    distances = [_distance(_over_seeds(records, sampler, "w2")) for sampler in ("sde", "ode")]
    others = []
    for measure, (_, written) in COLUMNS.items():
        both = [_over_seeds(records, sampler, measure) for sampler in ("sde", "ode")]
        others.append(" / ".join(v if isinstance(v, str) else written.format(_mean(v)) for v in both))
    return distances + others


def _distance(values: list[float] | str) -> str:
    """Return the mean and standard deviation over the seeds."""
    if isinstance(values, str):
        return values
    mean = _mean(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _over_seeds(records: Sequence[Record], sampler: str, measure: str) -> list[float] | str:
    """Return a measure by seed, or why there is none: a law that one seed at least has lost is no law."""
    asked = [record["found"][sampler] for record in records if sampler in record["found"]]
    there = [found[measure] for found in asked if found is not None]
    if len(there) == len(asked):
        return there or MISSING
    return DIVERGED if len(there) == 0 else f"{DIVERGED} ({len(asked) - len(there)} of {len(asked)})"
