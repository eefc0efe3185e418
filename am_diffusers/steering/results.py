"""The output folder: images named as evaluations name them, what they start from, numbers.

pictures/NAME-stepsN-guidanceG/00012-003.png           prompt 12, image 3
inputs/NAME-stepsN-guidanceG/00012-003.safetensors     arguments of the pipeline's own call
results.json                                           settings, scores, traces, network passes, seconds
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from am_diffusers.evaluation.grids import to_pil
from am_diffusers.evaluation.images import ImageId
from am_diffusers.evaluation.statistics import Array, compare
from am_diffusers.system.files import write_image, write_whole
from am_diffusers.velocity import Conditioning

RESULTS = "results.json"
SAVED_AS = {"embeddings": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
"""Arguments of a pipeline's call by the names of their parts in `Conditioning`."""
BASE = "base"


def stem(image: ImageId) -> str:
    """Return the name of an image's files."""
    return f"{image.prompt:05d}-{image.image:03d}"


@dataclass
class Candidate:
    """One way to make the images.

    Attributes:
        name: `base`, or what was done.
        scores: scores by reward, of image (prompt, image).
        passes: network passes of one image; a forward and a backward pass count one each.
        seconds: wall-clock time of all images.
        notes: what to know of it, one line each.
        details: more numbers by image, plain JSON values.
    """

    name: str
    scores: dict[str, dict[ImageId, float]] = field(default_factory=dict)
    passes: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)

    def add(self, which: Sequence[ImageId], scores: Mapping[str, Sequence[float]]) -> None:
        """Add the scores of images."""
        for name, values in scores.items():
            self.scores.setdefault(name, {}).update(zip(which, values, strict=True))

    def table(self, reward: str) -> Array:
        """Return the scores of a reward, (prompts, images a prompt)."""
        found = self.scores[reward]
        prompts = sorted({image.prompt for image in found})
        return np.array([[found[key] for key in sorted(found) if key.prompt == p] for p in prompts])

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {
            "name": self.name,
            "passes_per_image": self.passes,
            "seconds": round(self.seconds, 2),
            "scores": {name: self.table(name).tolist() for name in self.scores},
            "notes": self.notes,
            **self.details,
        }


@dataclass(frozen=True)
class Folder:
    """An output folder of images made at one number of steps and guidance."""

    root: Path
    num_inference_steps: int
    guidance_scale: float

    def key(self, name: str) -> str:
        """Return the name of a candidate's folders."""
        return f"{name}-steps{self.num_inference_steps}-guidance{self.guidance_scale:g}"

    def save(self, name: str, which: Sequence[ImageId], images: Tensor) -> None:
        """Write images (N, 3, H, W) in [0, 1]."""
        for image_id, image in zip(which, images, strict=True):
            file = self.root / "pictures" / self.key(name) / f"{stem(image_id)}.png"
            write_image(file, to_pil(image))

    def save_inputs(
        self, name: str, which: Sequence[ImageId], noise: Tensor, cond: Conditioning, *, embeddings: bool
    ) -> None:
        """Write what a call of the pipeline takes: `latents`, and embeddings if they were moved."""
        for row, image_id in enumerate(which):
            parts = {"latents": noise[row : row + 1]}
            for part, argument in SAVED_AS.items() if embeddings else ():
                value = getattr(cond, part)
                if value is not None:
                    parts[argument] = value[row : row + 1]
            saved = {key: value.detach().float().cpu().contiguous() for key, value in parts.items()}
            about = {"prompt": cond.prompts[row]}
            file = self.root / "inputs" / self.key(name) / f"{stem(image_id)}.safetensors"
            write_whole(file, lambda part, saved=saved, about=about: save_file(saved, part, metadata=about))


def table_of(candidates: Sequence[Candidate], roles: Mapping[str, str]) -> list[str]:
    """Return a Markdown table: network passes, seconds and scores of each candidate, gains over the base.

    Args:
        candidates: the base first.
        roles: `climbed` or `held-out` by reward name, in the order of the columns.
    """
    header = ["", "passes an image", "seconds", *(f"{name} ({role})" for name, role in roles.items())]
    lines = [" | ".join(["", *header, ""]).strip(), "|" + "---|" * len(header)]
    base = candidates[0]
    for each in candidates:
        cells = [each.name, f"{each.passes:.0f}", f"{each.seconds:.0f}"]
        for name in roles:
            scores = each.table(name)
            found = None if each is base else compare(base.table(name), scores).difference
            cells.append(f"{scores.mean():.4g}" + (f" ({found.text('+.3g')})" if found else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines
