"""Collects a complete evaluation: results from the files, and what is written from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from am_diffusers.evaluation.images import ImageId
from am_diffusers.evaluation.statistics import Array
from am_diffusers.system.files import write_whole
from evaluating.candidates import Candidate
from evaluating.measuring.measures import Measure
from evaluating.measuring.values import find_values, units_of, unmeasured
from evaluating.plan import Plan
from evaluating.store import Store
from evaluating.summary.results import Results


def missing_units(plan: Plan, store: Store) -> int:
    """Count the chunks of images that still lack a value of some measure.

    Only once all files are there are they read: while others work, this is a look at names.
    """
    chunks = range(len(store.chunks))
    units = {measure: units_of(measure, plan.candidates, chunks) for measure in plan.measures}
    absent = sum(
        not store.values_file(measure.kind, candidate, measure.name, chunk).exists()
        for measure, wanted in units.items()
        for candidate, chunk in wanted
    )
    return absent or sum(len(unmeasured(store, measure, wanted)) for measure, wanted in units.items())


def collect(plan: Plan, store: Store) -> Results:
    """Collect the results of a complete evaluation."""
    shape = (len(store.prompts), store.images_per_prompt)

    def values(kind: str) -> dict[str, dict[str, Array]]:
        measures = [measure for measure in plan.measures if measure.kind == kind]
        return {
            candidate.key: {measure.name: _whole(store, measure, candidate, shape) for measure in measures}
            for candidate in plan.candidates
        }

    return Results(
        folder=store.folder,
        settings=store.settings,
        prompts=plan.prompts,
        candidates=plan.candidates,
        scores=values("rewards"),
        features=values("features"),
        reference_features={},
        path_kl=_path_kl(store, plan.candidates),
        changes=_changes(plan, store, shape),
    )


def write_scores(results: Results, store: Store) -> Path:
    """Write scores.jsonl: a line per image, with its prompt, categories, seed, file and scores."""
    file = results.folder / "scores.jsonl"

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as opened:
            for candidate in results.candidates:
                for image in (image for chunk in store.chunks for image in chunk):
                    line = json.dumps(_line(results, store, candidate, image), ensure_ascii=False)
                    opened.write(line + "\n")

    write_whole(file, write)
    return file


def _line(results: Results, store: Store, candidate: Candidate, image: ImageId) -> Mapping[str, object]:
    row, column = image
    scores = {name: values[row, column].item() for name, values in results.scores[candidate.key].items()}
    line = {
        "candidate": candidate.key,
        "prompt_index": row,
        "image": column,
        "prompt": results.prompts.prompts[row],
        "categories": {name: values[row] for name, values in results.prompts.categories.items()},
        "seed": store.about(candidate, image)["seed"],
        "file": str(store.image(candidate, image).relative_to(results.folder)),
        "scores": scores,
    }
    if candidate.key in results.path_kl:
        line["path_kl"] = results.path_kl[candidate.key][row, column].item()
    return line


def _changes(plan: Plan, store: Store, shape: Sequence[int]) -> dict[str, Array]:
    tuned = [candidate for candidate in plan.candidates if not candidate.is_base]
    measures = [measure for measure in plan.measures if measure.kind == "changes"]
    return {each.key: _whole(store, measure, each, shape) for measure in measures for each in tuned}


def _whole(store: Store, measure: Measure, candidate: Candidate, shape: Sequence[int]) -> Array:
    parts = [find_values(store, measure, candidate, chunk) for chunk in range(len(store.chunks))]
    missing = [chunk for chunk, part in enumerate(parts) if part is None]
    if missing:
        raise ValueError(f"{measure.name} of {candidate.key}: chunk {missing[0]} is missing: run this again")
    whole = np.concatenate([part for part in parts if part is not None]).astype(np.float64)
    return whole.reshape(*shape, *whole.shape[1:])


def _path_kl(store: Store, candidates: Sequence[Candidate]) -> dict[str, Array]:
    """Read path KL from the texts of the images, where the sampler was a stochastic table."""
    images = [image for chunk in store.chunks for image in chunk]
    shape = (len(store.prompts), store.images_per_prompt)
    return {
        candidate.key: np.array([store.path_kl(candidate, each) for each in images]).reshape(shape)
        for candidate in candidates
        if store.has_path_kl(candidate)
    }
