"""The comparison table of a summary, laid out as published tables are, and all its comparisons as CSV.

A row per model, a column per reward in the order and with the decimals that papers use. Scores are as the
rewards gave them: they can stand beside published numbers if weights, prompts, resolution and
sampler are the published ones.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from am_diffusers.evaluation.statistics import LEVEL, Comparison, Estimate
from am_diffusers.rewards import REWARDS, Column, LearnedReward
from am_diffusers.system.files import write_text
from evaluating.summary.summary import FEWEST_PROMPTS, CandidateSummary, Summary
from evaluating.summary.tilt import TiltComparison
from evaluating.tables.renderings import Cell, Table, to_latex, to_markdown

NONE = "-"
# Titles of the certificate's numbers.
CERTIFICATES = {
    "tilt_gap": "tilt gap",
    "attained": "attained",
    "excess_kl": "excess KL",
    "best_of_n": "best of n",
}
MARKS = (
    "Bold: best of the column. *: differs from the base with the same sampler: the 95 % interval of the "
    "paired difference excludes 0 and the Wilcoxon signed-rank test over prompts has "
    f"p below {LEVEL:g}, each comparison by itself, not corrected for their number."
)


def published() -> dict[str, Column]:
    """Return the columns that papers print, by reward, in the order of papers."""
    kinds = [kind for kind in REWARDS.values() if issubclass(kind, LearnedReward)]
    return {kind.name: kind.column for kind in kinds if kind.column}


def in_order(rewards: Sequence[str]) -> list[str]:
    """Return the reward names in the order of published tables, the others behind them."""
    first = published()
    return [name for name in first if name in rewards] + [name for name in rewards if name not in first]


def column_of(reward: str) -> Column:
    """Return the column of a reward."""
    return published().get(reward, Column(reward))


def number(value: float | None, decimals: int) -> str:
    """Format a number as it is printed; never -0.00."""
    return NONE if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"


def label(candidate: CandidateSummary, among: Sequence[CandidateSummary]) -> str:
    """Return the name of a candidate with what tells it from the others: LoRA scale, steps, guidance."""
    parts = [candidate.name]
    if candidate.lora is not None and len({other.lora_scale for other in among if other.lora}) > 1:
        parts.append(f"scale {candidate.lora_scale:g}")
    if len({other.num_inference_steps for other in among}) > 1:
        parts.append(f"{candidate.num_inference_steps} steps")
    if len({other.guidance_scale for other in among}) > 1:
        parts.append(f"guidance {candidate.guidance_scale:g}")
    return ", ".join(parts)


def comparison_table(summary: Summary) -> Table:
    """Make a table with a row per candidate, bases first: mean rewards, then what else was measured."""
    candidates = summary.candidates
    columns = measures(summary.rewards, candidates)
    names = [Cell(label(candidate, candidates)) for candidate in candidates]
    return Table(
        titles=("model", *columns),
        names=1,
        rows=tuple(zip(names, *columns.values(), strict=True)),
        notes=(
            f"{summary.num_prompts} prompts x {summary.images_per_prompt} images. {MARKS}",
            *_few(summary),
        ),
    )


def _few(summary: Summary) -> list[str]:
    too_few = f"With fewer than {FEWEST_PROMPTS} prompts p can't be below {LEVEL:g}: too few for a star."
    return [too_few] * (summary.num_prompts < FEWEST_PROMPTS)


def measures(rewards: Sequence[str], candidates: Sequence[CandidateSummary]) -> dict[str, list[Cell]]:
    """Return the columns with a number of these candidates, by title: a cell each, the best reward marked."""
    columns = {column_of(name).title: _reward_cells(name, candidates) for name in in_order(rewards)}
    for name in dict.fromkeys(name for candidate in candidates for name in candidate.diversity):
        known = [candidate.diversity.get(name) for candidate in candidates]
        columns[f"diversity ({name})"] = [Cell(number(each and each.value, 3)) for each in known]
    path_kl = [_path_kl(candidate) for candidate in candidates]
    if any(value is not None for value in path_kl):
        columns["path KL"] = [Cell(number(value, 2)) for value in path_kl]
    return columns | _certificates(candidates)


def _certificates(candidates: Sequence[CandidateSummary]) -> dict[str, list[Cell]]:
    """Return the columns of distances from the tilt that are known of any candidate."""
    tilts = [each.against_base and each.against_base.tilt for each in candidates]
    columns: dict[str, list[Cell]] = {}
    for name, title in CERTIFICATES.items():
        found = [each and each.certificate.get(name) for each in tilts]
        if any(found):
            columns[title] = [Cell(number(each and each.value, 2)) for each in found]
    return columns


def _reward_cells(reward: str, candidates: Sequence[CandidateSummary]) -> list[Cell]:
    decimals = column_of(reward).decimals
    means = [c.scores[reward].value if reward in c.scores else None for c in candidates]
    # Values that print alike are equally good.
    best = number(max((mean for mean in means if mean is not None), default=None), decimals)
    return [
        Cell(number(mean, decimals), number(mean, decimals) == best != NONE, _is_significant(each, reward))
        for mean, each in zip(means, candidates, strict=True)
    ]


def _is_significant(candidate: CandidateSummary, reward: str) -> bool:
    against = candidate.against_base
    return against is not None and reward in against.rewards and against.rewards[reward].overall.significant


def _path_kl(candidate: CandidateSummary) -> float | None:
    against = candidate.against_base
    return None if against is None or against.path_kl is None else against.path_kl.value


def comparison_rows(summary: Summary) -> list[dict[str, object]]:
    """Return a row for each candidate, reward and category, `all` prompts first, every number in full."""
    rows = []
    for candidate in summary.candidates:
        if candidate.against_base is None:
            continue
        model = {
            "model": candidate.name,
            "lora_scale": candidate.lora_scale,
            "num_inference_steps": candidate.num_inference_steps,
            "guidance_scale": candidate.guidance_scale,
        }
        for reward, result in candidate.against_base.rewards.items():
            parts = [("all", "all", result.overall)]
            parts += [(column, v, each) for column, of in result.categories.items() for v, each in of.items()]
            for column, value, each in parts:
                place = {"reward": reward, "role": result.role, "category_column": column, "category": value}
                tilt = candidate.against_base.tilt if column == "all" else None
                rows.append(model | place | _flat(each) | _predicted(tilt, reward))
    return rows


def _predicted(tilt: TiltComparison | None, reward: str) -> dict[str, object]:
    """Return the tilt's own gain in a reward, over all prompts, and whether the model is beyond the tilt."""
    found = tilt.predicted.get(reward) if tilt else None
    return {
        "predicted_gain": found and found.value,
        "predicted_gain_low": found and found.low,
        "predicted_gain_high": found and found.high,
        "over_optimised": tilt.over_optimised if tilt and tilt.surplus else None,
    }


def _flat(comparison: Comparison) -> dict[str, object]:
    """Return the fields of a comparison, an estimate as three of them."""
    flat: dict[str, object] = {}
    for field in fields(comparison):
        value = getattr(comparison, field.name)
        flat[field.name] = value.value if isinstance(value, Estimate) else value
        if field.name in ("difference", "gain", "win_rate"):
            flat[f"{field.name}_low"] = value and value.low
            flat[f"{field.name}_high"] = value and value.high
    return flat | {"significant": comparison.significant}


def to_csv(rows: Sequence[dict[str, object]]) -> str:
    """Write rows with equal keys as CSV, None as an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_tables(summary: Summary, folder: Path) -> None:
    """Write comparison.md, comparison.tex and comparison.csv."""
    table = comparison_table(summary)
    write_text(folder / "comparison.md", to_markdown(table))
    write_text(folder / "comparison.tex", to_latex(table))
    write_text(folder / "comparison.csv", to_csv(comparison_rows(summary)))
