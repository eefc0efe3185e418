"""Evaluation of a run's LoRAs by the parts of `evaluate.py`: the same prompts, noise and sampler for all."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from am_diffusers.evaluation.statistics import Estimate
from am_diffusers.system.processes import Processes
from benching.images.records import Reward, Snapshot
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


def measure(
    study: Study, run: str, reached: Sequence[Reached], folder: Path, evaluations: Path
) -> list[Snapshot]:
    """Make and measure the images of every LoRA of a run; the base's are made once per study.

    Results of an earlier attempt at the run are removed: its LoRAs and its clock were different.

    Args:
        study: study that says how to evaluate.
        run: name of the run.
        reached: marks of the run.
        folder: folder of the run.
        evaluations: folder of the images of all runs.
    """
    for done in reached:
        _forget(evaluations, f"{run}-{done.mark.name}")
    loras = [f"{run}-{done.mark.name}={done.lora(folder)}" for done in reached]
    plan = make_plan(parse([*_arguments(study), "--lora_path", *loras, "--output_dir", str(evaluations)]))
    options = plan.options
    store = Store(evaluations, plan.settings, plan.prompts.prompts, options.num_images_per_prompt, plan.side)
    store.open(plan.candidates)
    processes, chunks = Processes(Accelerator()), range(len(store.chunks))
    make_images(plan, store, chunks, processes)
    take_measures(plan, store, chunks, processes)
    return snapshots(plan, collect(plan, store), reached)


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
        *("--rewards", *options.rewards),
        *("--num_inference_steps", str(steps), "--num_images_per_prompt", str(images)),
    ]


def snapshots(plan: Plan, results: Results, reached: Sequence[Reached]) -> list[Snapshot]:
    """Return the results of the evaluation at each mark."""
    known = replace(results, trained=trained_rewards(plan.candidates))
    summary = summarise(known)
    tuned = [candidate for candidate in summary.candidates if candidate.against_base is not None]
    return [_snapshot(known, candidate, done) for candidate, done in zip(tuned, reached, strict=True)]


def _snapshot(results: Results, candidate: CandidateSummary, done: Reached) -> Snapshot:
    against = candidate.against_base
    assert against is not None
    (kept,), (moved,) = against.diversity_kept.values(), against.frechet.values()
    return Snapshot(
        mark=done.mark.name,
        seconds=done.seconds,
        calls=done.calls,
        iterations=done.iterations,
        rewards={name: _reward(results, candidate, name) for name in against.rewards},
        diversity_kept=kept,
        frechet=moved.halves - moved.floor,
    )


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
