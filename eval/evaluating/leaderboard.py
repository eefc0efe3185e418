"""All evaluations in a folder in one table, or in several where their numbers can't be compared.

Pictures of other prompts, seeds, samplers or bases give other numbers for the same model. So evaluations are
grouped by the fingerprint of what they were made with, and a table says what that was.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from am_diffusers.comparison import Comparison
from evaluating.renderings import Cell, Table
from evaluating.summary import SUMMARY_FILE, CandidateSummary, Summary, read_summary
from evaluating.tables import (
    MARKS,
    NONE,
    comparison_rows,
    in_order,
    label,
    measures,
    number,
)

logger = logging.getLogger(__name__)

# Of the same base pictures; beyond it, in standard deviations of them, something else scored them.
SAME_SCORES = 0.02


@dataclass(frozen=True)
class Evaluated:
    """A summary and where it was found.

    Attributes:
        name: folder of the summary, relative to the one that was searched.
        summary: what was in it.
    """

    name: str
    summary: Summary


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
        """With its base, for all prompts; None for a base, or without that reward."""
        against = self.candidate.against_base
        return against.rewards[reward].overall if against and reward in against.rewards else None

    def gain(self, reward: str) -> float | None:
        """In base standard deviations."""
        comparison = self.comparison(reward)
        return comparison.gain.value if comparison and comparison.gain else None


def find_evaluations(folder: Path) -> list[Evaluated]:
    """All summaries below a folder by name; what isn't one is named in a warning and passed over.

    Raises:
        ValueError: if there is none.
    """
    found = []
    for file in sorted(folder.rglob(SUMMARY_FILE)):
        try:
            found.append(Evaluated(file.parent.relative_to(folder).as_posix(), read_summary(file)))
        except ValueError as error:
            logger.warning("passed over: %s", error)
    if not found:
        raise ValueError(f"no readable {SUMMARY_FILE} in {folder}: expected output folders of evaluate.py")
    return found


def group(evaluations: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """Evaluations whose numbers can be compared, together."""
    groups: dict[str, list[Evaluated]] = {}
    for each in evaluations:
        groups.setdefault(each.summary.fingerprint, []).append(each)
    return list(groups.values())


def choose_reward(evaluations: Sequence[Evaluated], sort_by: str | None) -> str:
    """The reward to sort by; the first in the order of published tables if none is asked for.

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
    """A table for each group of evaluations whose numbers can be compared, saying what sets it apart.

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
    """A row a tuned model, the largest gain first, and one for each base at the end.

    Args:
        evaluations: of one group.
        sort_by: reward whose gain sorts; models without a gain come last.
    """
    rows = _sorted_rows(evaluations, sort_by)
    candidates = [row.candidate for row in rows]
    rewards = list(dict.fromkeys(name for each in evaluations for name in each.summary.rewards))
    settings = _made_with(evaluations[0].summary).items()
    made_with = ", ".join(f"{name} {value}" for name, value in settings)
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
        notes=(f"{made_with}. {MARKS}", *_disagreements(evaluations)),
    )


def _sorted_rows(evaluations: Sequence[Evaluated], sort_by: str) -> list[Row]:
    rows = [Row(each, candidate) for each in evaluations for candidate in each.summary.candidates]
    tuned = [row for row in rows if row.candidate.against_base is not None]
    bases = {row.candidate.key: row for row in reversed(rows) if row.candidate.against_base is None}

    def place(row: Row) -> tuple[bool, float, str, str]:
        gain = row.gain(sort_by)
        return gain is None, -(gain or 0.0), row.evaluated.name, row.candidate.key

    return [*sorted(tuned, key=place), *(bases[key] for key in sorted(bases))]


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


def _made_with(summary: Summary) -> dict[str, object]:
    return {
        "prompts": f"{summary.num_prompts} ({summary.prompts_sha256[:8]})",
        "pictures a prompt": summary.images_per_prompt,
        **summary.settings,
    }


def differences(groups: Sequence[Sequence[Evaluated]]) -> list[str]:
    """What the groups were made with that isn't the same for all of them."""
    made_with = [_made_with(each[0].summary) for each in groups]
    names = dict.fromkeys(name for settings in made_with for name in settings)
    return [n for n in names if any(one.get(n) != other.get(n) for one, other in pairwise(made_with))]


def _disagreements(evaluations: Sequence[Evaluated]) -> list[str]:
    """Sentences about base pictures that are the same and scored otherwise."""
    compared = [
        (each.name, reward, against.base, result.overall)
        for each in evaluations
        for against in (candidate.against_base for candidate in each.summary.candidates)
        if against is not None
        for reward, result in against.rewards.items()
    ]
    first = {(reward, base): (name, result) for name, reward, base, result in reversed(compared)}
    sentences = []
    for name, reward, base, result in compared:
        other, known = first[reward, base]
        if abs(known.base_mean - result.base_mean) > SAME_SCORES * (known.base_sd or 0.0):
            sentences.append(
                f"The base pictures score differently in {reward} in {other} and {name}: with another reward "
                "model? Then their numbers can't be compared."
            )
    return list(dict.fromkeys(sentences))


def to_rows(evaluations: Sequence[Evaluated]) -> list[dict[str, object]]:
    """The rows of comparison.csv of all evaluations, with the evaluation and its group in front."""
    return [
        {"evaluation": each.name, "group": each.summary.fingerprint} | row
        for each in evaluations
        for row in comparison_rows(each.summary)
    ]
