"""The output folder: pictures, what was measured on them, and what they depend on.

    settings.json                          what all pictures depend on
    pictures/CANDIDATE/candidate.json      what this candidate's pictures depend on: the LoRA's sha256
    pictures/CANDIDATE/00012-003.png       prompt 12, picture 3; its text chunk `am_diffusers` has the prompt
    rewards/CANDIDATE/NAME/00004.safetensors    values of the pictures of chunk 4, and of which files they are
    features/..., changes/...              image features, and distances to the base's pictures, likewise

Every file is whole or not there and says what it was made from, so any number of machines may work on one
folder, be killed at any moment and go on. A chunk is the unit of sharing: CHUNK pictures of one candidate,
the same whatever the batch size and the number of machines.
"""

import hashlib
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

from am_diffusers.checkpoint import sha256
from am_diffusers.grids import to_pil
from am_diffusers.samples import Picture, pictures_of
from evaluating.candidates import Candidate
from evaluating.files import write_json, write_whole

CHUNK = 16
TEXT = "am_diffusers"
REMEDY = "choose another --output_dir, or the settings it was made with"


@dataclass(frozen=True)
class Store:
    """An output folder.

    Attributes:
        folder: where it is.
        settings: plain JSON values that all pictures depend on.
        num_prompts: P.
        images_per_prompt: S.
        side: pictures are side x side pixels.
    """

    folder: Path
    settings: Mapping[str, Any]
    num_prompts: int
    images_per_prompt: int
    side: int
    _hashed: dict[Path, tuple[tuple[int, ...], str]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def chunks(self) -> tuple[tuple[Picture, ...], ...]:
        """All P * S pictures, CHUNK at a time."""
        which = pictures_of(self.num_prompts, self.images_per_prompt)
        return tuple(tuple(which[start : start + CHUNK]) for start in range(0, len(which), CHUNK))

    def open(self, candidates: Sequence[Candidate]) -> None:
        """Start the folder, or go on in it.

        Raises:
            ValueError: it holds pictures made with other settings or another LoRA; says which.
        """
        self._agree(self.folder / "settings.json", dict(self.settings))
        for candidate in candidates:
            made_from = {
                "name": candidate.name,
                "lora_sha256": None if candidate.lora is None else sha256(candidate.lora),
                "lora_scale": candidate.lora_scale,
                "num_inference_steps": candidate.num_inference_steps,
                "guidance_scale": candidate.guidance_scale,
            }
            self._agree(self.folder / "pictures" / candidate.key / "candidate.json", made_from)

    def picture(self, candidate: Candidate, picture: Picture) -> Path:
        """File of a picture."""
        name = f"{picture.prompt:05d}-{picture.image:03d}.png"
        return self.folder / "pictures" / candidate.key / name

    def save_picture(
        self, candidate: Candidate, picture: Picture, image: Tensor, about: Mapping[str, object]
    ) -> None:
        """Write a picture (3, H, W) in [0, 1] as an 8-bit PNG with a text about it."""
        info = PngImagePlugin.PngInfo()
        info.add_itxt(TEXT, json.dumps(about, allow_nan=False))

        def write(part: Path) -> None:
            to_pil(image).save(part, format="PNG", pnginfo=info)

        write_whole(self.picture(candidate, picture), write)

    def damage(self, candidate: Candidate, picture: Picture) -> str | None:
        """What is wrong with a picture's file: None = nothing, "" = it isn't there."""
        file = self.picture(candidate, picture)
        if not file.exists():
            return ""
        try:
            with Image.open(file) as image:
                image.verify()  # checksums
            with Image.open(file) as image:
                image.load()
                read_about(image)
                size = (self.side, self.side)
                return (
                    None if (image.size, image.mode) == (size, "RGB") else f"it is {image.size}, not {size}"
                )
        except (OSError, SyntaxError, ValueError, KeyError) as error:
            return repr(error)

    def about(self, candidate: Candidate, picture: Picture) -> dict[str, Any]:
        """The text that `save_picture` wrote."""
        with Image.open(self.picture(candidate, picture)) as image:
            return read_about(image)

    def values_file(self, kind: str, candidate: Candidate, name: str, chunk: int) -> Path:
        """File of what was measured on a chunk: `kind` rewards, features or changes, by `name`."""
        return self.folder / kind / candidate.key / name / f"{chunk:05d}.safetensors"

    def save_values(self, file: Path, values: np.ndarray, made_from: Mapping[str, object]) -> None:
        """Write values (n, ...) and what they were made from."""
        header = {"made_from": json.dumps(made_from, sort_keys=True)}
        array = {"values": np.ascontiguousarray(values)}
        write_whole(file, lambda part: save_file(array, part, metadata=header))

    def load_values(self, file: Path, made_from: Mapping[str, object]) -> np.ndarray | None:
        """Values (n, ...), or None if they aren't there, are damaged, or were made from something else."""
        try:
            with safe_open(file, framework="numpy") as opened:
                header = opened.metadata() or {}
                if header.get("made_from") != json.dumps(made_from, sort_keys=True):
                    return None
                return opened.get_tensor("values")
        except (OSError, SafetensorError):
            return None

    def shas(self, candidate: Candidate, chunk: int) -> dict[str, str] | None:
        """SHA-256 of the files of a chunk by name; None if one isn't there."""
        files = [self.picture(candidate, picture) for picture in self.chunks[chunk]]
        if not all(file.exists() for file in files):
            return None
        return {file.name: self._sha(file) for file in files}

    def _sha(self, file: Path) -> str:
        """SHA-256 of a file, read once unless it changes: every measure asks for it again."""
        stat = file.stat()
        state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if file not in self._hashed or self._hashed[file][0] != state:
            self._hashed[file] = (state, sha256(file))
        return self._hashed[file][1]

    def _agree(self, file: Path, expected: dict[str, Any]) -> None:
        if not file.exists():
            write_json(file, expected)
            return
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


def read_about(image: Image.Image) -> dict[str, Any]:
    """What `Store.save_picture` wrote about a picture.

    Raises:
        ValueError: if there is no such text.
    """
    text = getattr(image, "text", {}).get(TEXT)
    if text is None:
        raise ValueError(f"no text {TEXT!r} in it: made by something else")
    return json.loads(text)


def digest(values: object) -> str:
    """Short fingerprint of plain JSON values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
