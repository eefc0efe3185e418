"""An evaluation from plan to report: pictures, measures, and the results when nothing is missing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from am_diffusers.processes import Processes
from evaluating.candidates import Candidate
from evaluating.finish import collect, missing_units, write_scores
from evaluating.generate import Generator, load_model, missing_batches
from evaluating.notes import make_notes, trained_rewards
from evaluating.plan import Plan
from evaluating.renderings import to_markdown
from evaluating.report import write_report
from evaluating.score import measure_units, unmeasured
from evaluating.store import Store
from evaluating.summarising import summarise
from evaluating.summary import SUMMARY_FILE, write_summary
from evaluating.tables import comparison_table, write_tables
from evaluating.work import Share

Chunks = Sequence[tuple[Candidate, list[int]]]


def evaluate(plan: Plan, processes: Processes) -> Iterator[str]:
    """Do this process's share, then on the main process what can be concluded; yields lines to print.

    Raises:
        ValueError: what is wrong and what to do about it; everything written before is kept.
        Interrupted: a signal came.
    """
    options = plan.options
    store = Store(
        options.output_dir, plan.settings, len(plan.prompts), options.num_images_per_prompt, plan.side
    )
    processes.on_main(lambda: store.open(plan.candidates))
    index, number = options.shard
    share = Share(index * processes.number + processes.index, number * processes.number)
    chunks = share.of(plan.candidates, len(store.chunks))
    with processes.together():
        make_pictures(plan, store, chunks, processes)
        take_measures(plan, store, chunks, processes)
    if not processes.is_main:
        return
    missing = missing_units(plan, store)
    if missing:
        yield (
            f"this share is done; of others {missing} chunks are missing: the last one to finish writes the "
            "results, or this command without --shard"
        )
        return
    yield from conclude(plan, store)


def make_pictures(plan: Plan, store: Store, chunks: Chunks, processes: Processes) -> None:
    """Make the pictures of this share that are missing; no model is loaded if there are none."""
    batches = missing_batches(store, chunks, plan.options.batch_size)
    if not batches:
        return
    # What would fail after hours of pictures shall fail now.
    for measure in plan.measures:
        measure.load(processes.accelerator.device, plan.options.batch_size, plan.prompts.prompts)
    model = load_model(plan, batches, processes.accelerator.device)
    generator = Generator(plan, store, model)
    generator.check_loras(plan.candidates)
    model.before_pass = processes.poll
    generator.make(batches)


def take_measures(plan: Plan, store: Store, chunks: Chunks, processes: Processes) -> None:
    """Take every measure of this share that is missing."""
    for measure in plan.measures:
        units = unmeasured(store, measure, chunks)
        if units:
            measure_units(store, measure, units, plan, processes)


def conclude(plan: Plan, store: Store) -> Iterator[str]:
    """Write scores, summary, tables and report of a complete evaluation."""
    results = replace(collect(plan, store), trained=trained_rewards(plan.candidates), notes=make_notes(plan))
    yield from results.notes
    write_scores(results, store)
    summary = summarise(results)
    write_summary(summary, store.folder / SUMMARY_FILE)
    write_tables(summary, store.folder)
    yield to_markdown(comparison_table(summary))
    file = write_report(
        results, summary, store.folder / "report.html", max_prompts=plan.options.report_prompts
    )
    yield f"report: {file.resolve()}"
