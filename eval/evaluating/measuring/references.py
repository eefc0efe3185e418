"""Reference images that others are compared with as a set: photographs, for instance."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from am_diffusers.evaluation.statistics import Array
from am_diffusers.system.files import is_hidden, sha256
from am_diffusers.system.processes import Processes
from evaluating.image_files import check_image, read_image
from evaluating.measuring.measures import Measure
from evaluating.store import Store

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def find_references(folder: Path, features: Sequence[Measure]) -> list[Path]:
    """Find the image files in a folder and below it, without hidden ones.

    Raises:
        ValueError: fewer than 2, one of a format or mode that isn't read, or no features to compare.
    """
    found = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    files = sorted(file for file in found if file.is_file() and not is_hidden(file, folder))
    if len(files) < 2:
        raise ValueError(f"--reference_pictures {folder}: expected at least 2 of {', '.join(PICTURES)}")
    if not features:
        raise ValueError("--reference_pictures: nothing to compare them by, name some --features")
    for file in files:
        check_image(file)
    return files


@torch.no_grad()
def reference_features(store: Store, measure: Measure, files: Sequence[Path], processes: Processes) -> Array:
    """Compute the features (N, D) of image files of any sizes; they are kept for the next time.

    Raises:
        ValueError: one can't be read.
    """
    seen = [sha256(file) for file in files]
    depends_on = {"measure": measure.identity, "pictures": seen, "read": "upright, on white"}
    kept = store.folder / "features" / "reference" / f"{measure.name}.safetensors"
    found = store.load_values(kept, depends_on)
    if found is not None:
        return found
    function = measure.load(processes.accelerator.device, 1, ())
    rows = []
    for file in tqdm(files, desc=f"{measure.name} of reference images", disable=None):
        processes.poll()
        image = read_image(file)[None]
        rows.append(function(image, [""], image))
    features = torch.cat(rows).float().cpu().numpy()
    store.save_values(kept, features, depends_on)
    return features
