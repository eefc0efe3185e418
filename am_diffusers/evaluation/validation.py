"""Validation as training goes on: the same images of base and tuned model each time, scored and shown.

Every process makes its share of the images, all of them learn the scores, so that all stop together when a
score says so. `evaluation/statistics.py` defines gain (in base standard deviations) and diversity kept.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from tqdm import tqdm, trange

from am_diffusers.evaluation.certificate import Certificate
from am_diffusers.evaluation.certifier import certificate_metrics
from am_diffusers.evaluation.grids import comparison_grid, to_pil
from am_diffusers.evaluation.images import ImageId, image_ids, share_of
from am_diffusers.evaluation.pairs import PairScore, Scorer, by_prompt
from am_diffusers.evaluation.panel import draw_panel
from am_diffusers.evaluation.statistics import Array, compare, diversity, metrics_of
from am_diffusers.system.files import read_lines, write_image, write_json, write_lines
from am_diffusers.system.processes import Processes
from am_diffusers.system.text import redact_values
from am_diffusers.training.trackers import GRID, PANEL
from am_diffusers.velocity import VelocityField


class Made(NamedTuple):
    """An image of one model with its scores; the image itself is kept if the grid shows it."""

    image_id: ImageId
    scores: dict[str, float]
    features: Array | None
    image: Image.Image | None


Pair = tuple[Made, Made]
"""A base image and the tuned one from the same noise."""


@dataclass(frozen=True)
class Validation:
    """Scores fixed images of the tuned model against those of the base, which are made and scored once.

    Attributes:
        scorer: makes and scores the images.
        prompts: what the images show.
        num_in_grid: number of prompts that are shown, the first ones.
        images_per_prompt: images a prompt, each with its own fixed noise.
        roles: trained or held-out, by reward name.
        processes: share the images.
        log: receives (iteration, metrics, grid, prompts and seeds of the grid); None = not on this process.
        certify: measures the distance from the tilt; None = it isn't measured.
    """

    scorer: Scorer
    prompts: Sequence[str]
    num_in_grid: int
    images_per_prompt: int
    roles: Mapping[str, str]
    processes: Processes
    log: Callable[[int, dict[str, float], Image.Image, dict[str, object]], None] | None
    certify: Callable[[], Certificate] | None = None

    def __call__(self, iteration: int) -> dict[str, float]:
        """Validate the model after `iteration` optimizer steps.

        Returns:
            The metrics of `validation_metrics` and `certificate_metrics`, the same on all processes.

        Raises:
            ValueError: an image or score is NaN or infinite; names iteration, model and prompts.
        """
        try:
            mine = list(zip(self._base, self._make(self.scorer.tuned, "tuned"), strict=True))
        except ValueError as error:
            raise ValueError(f"iteration {iteration}: validation: {error}") from error
        found = {pair[0].image_id: pair for pair in self.processes.gather_objects(mine)}
        pairs = [found[image_id] for image_id in sorted(found)]
        scores = [PairScore.of(b.image_id, (b.scores, t.scores), (b.features, t.features)) for b, t in pairs]
        metrics = validation_metrics(scores, self.roles)
        if self.certify is not None:
            certificate = self.certify()
            metrics |= certificate_metrics(certificate)
            if self.log is not None:
                tqdm.write(f"iteration {iteration}: {certificate.verdict()}")
        if self.log is not None:
            self.log(iteration, metrics, self._grid(pairs), self._shown())
        return metrics

    def _shown(self) -> dict[str, object]:
        """Return prompts and seeds of the images in the grid, to make the same ones with Diffusers."""
        images = [
            {**image_id._asdict(), "seed": self.scorer.sampler.generator(image_id).initial_seed()}
            for image_id in image_ids(self.num_in_grid, self.images_per_prompt)
        ]
        return {"prompts": list(self.prompts[: self.num_in_grid]), "pictures": images}

    @cached_property
    def _base(self) -> list[Made]:
        return self._make(self.scorer.base, "base")

    def _make(self, field: VelocityField, name: str) -> list[Made]:
        """Make this process's share of the images."""
        size, which = self.scorer.sampler.batch_size, image_ids(len(self.prompts), self.images_per_prompt)
        mine = share_of(which, self.processes.index, self.processes.number)
        made: list[Made] = []
        quiet = True if self.log is None else None
        for start in trange(0, len(mine), size, desc=f"validation, {name}", leave=False, disable=quiet):
            batch = mine[start : start + size]
            texts = [self.prompts[image_id.prompt] for image_id in batch]
            images = self.scorer.sampler.images(field, self.prompts, batch)
            scores, features = self._score(images, texts, name)
            shown = [
                to_pil(image) if image_id.prompt < self.num_in_grid else None
                for image_id, image in zip(batch, images, strict=True)
            ]
            made.extend(map(Made, batch, scores, features, shown))
        return made

    def _score(
        self, images: Tensor, prompts: list[str], name: str
    ) -> tuple[list[dict[str, float]], list[Array | None]]:
        try:
            scores, features = self.scorer.score(images, prompts)
        except ValueError as error:
            raise ValueError(f"{name} images of {prompts}: {error}") from error
        for prompt, own in zip(prompts, scores, strict=True):
            for reward, value in own.items():
                if not math.isfinite(value):
                    raise ValueError(f"{reward} is {value} for the {name} image of {prompt!r}")
        return scores, features

    def _grid(self, pairs: Sequence[Pair]) -> Image.Image:
        sides = [[made for made in side if made.image is not None] for side in zip(*pairs, strict=True)]
        images = [[made.image for made in side if made.image is not None] for side in sides]
        base, tuned = (
            ["  ".join(f"{s:#.4g}" for s in made.scores.values()) for made in side] for side in sides
        )
        return comparison_grid(
            self.prompts[: self.num_in_grid],
            *images,
            captions=(base, tuned),
            legend=f"under each image: {', '.join(self.roles)} (higher is better)",
        )


def validation_metrics(pairs: Sequence[PairScore], roles: Iterable[str]) -> dict[str, float]:
    """Return means, gains and diversity under the names they're logged by.

    Args:
        pairs: one for every (prompt, image).
        roles: names of the rewards.

    Returns:
        For each reward `validation/NAME` and `validation/NAME_base`, the mean scores of tuned and base, and
        `validation/NAME_gain`, `_gain_low` and `_gain_high`, the paired gain in base standard deviations with
        its 95 % interval over prompts; `validation/diversity_kept`, `_low` and `_high`. What can't be
        measured is left out: a gain with one prompt or where all base images score the same, diversity
        with one image a prompt, or where those of the base are all the same.
    """
    scores, features = by_prompt(pairs)
    metrics: dict[str, float] = {}
    for name in roles:
        found = compare(scores[name][..., 0], scores[name][..., 1])
        metrics |= {f"validation/{name}": found.tuned_mean, f"validation/{name}_base": found.base_mean}
        metrics |= metrics_of(f"validation/{name}_gain", found.gain)
    if features is not None and features.shape[1] > 1:
        kept = diversity("", features[:, :, 0], features[:, :, 1]).kept
        metrics |= metrics_of("validation/diversity_kept", kept)
    return metrics


@dataclass(frozen=True)
class ValidationLog:
    """Writes the results of validations into the output folder, on the main process.

    Attributes:
        folder: output folder of the run.
        track: receives (metrics, iteration), e.g. `accelerator.log`.
        track_images: receives (images by name, iteration).
    """

    folder: Path
    track: Callable[[dict[str, float], int], None]
    track_images: Callable[[Mapping[str, Image.Image], int], None]

    def write(
        self, iteration: int, metrics: dict[str, float], grid: Image.Image, shown: Mapping[str, object]
    ) -> None:
        """Write the validation of the model after `iteration` optimizer steps.

        Args:
            iteration: optimizer steps taken.
            metrics: by the names they're logged by.
            grid: the images.
            shown: prompts and seeds of the grid, for pictures.json beside it.
        """
        samples = self.folder / "samples"
        write_json(samples / "pictures.json", redact_values(shown))
        write_image(samples / f"iteration-{iteration:06d}.png", grid)
        self._append(iteration, metrics)
        panel = draw_panel(self.folder)
        self.track(metrics, iteration)
        with Image.open(panel) as image:
            self.track_images({GRID: grid, PANEL: image.convert("RGB")}, iteration)

    def _append(self, iteration: int, metrics: dict[str, float]) -> None:
        """Write a line; that of a resumed run, which validates again, replaces those from there on."""
        path = self.folder / "validation.jsonl"
        earlier = [line for line in read_lines(path) if line["iteration"] < iteration]
        write_lines(path, [*earlier, {"iteration": iteration, **metrics}])
