"""Evaluation of a run's LoRAs by the parts of `evaluate.py`: the same prompts, noise and sampler for all."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from am_diffusers.evaluation.statistics import Array, Estimate
from am_diffusers.rewards.world import WorldClean, WorldRight
from am_diffusers.system.joining import join
from am_diffusers.system.processes import Processes
from benching.images.certifying import take_chains
from benching.images.records import Chain, Judged, Reward, Snapshot
from benching.images.study import Study, command_line
from benching.images.training import Reached
from evaluating.driver import make_images, take_measures
from evaluating.options import parse
from evaluating.plan import Plan, make_plan
from evaluating.runs import trained_rewards
from evaluating.store import Store
from evaluating.summary.collect import collect
from evaluating.summary.results import Results
from evaluating.summary.summarising import summarise
from evaluating.summary.summary import CandidateSummary

JUDGES = (WorldClean.name, WorldRight.name)


def measure(
    study: Study, reached: Sequence[Reached], folder: Path, evaluations: Path, scores: Path
) -> list[Snapshot]:
    """Make and measure the images of every LoRA of a run; the base's are made once per study.

    Results of an earlier attempt at the run are removed: its LoRAs and its clock were different.

    Args:
        study: study that says how to evaluate.
        reached: marks of the run.
        folder: folder of the run, of its name.
        evaluations: folder of the images of all runs.
        scores: folder of the scores of the base's images by the chain of the certificate.
    """
    for done in reached:
        _forget(evaluations, f"{folder.name}-{done.mark.name}")
    loras = [f"{folder.name}-{done.mark.name}={done.lora(folder)}" for done in reached]
    plan = make_plan(parse([*_arguments(study), "--lora_path", *loras, "--output_dir", str(evaluations)]))
    options = plan.options
    store = Store(evaluations, plan.settings, plan.prompts.prompts, options.num_images_per_prompt, plan.size)
    store.open(plan.candidates)
    processes, chunks = Processes(join()), range(len(store.chunks))
    make_images(plan, store, chunks, processes)
    take_measures(plan, store, chunks, processes)
    return snapshots(plan, collect(plan, store), reached, take_chains(study, reached, folder, scores))


def _forget(evaluations: Path, name: str) -> None:
    for folder in evaluations.glob(f"*/{name}-scale*"):
        shutil.rmtree(folder)


def _arguments(study: Study) -> list[str]:
    """Return the flags of evaluate.py that all runs share; the model's flags are as in training."""
    options = study.evaluation
    steps, images = options.num_inference_steps, options.num_images_per_prompt
    model = ("pretrained_model_name_or_path", "resolution", "max_sequence_length")
    return [
        *command_line({name: study.common[name] for name in model}),
        *("--prompts", options.prompts),
        *("--rewards", *options.rewards, *JUDGES),
        *("--num_inference_steps", str(steps), "--num_images_per_prompt", str(images)),
    ]


def snapshots(
    plan: Plan, results: Results, reached: Sequence[Reached], chains: Sequence[Chain]
) -> list[Snapshot]:
    """Return the results of the evaluation and the chain at each mark."""
    known = replace(results, trained=trained_rewards(plan.candidates))
    summary = summarise(known)
    tuned = [candidate for candidate in summary.candidates if candidate.against_base is not None]
    return [_snapshot(known, *each) for each in zip(tuned, reached, chains, strict=True)]


def _snapshot(results: Results, candidate: CandidateSummary, done: Reached, chain: Chain) -> Snapshot:
    against = candidate.against_base
    assert against is not None
    (kept,), (moved,) = against.diversity_kept.values(), against.frechet.values()
    return Snapshot(
        mark=done.mark.name,
        seconds=done.seconds,
        calls=done.calls,
        iterations=done.iterations,
        rewards={name: _reward(results, candidate, name) for name in against.rewards if name not in JUDGES},
        diversity_kept=kept,
        frechet=moved.halves - moved.floor,
        judged=judged_shares(results.scores[candidate.key]),
        judged_base=judged_shares(results.scores[against.base]),
        chain=chain,
    )


def judged_shares(scores: Mapping[str, Array]) -> Judged:
    """Return the judge's answers by prompt from its scores of the images, (P, S) by name."""
    clean, right = (scores[name] for name in JUDGES)
    return Judged(clean.mean(axis=1).tolist(), (clean * right).mean(axis=1).tolist())


def _reward(results: Results, candidate: CandidateSummary, name: str) -> Reward:
    against = candidate.against_base
    assert against is not None
    found = against.rewards[name]
    gain = found.overall.gain
    if gain is None or found.overall.base_sd is None:
        raise ValueError(f"{name}: all base images score the same, a gain has no unit")
    base, tuned = results.scores[against.base][name], results.scores[candidate.key][name]
    by_prompt = (tuned - base).mean(axis=1) / found.overall.base_sd
    return Reward(found.role, Estimate(gain.value, gain.low, gain.high), by_prompt.tolist())
