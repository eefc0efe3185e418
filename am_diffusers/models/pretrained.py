"""Where a Stable Diffusion 3 model lives: checks that need no weights, then loading.

Everything that can be wrong with a model folder or a hub id is said here, before gigabytes are read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from huggingface_hub import hf_hub_download

TEXT_COMPONENTS = tuple(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))


class MissingModelError(ValueError):
    """A model's files are not here; the message says how to get them."""


@dataclass(frozen=True)
class Pretrained:
    """A model folder or hub id in the Diffusers layout of `StableDiffusion3Pipeline`.

    Attributes:
        path: a local folder, or a hub id such as `stabilityai/stable-diffusion-3.5-medium`.
        revision: branch, tag or commit of a hub id; None = its default branch.
        variant: weight file variant such as `fp16`; None = the plain files.
    """

    path: str
    revision: str | None = None
    variant: str | None = None

    def check(self, height: int | None = None, width: int | None = None) -> None:
        """Read the model's configuration files (no weights) and check the resolution in pixels, if given.

        Raises:
            ValueError: if the model cannot be found or accessed, is not an SD3 model, or cannot make
                pictures of that size; the message says what to do.
        """
        name = self.config("model_index.json").get("_class_name", "")
        if not name.startswith("StableDiffusion3"):
            raise ValueError(
                f"{self.path} holds {name or 'no pipeline class'}, expected a StableDiffusion3Pipeline: "
                "pass the path of one, e.g. stabilityai/stable-diffusion-3.5-medium"
            )
        transformer, vae = self.config("transformer/config.json"), self.config("vae/config.json")
        check_resolution(height, width, transformer, vae)

    def load(self, weight_dtype: torch.dtype, *, t5: bool = True, text_and_vae: bool = True) -> Any:
        """The pipeline on the CPU, VAE in float32 and the rest in `weight_dtype`.

        Args:
            weight_dtype: of the transformer and the text encoders.
            t5: False leaves out the T5 encoder, as the pipeline allows.
            text_and_vae: False loads the transformer and the scheduler only.

        Returns:
            A `StableDiffusion3Pipeline`.

        Raises:
            ValueError: as `check`, or if weight files are missing.
        """
        self.check()
        wanted = {*TEXT_COMPONENTS, "vae"} if text_and_vae else set()
        if not t5:
            wanted -= {"text_encoder_3", "tokenizer_3"}
        # Diffusers refuses a folder saved without T5 unless it is told that T5 is missing.
        index = self.config("model_index.json")
        wanted -= {name for name in TEXT_COMPONENTS if index.get(name, [None])[0] is None}
        missing = dict.fromkeys({*TEXT_COMPONENTS, "vae"} - wanted)
        try:
            return StableDiffusion3Pipeline.from_pretrained(
                self.path,
                revision=self.revision,
                variant=self.variant,
                dtype={"default": weight_dtype, "vae": torch.float32},
                **missing,
            )
        except OSError as error:
            raise ValueError(self._remedy(error)) from error

    def config(self, name: str) -> dict[str, Any]:
        """One of the model's configuration files, such as `vae/config.json`.

        Raises:
            MissingModelError: if it cannot be found or accessed; the message says what to do.
        """
        folder = Path(self.path)
        try:
            file = folder / name if folder.is_dir() else self._from_hub(name)
            return json.loads(Path(file).read_text())
        except OSError as error:
            raise MissingModelError(self._remedy(error)) from error

    def _from_hub(self, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            raise FileNotFoundError(f"no folder {self.path}, and it is not a hub id `owner/name`")
        return hf_hub_download(self.path, name, revision=self.revision)

    def _remedy(self, error: OSError) -> str:
        reason = f"cannot load the model {self.path}: {str(error).strip().splitlines()[0]}\n"
        if Path(self.path).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            return reason + "Pass a folder in the layout of StableDiffusion3Pipeline, or a hub id owner/name."
        revision = f" --revision {self.revision}" if self.revision else ""
        return reason + (
            f"If it is gated, accept its licence at https://huggingface.co/{self.path} and run "
            f"`hf auth login`.\nThen download it with `hf download {self.path}{revision}`."
        )


def check_resolution(
    height: int | None, width: int | None, transformer: dict[str, Any], vae: dict[str, Any]
) -> None:
    """Check picture sizes in pixels against the configurations of the transformer and the VAE.

    Raises:
        ValueError: if a size is not a positive multiple of VAE scale times patch size, or exceeds the
            positional embedding.
    """
    multiple = vae_scale(vae) * transformer["patch_size"]
    largest = multiple * transformer["pos_embed_max_size"]
    for name, size in (("height", height), ("width", width)):
        if size is None:
            continue
        if size <= 0 or size % multiple:
            below, above = max(size // multiple, 1) * multiple, (max(size, 0) // multiple + 1) * multiple
            raise ValueError(f"{name} {size} is not a multiple of {multiple} pixels: use {below} or {above}")
        if size > largest:
            raise ValueError(f"{name} {size} is beyond the model's positions: use {largest} or less")


def vae_scale(vae: dict[str, Any]) -> int:
    """Pixels per latent position of a VAE configuration."""
    return 2 ** (len(vae["block_out_channels"]) - 1)
