"""All evaluations in a folder in one table, or in several where their numbers can't be compared.

A table says what its evaluations were made and scored with (`evaluating.leaderboard_groups`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from am_diffusers.evaluation.statistics import Comparison
from evaluating.summary.summary import SUMMARY_FILE, CandidateSummary, read_summary
from evaluating.tables.groups import Evaluated, describe, differences, disagreements, group
from evaluating.tables.renderings import Cell, Table
from evaluating.tables.tables import MARKS, NONE, comparison_rows, in_order, label, measures, number

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A candidate of an evaluation.

    Attributes:
        evaluated: the evaluation.
        candidate: one of its candidates.
    """

    evaluated: Evaluated
    candidate: CandidateSummary

    def comparison(self, reward: str) -> Comparison | None:
        """Return the comparison with its base, for all prompts; None for a base, or without that reward."""
        against = self.candidate.against_base
        return against.rewards[reward].overall if against and reward in against.rewards else None

    def gain(self, reward: str) -> float | None:
        """Return the gain in base standard deviations."""
        comparison = self.comparison(reward)
        return comparison.gain.value if comparison and comparison.gain else None


def find_evaluations(folder: Path) -> list[Evaluated]:
    """Find all summaries below a folder by name; skip what isn't one, with a warning.

    Raises:
        ValueError: if there is none.
    """
    found = []
    for file in sorted(folder.rglob(SUMMARY_FILE)):
        try:
            found.append(Evaluated(file.parent.relative_to(folder).as_posix(), read_summary(file)))
        except ValueError as error:
            logger.warning("skipped: %s", error)
    if not found:
        raise ValueError(f"no readable {SUMMARY_FILE} in {folder}: expected output folders of evaluate.py")
    return found


def choose_reward(evaluations: Sequence[Evaluated], sort_by: str | None) -> str:
    """Choose the reward to sort by; the first in the order of published tables if none is asked for.

    Raises:
        ValueError: if no evaluation has it.
    """
    known = in_order(list(dict.fromkeys(name for each in evaluations for name in each.summary.rewards)))
    if sort_by is None:
        return known[0]
    if sort_by not in known:
        raise ValueError(
            f"--sort_by {sort_by}: no evaluation has that reward; expected one of {', '.join(known)}"
        )
    return sort_by


def leaderboard_tables(evaluations: Sequence[Evaluated], sort_by: str) -> list[Table]:
    """Make a table for each group of evaluations whose numbers can be compared, saying what sets it apart.

    Args:
        evaluations: one or more.
        sort_by: reward whose gain sorts.
    """
    groups = group(evaluations)
    tables = []
    for place, members in enumerate(groups, start=1):
        table = leaderboard_table(members, sort_by)
        if len(groups) > 1:
            warning = (
                f"Table {place} of {len(groups)}, which can't be compared with each other: the evaluations "
                f"differ in {', '.join(differences(groups))}."
            )
            table = replace(table, notes=(warning, *table.notes))
        tables.append(table)
    return tables


def leaderboard_table(evaluations: Sequence[Evaluated], sort_by: str) -> Table:
    """Make a table with a row per tuned model, the largest gain first, and one for each base at the end.

    Args:
        evaluations: evaluations of one group.
        sort_by: reward whose gain sorts; models without a gain come last.
    """
    rows = _sorted_rows(evaluations, sort_by)
    candidates = [row.candidate for row in rows]
    rewards = list(dict.fromkeys(name for each in evaluations for name in each.summary.rewards))
    columns = {
        "model": [Cell(label(candidate, candidates)) for candidate in candidates],
        "evaluation": [Cell(row.evaluated.name) for row in rows],
        f"gain in {sort_by} (base sd)": [_gain_cell(row, sort_by) for row in rows],
        "win rate": [_win_cell(row, sort_by) for row in rows],
        **measures(rewards, candidates),
    }
    return Table(
        titles=tuple(columns),
        names=2,
        rows=tuple(zip(*columns.values(), strict=True)),
        notes=(f"{describe(evaluations)}. {MARKS}", *disagreements(evaluations)),
    )


def _sorted_rows(evaluations: Sequence[Evaluated], sort_by: str) -> list[Row]:
    rows = [Row(each, candidate) for each in evaluations for candidate in each.summary.candidates]
    tuned = [row for row in rows if row.candidate.against_base is not None]
    bases: dict[str, Row] = {}
    for row in rows:
        if row.candidate.against_base is None:
            key = row.candidate.key
            bases[key] = _merged(bases[key], row) if key in bases else row

    def place(row: Row) -> tuple[bool, float, str, str]:
        gain = row.gain(sort_by)
        return gain is None, -(gain or 0.0), row.evaluated.name, row.candidate.key

    return [*sorted(tuned, key=place), *(bases[key] for key in sorted(bases))]


def _merged(base: Row, other: Row) -> Row:
    """Add to a base what was measured of it in the other evaluation only."""
    one, more = base.candidate, other.candidate
    merged = replace(
        one,
        scores=more.scores | one.scores,
        diversity=more.diversity | one.diversity,
        reference=more.reference | one.reference,
    )
    if merged == one:
        return base
    return Row(replace(base.evaluated, name=f"{base.evaluated.name}, {other.evaluated.name}"), merged)


def _gain_cell(row: Row, reward: str) -> Cell:
    comparison = row.comparison(reward)
    if comparison is None or comparison.gain is None:
        return Cell(NONE)
    gain = comparison.gain
    ends = f" [{number(gain.low, 2)}, {number(gain.high, 2)}]" if gain.low is not None else ""
    return Cell(f"{number(gain.value, 2)}{ends}", significant=comparison.significant)


def _win_cell(row: Row, reward: str) -> Cell:
    comparison = row.comparison(reward)
    return Cell(NONE if comparison is None else f"{comparison.win_rate.value:.0%}")


def to_rows(evaluations: Sequence[Evaluated]) -> list[dict[str, object]]:
    """Return the rows of comparison.csv of all evaluations, behind the evaluation and its table's number."""
    return [
        {"evaluation": each.name, "table": place} | row
        for place, members in enumerate(group(evaluations), start=1)
        for each in members
        for row in comparison_rows(each.summary)
    ]
