"""An evaluation from plan to report: images, measures, and the results when nothing is missing."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch

from am_diffusers.evaluation.images import ImageId
from am_diffusers.evaluation.statistics import Array
from am_diffusers.prompts.presets import describe_source
from am_diffusers.system.processes import Processes
from evaluating.generate import Generator, load_model, missing_batches
from evaluating.layouts import export_layout
from evaluating.measuring.references import find_references, reference_features
from evaluating.measuring.values import measure_units, units_of, unmeasured
from evaluating.notes import make_notes
from evaluating.plan import Plan
from evaluating.report.page import write_report
from evaluating.runs import targets, trained_rewards
from evaluating.store import Store
from evaluating.summary.collect import collect, missing_units, write_scores
from evaluating.summary.summarising import summarise
from evaluating.summary.summary import SUMMARY_FILE, write_summary
from evaluating.tables.renderings import to_markdown
from evaluating.tables.tables import comparison_table, write_tables


def evaluate(plan: Plan, processes: Processes) -> Iterator[str]:
    """Do this process's share, then on the main process what can be concluded; yield lines to print.

    Raises:
        ValueError: what is wrong and what to do about it; everything written before is kept.
        Interrupted: a signal came.
    """
    options = plan.options
    store = Store(
        options.output_dir, plan.settings, plan.prompts.prompts, options.num_images_per_prompt, plan.size
    )
    processes.on_main(lambda: store.open(plan.candidates))
    notes = make_notes(plan)
    yield from notes
    index, number = options.shard
    # A chunk belongs to one process for all candidates: then it has both images of every pair.
    chunks = range(len(store.chunks))[index * processes.number + processes.index :: number * processes.number]
    with processes.together():
        make_images(plan, store, chunks, processes)
        take_measures(plan, store, chunks, processes)
    if not processes.is_main:
        return
    missing = missing_units(plan, store)
    if missing:
        yield (
            f"this share is done; {missing} chunks of others are missing: the last share to finish writes "
            "the results, or run this command without --shard"
        )
        return
    yield from conclude(plan, store, notes, processes)


def make_images(plan: Plan, store: Store, chunks: Sequence[int], processes: Processes) -> None:
    """Make the images of these chunks that are missing; no model is loaded if there are none."""
    # Values that were measured are kept if the image made again has the same checksum.
    units = unmeasured(store, plan.measures[0], units_of(plan.measures[0], plan.candidates, chunks))
    batches = missing_batches(store, units, plan.options.batch_size)
    if not batches:
        return
    # What would fail after hours must fail now.
    for measure in plan.measures:
        measure.load(processes.accelerator.device, plan.options.batch_size, plan.prompts.prompts)
    model = load_model(plan, batches, processes.accelerator.device)
    generator = Generator(plan, store, model)
    generator.check()
    model.before_pass = processes.poll
    generator.make(batches)
    # Model and fields refer to each other: without this they would stay while the rewards need the room.
    del model, generator
    gc.collect()
    torch.cuda.empty_cache()


def take_measures(plan: Plan, store: Store, chunks: Sequence[int], processes: Processes) -> None:
    """Take every measure of these chunks that is missing."""
    for measure in plan.measures:
        units = unmeasured(store, measure, units_of(measure, plan.candidates, chunks))
        if units:
            measure_units(store, measure, units, plan, processes)


def conclude(plan: Plan, store: Store, notes: Sequence[str], processes: Processes) -> Iterator[str]:
    """Write scores, summary, tables, layouts and report of a complete evaluation.

    Without a LoRA there is nothing to compare, hence no report.
    """
    results = replace(
        collect(plan, store),
        settings={"prompt_source": describe_source(plan.options.prompts), **store.settings},
        reference_features=references(plan, store, processes),
        trained=trained_rewards(plan.candidates),
        targets=targets(plan.candidates),
        reward_models={
            m.name: f"{m.model} {m.weights}".strip() for m in plan.measures if m.kind == "rewards"
        },
        notes=tuple(notes),
    )
    write_scores(results, store)
    summary = summarise(results)
    write_summary(summary, store.folder / SUMMARY_FILE)
    write_tables(summary, store.folder)
    yield to_markdown(comparison_table(summary))
    for layout, candidate in product(plan.options.layouts, plan.candidates):
        images = [
            [store.image(candidate, ImageId(prompt, image)) for image in range(store.images_per_prompt)]
            for prompt in range(len(store.prompts))
        ]
        export_layout(layout, store.folder / "layouts" / layout / candidate.key, plan.prompts, images)
    if not results.tuned:
        return
    file = write_report(
        results, summary, store.folder / "report.html", max_prompts=plan.options.report_prompts
    )
    yield f"report: {file.resolve()}"


def references(plan: Plan, store: Store, processes: Processes) -> dict[str, Array]:
    """Return the features of the reference images by name, if there are any."""
    folder = plan.options.reference_pictures
    if folder is None:
        return {}
    features = [measure for measure in plan.measures if measure.kind == "features"]
    files = find_references(folder, features)
    return {each.name: reference_features(store, each, files, processes) for each in features}
