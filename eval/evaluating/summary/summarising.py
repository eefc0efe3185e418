"""Results to their summary."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from am_diffusers.evaluation.statistics import (
    RESAMPLES,
    Array,
    Comparison,
    Estimate,
    compare,
    diversity_kept,
    estimate,
    pairwise_distance,
)
from evaluating.candidates import Candidate
from evaluating.summary.frechet import FrechetFromBase, frechet_distance, frechet_from_base
from evaluating.summary.results import Results
from evaluating.summary.summary import (
    AgainstBase,
    CandidateSummary,
    RewardComparison,
    Summary,
    fingerprint_of,
    prompts_sha256,
)
from evaluating.summary.tilt import TiltComparison, compare_with_tilt


def summarise(results: Results, *, resamples: int = RESAMPLES) -> Summary:
    """Summarise complete results: the same results give the same summary.

    Args:
        results: results of all candidates.
        resamples: resamples of the bootstrap.

    Raises:
        ValueError: if there are no scores, or a number isn't finite; names candidate and measure.
    """
    _check_finite(results)
    images = next(iter(_score_tables(results))).shape[1]
    return Summary(
        format=2,
        fingerprint=fingerprint_of(results.settings, results.prompts, images),
        settings=dict(results.settings),
        num_prompts=len(results.prompts),
        images_per_prompt=images,
        prompts_sha256=prompts_sha256(results.prompts),
        categories={
            column: {value: len(rows) for value, rows in _rows_by_value(values).items()}
            for column, values in results.prompts.categories.items()
        },
        candidates=[_candidate(results, candidate, resamples) for candidate in results.candidates],
        reward_models=dict(results.reward_models),
        notes=list(results.notes),
    )


def _score_tables(results: Results) -> list[Array]:
    tables = [table for rewards in results.scores.values() for table in rewards.values()]
    if not tables:
        raise ValueError("no scores to summarise: give at least one reward")
    return tables


def _check_finite(results: Results) -> None:
    for where, values in _arrays(results):
        bad = int(np.size(values) - np.isfinite(values).sum())
        if bad:
            raise ValueError(
                f"{where}: {bad} of {np.size(values)} numbers are NaN or infinite: remove its files "
                "and evaluate again"
            )


def _arrays(results: Results) -> Iterator[tuple[str, Array]]:
    """Yield everything measured, with a name."""
    for measure in (results.scores, results.features):
        for key, tables in measure.items():
            yield from ((f"{name} of {key}", values) for name, values in tables.items())
    for name, values in results.reference_features.items():
        yield f"{name} of the reference images", values
    for title, tables in (("path KL", results.path_kl), ("LPIPS", results.changes)):
        yield from ((f"{title} of {key}", values) for key, values in tables.items())


def _rows_by_value(values: Sequence[str]) -> dict[str, list[int]]:
    """Return the prompts of each value of a category column, in order of appearance, without empty values."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if value:
            rows.setdefault(value, []).append(row)
    return rows


def _candidate(results: Results, candidate: Candidate, resamples: int) -> CandidateSummary:
    features = results.features.get(candidate.key, {})
    distances = _distances(features)
    return CandidateSummary(
        key=candidate.key,
        name=candidate.name,
        num_inference_steps=candidate.num_inference_steps,
        guidance_scale=candidate.guidance_scale,
        lora=None if candidate.lora is None else str(candidate.lora),
        lora_scale=candidate.lora_scale,
        scores={n: _mean(scores, resamples) for n, scores in results.scores[candidate.key].items()},
        diversity={name: estimate(np.mean, each, resamples=resamples) for name, each in distances.items()},
        reference=_to_reference(features, results.reference_features),
        against_base=None if candidate.is_base else _against_base(results, candidate, resamples),
    )


def _mean(values: Array, resamples: int) -> Estimate:
    """Return the mean over all images of (P, S), its interval over prompts."""
    return estimate(np.mean, values.mean(axis=1), resamples=resamples)


def _distances(features: Mapping[str, Array]) -> dict[str, Array]:
    """Return the mean pairwise distance of each prompt's images, (P,); nothing for one image each."""
    return {name: pairwise_distance(each) for name, each in features.items() if each.shape[1] > 1}


def _to_reference(features: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, float]:
    return {
        name: frechet_distance(each.reshape(-1, each.shape[-1]), reference[name])
        for name, each in features.items()
        if name in reference and min(each.shape[0] * each.shape[1], len(reference[name])) > 1
    }


def _against_base(results: Results, candidate: Candidate, resamples: int) -> AgainstBase:
    key, base = candidate.key, candidate.base.key
    path_kl, changes = results.path_kl.get(key), results.changes.get(key)
    features = results.features.get(base, {}), results.features.get(key, {})
    return AgainstBase(
        base=base,
        rewards={name: _reward(results, candidate, name, resamples) for name in results.scores[key]},
        diversity_kept=_kept(_distances(features[0]), _distances(features[1]), resamples),
        frechet=_frechet(*features),
        path_kl=None if path_kl is None else _mean(path_kl, resamples),
        change=None if changes is None else _mean(changes, resamples),
        tilt=_tilt(results, candidate, resamples),
    )


def _tilt(results: Results, candidate: Candidate, resamples: int) -> TiltComparison | None:
    target, path_kl = results.targets.get(candidate.name), results.path_kl.get(candidate.key)
    if target is None or path_kl is None:
        return None
    base, tuned = (results.scores[each.key] for each in (candidate.base, candidate))
    return compare_with_tilt(base, tuned, path_kl, target, resamples=resamples)


def _reward(results: Results, candidate: Candidate, name: str, resamples: int) -> RewardComparison:
    base, tuned = (results.scores[each.key][name] for each in (candidate.base, candidate))
    overall = compare(base, tuned, resamples=resamples)

    def of(rows: list[int]) -> Comparison:
        return compare(base[rows], tuned[rows], unit=overall.base_sd, resamples=resamples)

    columns = results.prompts.categories.items()
    return RewardComparison(
        results.role(candidate, name),
        overall,
        {
            column: {value: of(rows) for value, rows in _rows_by_value(values).items()}
            for column, values in columns
        },
    )


def _kept(base: Mapping[str, Array], tuned: Mapping[str, Array], resamples: int) -> dict[str, Estimate]:
    found = {name: diversity_kept(base[name], each, resamples=resamples) for name, each in tuned.items()}
    return {name: kept for name, kept in found.items() if kept is not None}


def _frechet(base: Mapping[str, Array], tuned: Mapping[str, Array]) -> dict[str, FrechetFromBase]:
    found = {name: frechet_from_base(base[name], each) for name, each in tuned.items()}
    return {name: distance for name, distance in found.items() if distance is not None}
