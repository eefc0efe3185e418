"""Measures pictures from their files, one measure after the other: one model at a time is in memory."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from am_diffusers.evaluation import Array
from am_diffusers.processes import Processes
from evaluating.candidates import Candidate
from evaluating.measures import Measure
from evaluating.plan import Plan
from evaluating.store import Store

Units = list[tuple[Candidate, int]]


def made_from(store: Store, measure: Measure, candidate: Candidate, chunk: int) -> dict[str, object] | None:
    """What values of a chunk depend on; None while pictures are missing."""
    pictures = store.shas(candidate, chunk)
    return None if pictures is None else {"measure": measure.identity, "pictures": pictures}


def find_values(store: Store, measure: Measure, candidate: Candidate, chunk: int) -> Array | None:
    """Values (n, ...) of a chunk; None if they aren't there or belong to other pictures."""
    depends_on = made_from(store, measure, candidate, chunk)
    if depends_on is None:
        return None
    return store.load_values(store.values_file(measure.kind, candidate, measure.name, chunk), depends_on)


def unmeasured(store: Store, measure: Measure, share: Sequence[tuple[Candidate, list[int]]]) -> Units:
    """The chunks of the share that `measure` has no values of."""
    return [
        (candidate, chunk)
        for candidate, chunks in share
        for chunk in chunks
        if find_values(store, measure, candidate, chunk) is None
    ]


@torch.no_grad()
def measure_units(store: Store, measure: Measure, units: Units, plan: Plan, processes: Processes) -> None:
    """Measure chunks whose pictures are there, and write the values.

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
            raise ValueError(f"pictures of {candidate.key} vanished while they were measured: run this again")
        images = torch.stack([read_picture(store.picture(candidate, picture)) for picture in pictures])
        values = function(images, [prompts[picture.prompt] for picture in pictures]).detach().cpu()
        for picture, value in zip(pictures, values, strict=True):
            if not value.isfinite().all():
                raise ValueError(
                    f"{measure.name} gives {value} for {store.picture(candidate, picture)} "
                    f"({prompts[picture.prompt]!r}): look at the picture; everything measured before is kept"
                )
        array = values.double().numpy() if measure.kind == "rewards" else values.float().numpy()
        store.save_values(store.values_file(measure.kind, candidate, measure.name, chunk), array, depends_on)


def read_picture(file: str | object) -> Tensor:
    """An 8-bit RGB picture file as (3, H, W) in [0, 1]."""
    with Image.open(str(file)) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1).contiguous()
