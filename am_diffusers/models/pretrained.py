"""The place of a model: checks that need no weights, then loading.

Everything that can be wrong with a model folder or a hub id is said here, before gigabytes are read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel

from am_diffusers.models import FAMILIES
from am_diffusers.models.family import Family
from am_diffusers.models.schedulers import NoiseLevels
from am_diffusers.system.files import asset_path

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


class MissingModelError(ValueError):
    """A model's files are not here; the message says how to get them."""


@dataclass(frozen=True)
class Pretrained:
    """A model folder or hub id in the Diffusers layout.

    Attributes:
        path: a local folder, an `asset:` path, or a hub id such as `stabilityai/stable-diffusion-3.5-medium`.
        revision: branch, tag or commit of a hub id; None = its default branch.
        variant: weight file variant such as `fp16`; None = the plain files.
    """

    path: str
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", asset_path(self.path))

    @property
    def family(self) -> Family:
        """The family of the pipeline's class; no weights are read.

        Raises:
            ValueError: if the model cannot be found or accessed, or is of no known family; says what to do.
        """
        name = self.config("model_index.json").get("_class_name", "")
        if name not in FAMILIES:
            raise ValueError(
                f"{self.path} holds {name or 'no pipeline class'}, expected a {' or '.join(FAMILIES)}: "
                "pass the path of one, e.g. stabilityai/stable-diffusion-3.5-medium"
            )
        return FAMILIES[name]

    def load(self, weight_dtype: torch.dtype, *, text_and_vae: bool = True) -> Any:
        """Load the pipeline on the CPU, VAE in float32 and the rest in `weight_dtype`.

        Args:
            weight_dtype: dtype of the network and the text encoders.
            text_and_vae: False loads the network and the scheduler only.

        Returns:
            A pipeline of the family's class.

        Raises:
            ValueError: as `family`, or if weight files are missing.
        """
        family, classes = self.family, self._classes()
        # Diffusers refuses a folder saved without a text encoder unless it is told which one is missing.
        missing = [name for name in family.text_components if name not in classes]
        if not text_and_vae:
            missing = [*family.text_components, "vae"]
        try:
            return family.pipeline.from_pretrained(
                self.path,
                revision=self.revision,
                variant=self.variant,
                dtype={"default": weight_dtype, "vae": torch.float32},
                **dict.fromkeys(missing),
            )
        except OSError as error:
            raise ValueError(self._remedy(error)) from error

    def skeleton(self, weight_dtype: torch.dtype) -> Any:
        """Return the pipeline on the meta device, without text encoders: what an estimate runs."""
        family, classes = self.family, self._classes()
        names = (family.network, "vae", "scheduler")
        with torch.device("meta"):
            parts = {name: classes[name].from_config(self.config_of(name)) for name in names}
        # Not Diffusers' own `to`, which warns about modules of other models.
        torch.nn.Module.to(parts[family.network], weight_dtype)
        return family.pipeline(**parts, **dict.fromkeys(family.text_components))

    def levels(self) -> NoiseLevels:
        """Return the pipeline's noise levels."""
        scheduler = self._classes()["scheduler"].from_config(self.config_of("scheduler"))
        return NoiseLevels(self.family, scheduler, self.config_of)

    def text_weights(self) -> int:
        """Return the number of weights of the text encoders together."""
        weights, classes = 0, self._classes()
        for name in self.family.text_components:
            if issubclass(classes.get(name, object), PreTrainedModel):
                with torch.device("meta"):
                    model = classes[name](classes[name].config_class.from_dict(self.config_of(name)))
                weights += sum(parameter.numel() for parameter in model.parameters())
        return weights

    def config_of(self, component: str) -> dict[str, Any]:
        """Return the configuration of a component such as `vae`.

        Raises:
            MissingModelError: if it cannot be found or accessed; the message says what to do.
        """
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        return self.config(f"{component}/{file}")

    def config(self, name: str) -> dict[str, Any]:
        """Return one of the model's configuration files, such as `model_index.json`.

        Raises:
            MissingModelError: if it cannot be found or accessed; the message says what to do.
        """
        folder = Path(self.path)
        try:
            file = folder / name if folder.is_dir() else self._from_hub(name)
            return json.loads(Path(file).read_text())
        except OSError as error:
            raise MissingModelError(self._remedy(error)) from error

    def _classes(self) -> dict[str, Any]:
        """Return the classes of the components that are there, by the components' names."""
        named = {
            name: kind for name, kind in self.config("model_index.json").items() if isinstance(kind, list)
        }
        return {
            name: getattr(_LIBRARIES[lib], kind, object)
            for name, (lib, kind) in named.items()
            if lib in _LIBRARIES
        }

    def _from_hub(self, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            raise FileNotFoundError(f"no folder {self.path}, and it is not a hub id `owner/name`")
        return hf_hub_download(self.path, name, revision=self.revision)

    def _remedy(self, error: OSError) -> str:
        reason = f"cannot load the model {self.path}: {str(error).strip().splitlines()[0]}\n"
        if Path(self.path).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            return reason + "Pass a folder in the Diffusers layout, or a hub id owner/name."
        revision = f" --revision {self.revision}" if self.revision else ""
        return reason + (
            f"If it is gated, accept its licence at https://huggingface.co/{self.path} and run "
            f"`hf auth login`.\nThen download it with `hf download {self.path}{revision}`."
        )
