"""Measures images from their files, one measure after the other: one model at a time is in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from am_diffusers.evaluation.statistics import Array
from am_diffusers.system.processes import Processes
from evaluating.candidates import Candidate
from evaluating.image_files import read_image
from evaluating.measuring.measures import Measure
from evaluating.plan import Plan
from evaluating.store import Store

Units = list[tuple[Candidate, int]]


def units_of(measure: Measure, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Units:
    """Return the chunks that `measure` is taken of: all, or for changes only of tuned candidates."""
    wanted = [each for each in candidates if measure.kind != "changes" or not each.is_base]
    return [(candidate, chunk) for candidate in wanted for chunk in chunks]


def made_from(store: Store, measure: Measure, candidate: Candidate, chunk: int) -> dict[str, object] | None:
    """Return what values of a chunk depend on; None while images are missing."""
    images = store.shas(candidate, chunk)
    base = store.shas(candidate.base, chunk) if measure.kind == "changes" else {}
    if images is None or base is None:
        return None
    return {"measure": measure.identity, "pictures": images, "base": base}


def find_values(store: Store, measure: Measure, candidate: Candidate, chunk: int) -> Array | None:
    """Return values (n, ...) of a chunk; None if they aren't there or belong to other images."""
    depends_on = made_from(store, measure, candidate, chunk)
    if depends_on is None:
        return None
    return store.load_values(store.values_file(measure.kind, candidate, measure.name, chunk), depends_on)


def unmeasured(store: Store, measure: Measure, units: Units) -> Units:
    """Return the units that `measure` has no values of."""
    return [unit for unit in units if find_values(store, measure, *unit) is None]


@torch.no_grad()
def measure_units(store: Store, measure: Measure, units: Units, plan: Plan, processes: Processes) -> None:
    """Measure chunks whose images are there, and write the values.

    Raises:
        ValueError: a model is missing or doesn't fit, or a value isn't finite; what was measured is kept.
        Interrupted: a signal came.
    """
    prompts = plan.prompts.prompts
    function = measure.load(processes.accelerator.device, plan.options.batch_size, prompts)
    for candidate, chunk in tqdm(units, desc=measure.name, disable=None):
        processes.poll()
        pictures = store.chunks[chunk]
        depends_on = made_from(store, measure, candidate, chunk)
        if depends_on is None:
            raise ValueError(f"images of {candidate.key} vanished while they were measured: run this again")
        texts = [prompts[picture.prompt] for picture in pictures]
        images = read_images(store, candidate, chunk)
        base = read_images(store, candidate.base, chunk) if measure.kind == "changes" else images
        values = function(images, texts, base).detach().cpu()
        for picture, value in zip(pictures, values, strict=True):
            if not value.isfinite().all():
                raise ValueError(
                    f"{measure.name} gives {value} for {store.image(candidate, picture)} "
                    f"({prompts[picture.prompt]!r}): look at the image; everything measured before is kept"
                )
        array = values.float().numpy() if measure.kind == "features" else values.double().numpy()
        store.save_values(store.values_file(measure.kind, candidate, measure.name, chunk), array, depends_on)


def read_images(store: Store, candidate: Candidate, chunk: int) -> Tensor:
    """Read images (n, 3, H, W) in [0, 1] of a chunk."""
    return torch.stack([read_image(store.image(candidate, image)) for image in store.chunks[chunk]])
