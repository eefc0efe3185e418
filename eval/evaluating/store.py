"""The output folder: images, what was measured on them, and what they depend on.

    settings.json                          what all images depend on
    pictures/CANDIDATE/candidate.json      what this candidate's images depend on: the LoRA's sha256
    pictures/CANDIDATE/00012-003.png       prompt 12, image 3; its text chunk `am_diffusers` has the prompt
    rewards/CANDIDATE/NAME/00004.safetensors    values of the images of chunk 4, and of which files they are
    features/..., changes/...              image features, and distances to the base's images, likewise

Every file is whole or not there and says what it was made from, so any number of machines may work on one
folder, be killed at any moment and resume. A chunk is the unit of sharing: CHUNK images of one candidate,
the same whatever the batch size and the number of machines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from am_diffusers.evaluation.grids import to_pil
from am_diffusers.evaluation.images import PURPOSE, ImageId, image_ids
from am_diffusers.models.lora_files import sources_of
from am_diffusers.noise import generator_for
from am_diffusers.system.files import sha256, write_json, write_whole
from am_diffusers.system.resolution import Resolution
from am_diffusers.transitions import TRANSITIONS
from evaluating.candidates import Candidate

CHUNK = 16
TEXT = "am_diffusers"
RESULTS = (
    "report.html",
    "summary.json",
    "scores.jsonl",
    *(f"comparison.{end}" for end in ("md", "tex", "csv")),
)
"""Files of a complete evaluation beside `settings.json`, which is written first."""
REMEDY = "choose another --output_dir, or the settings it was made with"


@dataclass(frozen=True)
class Store:
    """An output folder.

    Attributes:
        folder: where it is.
        settings: plain JSON values that all images depend on.
        prompts: P texts.
        images_per_prompt: S, number of images per prompt.
        size: width and height of the images.
    """

    folder: Path
    settings: Mapping[str, Any]
    prompts: Sequence[str]
    images_per_prompt: int
    size: Resolution
    _hashed: dict[Path, tuple[tuple[int, ...], str]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def chunks(self) -> tuple[tuple[ImageId, ...], ...]:
        """All P * S images, CHUNK at a time."""
        which = image_ids(len(self.prompts), self.images_per_prompt)
        return tuple(tuple(which[start : start + CHUNK]) for start in range(0, len(which), CHUNK))

    def open(self, candidates: Sequence[Candidate]) -> None:
        """Start the folder, or continue in it.

        Raises:
            ValueError: it holds images made with other settings or another LoRA; says which.
        """
        settings = self.folder / "settings.json"
        foreign = [] if settings.exists() else [name for name in RESULTS if (self.folder / name).exists()]
        if foreign:
            raise ValueError(
                f"--output_dir {self.folder} holds {', '.join(foreign)}, which no evaluation wrote there and "
                "this one would replace: move what is yours, or choose another folder"
            )
        self._agree(settings, dict(self.settings))
        for candidate in candidates:
            self.check_lora(candidate)

    def check_lora(self, candidate: Candidate) -> None:
        """Raise ValueError if its LoRA isn't the one that its images here were made with."""
        made_from = {
            "name": candidate.name,
            "lora_sha256": None if candidate.lora is None else self._sha_of_lora(candidate.lora),
            "lora_scale": candidate.lora_scale,
            "num_inference_steps": candidate.num_inference_steps,
            "guidance_scale": candidate.guidance_scale,
        }
        self._agree(self.folder / "pictures" / candidate.key / "candidate.json", made_from)

    def image(self, candidate: Candidate, image: ImageId) -> Path:
        """Return the file of an image."""
        name = f"{image.prompt:05d}-{image.image:03d}.png"
        return self.folder / "pictures" / candidate.key / name

    def about(self, candidate: Candidate, image: ImageId) -> dict[str, object]:
        """Describe an image: prompt, candidate, and the seed of its starting noise."""
        generator = generator_for(self.settings["seed"], PURPOSE, *image)
        return {
            "prompt": self.prompts[image.prompt],
            "candidate": candidate.key,
            "seed": generator.initial_seed(),
        }

    def save_image(
        self, candidate: Candidate, picture: ImageId, image: Tensor, path_kl: float | None
    ) -> None:
        """Write an image (3, H, W) in [0, 1] as an 8-bit PNG with a text about it; path KL in nats."""
        about = self.about(candidate, picture) | ({} if path_kl is None else {"path_kl": path_kl})
        info = PngImagePlugin.PngInfo()
        info.add_itxt(TEXT, json.dumps(about, allow_nan=False))

        def write(part: Path) -> None:
            to_pil(image).save(part, format="PNG", pnginfo=info)

        write_whole(self.image(candidate, picture), write)

    def damage(self, candidate: Candidate, picture: ImageId) -> str | None:
        """Return what is wrong with an image's file: None = nothing, "" = it isn't there."""
        file = self.image(candidate, picture)
        if not file.exists():
            return ""
        try:
            with Image.open(file) as image:
                image.verify()  # checksums
            with Image.open(file) as image:
                about = read_about(image)
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            return repr(error)
        if (image.size, image.mode) != (self.size, "RGB"):
            return f"it is {image.mode} of {Resolution(*image.size)}, not RGB of {self.size}"
        expected = self.about(candidate, picture)
        if {name: about.get(name) for name in expected} != expected:
            return f"it is an image of {about}, not of {expected}"
        if self.has_path_kl(candidate) and "path_kl" not in about:
            return "it lacks its path KL"
        return None

    def has_path_kl(self, candidate: Candidate) -> bool:
        """Return whether a candidate's images come with their path KL."""
        return not candidate.is_base and is_stochastic_table(self.settings["sampler"])

    def path_kl(self, candidate: Candidate, picture: ImageId) -> float:
        """Return the path KL of an image in nats, from its text."""
        with Image.open(self.image(candidate, picture)) as image:
            return read_about(image)["path_kl"]

    def values_file(self, kind: str, candidate: Candidate, name: str, chunk: int) -> Path:
        """Return the file of what was measured on a chunk: `kind` rewards, features or changes, by `name`."""
        return self.folder / kind / candidate.key / name / f"{chunk:05d}.safetensors"

    def save_values(self, file: Path, values: np.ndarray, made_from: Mapping[str, object]) -> None:
        """Write values (n, ...) and what they were made from."""
        header = {"made_from": json.dumps(made_from, sort_keys=True)}
        array = {"values": np.ascontiguousarray(values)}
        write_whole(file, lambda part: save_file(array, part, metadata=header))

    def load_values(self, file: Path, made_from: Mapping[str, object]) -> np.ndarray | None:
        """Load values (n, ...); None if they are missing, damaged, or made from something else."""
        try:
            with safe_open(file, framework="numpy") as opened:
                header = opened.metadata() or {}
                if header.get("made_from") != json.dumps(made_from, sort_keys=True):
                    return None
                return opened.get_tensor("values")
        except (OSError, SafetensorError):
            return None

    def shas(self, candidate: Candidate, chunk: int) -> dict[str, str] | None:
        """Return the SHA-256 of the files of a chunk by name; None if one isn't there."""
        files = [self.image(candidate, image) for image in self.chunks[chunk]]
        if not all(file.exists() for file in files):
            return None
        return {file.name: self._sha(file) for file in files}

    def _sha_of_lora(self, lora: Path) -> str:
        """Return the SHA-256 of a LoRA file, with that of PEFT's configuration beside it."""
        return "+".join(self._sha(file) for file in sources_of(lora))

    def _sha(self, file: Path) -> str:
        """Return the SHA-256 of a file, read once unless it changes: every measure asks for it again."""
        stat = file.stat()
        state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if file not in self._hashed or self._hashed[file][0] != state:
            self._hashed[file] = (state, sha256(file))
        return self._hashed[file][1]

    def _agree(self, file: Path, expected: dict[str, Any]) -> None:
        if not file.exists():
            write_json(
                file, expected, once=True
            )  # another machine may have started with other settings just now
        try:
            found = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): choose another --output_dir") from error
        differ = [
            f"{key} was {found.get(key)!r}, now {expected.get(key)!r}"
            for key in {**expected, **found}
            if found.get(key) != expected.get(key)
        ]
        if differ:
            raise ValueError(f"{file.parent} holds results of something else: {'; '.join(differ)}. {REMEDY}")


def is_stochastic_table(sampler: str) -> bool:
    """Return whether images by a sampler come with their path KL."""
    return sampler in TRANSITIONS and sampler != "ode_euler"


def read_about(image: Image.Image) -> dict[str, Any]:
    """Read what `Store.save_image` wrote about an image.

    Raises:
        ValueError: if there is no such text.
    """
    text = image.info.get(TEXT)  # it stands before the pixels, which needn't be read for it
    if text is None:
        raise ValueError(f"no text {TEXT!r} in it: made by something else")
    return json.loads(text)
