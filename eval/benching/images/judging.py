"""Likeness to real images: a judge that no reward and no fine-tuning had a part in.

Held-out rewards of the trained one's family can be fooled together with it. So images are also compared
with real ones of the same captions, by the features of a classifier that was trained on photographs:

- likeness: mean cosine of an image's features with those of the real images of its caption, the image
  similarity of subject-driven generation (Ruiz et al., DreamBooth, arXiv:2208.12242, section 4.1). One number
  an image, so it has gains in base standard deviations and intervals over prompts, as rewards have;
- the squared Frechet distance of all images from all real ones, a number without an interval.

Half of the real images judge. As many of the other half as there are generated ones are judged, too. Those
of the embedded set are one drawing per caption, placed and mirrored at random: no model will be as similar.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from am_diffusers.evaluation.statistics import Array, compare
from am_diffusers.system.files import digest, sha256
from benching.images.likeness import Judged, RunLikeness, likeness_file, write_likeness
from benching.images.records import record_file
from benching.images.work import Work
from evaluating.measuring.features import EfficientNet
from evaluating.measuring.weights import fingerprint
from evaluating.store import read_about, read_image
from evaluating.summary.frechet import frechet_distance

BATCH = 64
PICTURE = re.compile(r"(\d{5})-(\d{3})\.png")


class Judge:
    """Real images and the base's, to compare others with.

    Args:
        real: folder of `scripts/assets/compose_pictures.py` for the same prompts.
        base: folder of the base's images, (P, S).

    Attributes:
        identity: fingerprints of all that a judgement depends on beside the judged images.
        base: the base's images, judged.
        real: other real images, judged.

    Raises:
        ValueError: the features' package is missing, fewer real images than it takes, or of other prompts.
    """

    def __init__(self, real: Path, base: Path) -> None:
        self._network = EfficientNet.from_pretrained()
        self._base, every = self._features(base), self._features(real)
        prompts, images, _ = self._base.shape
        if every.shape[0] != prompts or every.shape[1] < 2 * images:
            raise ValueError(
                f"--real_pictures {real}: expected at least {2 * images} images of each of {prompts} "
                f"prompts, found {every.shape[1]} of {every.shape[0]}"
            )
        for shown, expected in zip(_prompts(real), _prompts(base), strict=True):
            if shown != expected:
                raise ValueError(f"--real_pictures {real}: expected images of {expected!r}, found {shown!r}")
        half = every.shape[1] // 2
        self._real = every[:, :half]
        self.identity = {
            "features": fingerprint(EfficientNet.released),
            "real": _digest(real),
            "base": _digest(base),
        }
        self.base, self.real = self._judge(self._base), self._judge(every[:, half : half + images])

    def judge(self, folder: Path) -> Judged:
        """Judge the images in a folder, made from the same prompts and noise as the base's.

        Raises:
            ValueError: if their number isn't the base's.
        """
        features = self._features(folder)
        if features.shape != self._base.shape:
            raise ValueError(f"{folder}: {features.shape[:2]} images, the base has {self._base.shape[:2]}")
        return self._judge(features)

    def _judge(self, features: Array) -> Judged:
        found = compare(self._likeness(self._base), self._likeness(features))
        if found.gain is None or found.base_sd is None:
            raise ValueError("all base images are equally like the real ones, a gain has no unit")
        by_prompt = (self._likeness(features) - self._likeness(self._base)).mean(axis=1) / found.base_sd
        flat = (each.reshape(-1, each.shape[-1]) for each in (features, self._real))
        return Judged(found.gain, by_prompt.tolist(), frechet_distance(*flat))

    def _likeness(self, features: Array) -> Array:
        """Return the mean cosine with the caption's real images, (P, S)."""
        return np.einsum("psd,pd->ps", _unit(features), _unit(self._real).mean(axis=1))

    @torch.no_grad()
    def _features(self, folder: Path) -> Array:
        """Return the features of the images of a folder, (P, S, D)."""
        files = image_files(folder)
        rows = []
        for start in range(0, len(files), BATCH):
            images = [read_image(file) for file in files[start : start + BATCH]]
            if any(each.shape != images[0].shape for each in images):
                raise ValueError(f"{folder}: images of different sizes")
            rows.append(self._network.image_features(torch.stack(images)))
        features = torch.cat(rows).double().numpy()
        return features.reshape(len({file.name[:5] for file in files}), -1, features.shape[-1])


def _unit(features: Array) -> Array:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _digest(folder: Path) -> str:
    return digest({file.name: sha256(file) for file in image_files(folder)})


def _prompts(folder: Path) -> list[str]:
    """Return the prompts that the images of a folder show, in order.

    Raises:
        ValueError: one doesn't say, or images of one prompt say different things.
    """
    prompts: dict[str, str] = {}
    for file in image_files(folder):
        try:
            with Image.open(file) as image:
                shown = read_about(image)["prompt"]
        except ValueError as error:
            raise ValueError(
                f"{file}: {error}; scripts/assets/compose_pictures.py makes what is expected"
            ) from error
        if prompts.setdefault(file.name[:5], shown) != shown:
            raise ValueError(f"{file}: an image of {shown!r} beside those of {prompts[file.name[:5]]!r}")
    return list(prompts.values())


def image_files(folder: Path) -> list[Path]:
    """Return images 00012-003.png (prompt 12, image 3) of a folder, prompt by prompt.

    Raises:
        ValueError: there are none, or prompts have different numbers of them.
    """
    files = sorted(file for file in folder.glob("*.png") if PICTURE.fullmatch(file.name))
    images: dict[str, list[str]] = {}
    for file in files:
        images.setdefault(file.name[:5], []).append(file.name[6:])
    if not files or any(each != images[min(images)] for each in images.values()):
        raise ValueError(
            f"{folder}: expected images like 00012-003.png, equally many of each prompt, found {len(files)}"
        )
    return files


def judge_images(work: Work, real: Path) -> Iterator[str]:
    """Judge the images of the runs that are compared by these real ones; yield what was done, run by run.

    Runs whose images aren't on this disk are left as they are.

    Args:
        work: a study.
        real: folder of real images, see `Judge`.

    Raises:
        ValueError: the real images don't fit, or a committed likeness can't be read.
    """
    judge = None
    for record in (record for records in work.compared().values() for record in records):
        name, known = f"{record.setting}-seed{record.seed}", work.likeness(record.setting, record.seed)
        folders = {
            each.mark: work.images(record.setting, record.seed, each.mark) for each in record.snapshots
        }
        if not all(folder.exists() for folder in folders.values()):
            yield f"{name}: not judged, its images aren't in {work.outputs}"
            continue
        judge = judge or Judge(real, work.base_images)
        if known is not None and known.judge == judge.identity:
            yield f"{name}: judged before"
            continue
        marks = {mark: judge.judge(folder) for mark, folder in folders.items()}
        file = likeness_file(record_file(work.data, record.setting, record.seed))
        write_likeness(RunLikeness(judge.identity, judge.base, judge.real, marks), file)
        yield f"{name}: judged"
