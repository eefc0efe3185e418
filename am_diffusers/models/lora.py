"""The control of the policy: a LoRA on linear layers of a network.

The effective weight is `W + scaling * B A` with `scaling = lora_alpha / rank` (LoRA, arXiv 2106.09685).
Files are in the format of a pipeline's `load_lora_weights`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from am_diffusers.models.family import Family
from am_diffusers.models.origin import to_bytes
from am_diffusers.system.files import write_whole

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
_KEY = re.compile(r"(?P<network>\w+)\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@contextmanager
def adapters(network: torch.nn.Module, *, enabled: bool) -> Iterator[None]:
    """Run with every adapter on or off; the previous state comes back on exit.

    peft's own switch (`enable_adapters`) also flips `requires_grad` of the adapter weights, under the
    feet of the optimizer and of DistributedDataParallel; this one flips only what the forward pass reads.
    """
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = not enabled
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def lora_layers(network: torch.nn.Module) -> dict[str, LoraLayer]:
    """Return the LoRA layers of a network by module name; none without a LoRA."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def scaled_weights(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) of a layer in float32, the scaling multiplied into B."""
    (name,) = layer.active_adapters
    a, b = (part[name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    return a.detach().float(), b.detach().float() * layer.scaling[name]


class TunedNetwork:
    """A network that isn't trained, with at most one LoRA, which is.

    Attributes:
        network: the bare network, base weights frozen.
        family: the model family it belongs to.
    """

    def __init__(self, network: Any, family: Family) -> None:
        """Take over a network without a LoRA."""
        self.network, self.family = network, family

    def attach_lora(
        self, *, rank: int = 32, lora_alpha: int = 64, layers: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        """Add a trainable float32 LoRA that starts as the identity (B = 0, A normal with std 1/rank).

        Rank 32 and alpha 64 are the SD3.5-medium setting of arXiv 2505.05470.

        Args:
            rank: inner dimension of A and B, at least 1.
            lora_alpha: scaling times rank.
            layers: endings of the names of the linear layers that get a LoRA; None = the family's.
            seed: seed of A; the global generators are left as they were.

        Raises:
            ValueError: if a LoRA is there already, or one of `layers` matches nothing.
        """
        self._check_free()
        layers = self.family.lora_layers if layers is None else layers
        for layer in layers:
            if not any(name == layer or name.endswith(f".{layer}") for name in self._linear()):
                raise ValueError(
                    f"no linear layer ends in {layer!r}; the default layers are {self.family.lora_layers}"
                )
        config = LoraConfig(
            r=rank, lora_alpha=lora_alpha, target_modules=list(layers), init_lora_weights="gaussian"
        )
        devices = [self.network.device] if self.network.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self.network.add_adapter(config, ADAPTER)
        cast_training_params(self.network, torch.float32)

    def lora_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the LoRA weights by name, float32, in a fixed order."""
        return {name: p for name, p in self.network.named_parameters() if ".lora_" in name}

    def save_lora(self, folder: str | Path, about: Mapping[str, str] | None = None) -> Path:
        """Write `folder/pytorch_lora_weights.safetensors` for the pipeline's `load_lora_weights`.

        Loaders of Diffusers take lora_alpha = rank when a file has no metadata, so the scaling is multiplied
        into B and the metadata says lora_alpha = rank: the same strength with and without metadata.

        Args:
            folder: made if needed.
            about: further metadata of the file, such as the run it comes from.

        Returns:
            The file's path.
        """
        network, prefix = self.network, self.family.network
        layers = lora_layers(network)
        # Not `network.state_dict()`: on one process alone it would put sharded weights out of step.
        state = get_peft_model_state_dict(network, state_dict=self.lora_parameters(), adapter_name=ADAPTER)
        for key in [key for key in state if ".lora_B." in key]:
            state[key] = state[key] * layers[key.split(".lora_B.")[0]].scaling[ADAPTER]
        metadata = network.peft_config[ADAPTER].to_dict() | {"use_rslora": False}
        metadata |= {"lora_alpha": metadata["r"], "alpha_pattern": metadata["rank_pattern"]}
        written = {f"{prefix}.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
        adapter = {f"{prefix}.{k}": sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
        text = json.dumps(adapter, indent=2, sort_keys=True)
        content = to_bytes(written, {"format": "pt", LORA_ADAPTER_METADATA_KEY: text} | dict(about or {}))
        file = Path(folder) / LORA_FILE
        write_whole(file, lambda part: part.write_bytes(content))
        return file

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Load a LoRA file in the Diffusers format into a network without one; weights become float32.

        Args:
            path: the file, or a folder that holds `pytorch_lora_weights.safetensors`.
            scale: multiplies the change the LoRA makes; 0 gives the base.

        Raises:
            ValueError: if the file is missing, holds a key this model has no use for, belongs to another
                base model, or a LoRA is attached already.
        """
        self._check_free()
        file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file() or file.suffix != ".safetensors":
            raise ValueError(f"no LoRA file {file}: pass a .safetensors file, or a folder with {LORA_FILE}")
        try:
            # Some pipelines return alphas between the two.
            state, *_, metadata = self.family.pipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, use_safetensors=True, return_lora_metadata=True
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the LoRA file {file} ({error}): export it again") from error
        modules = self._check_keys(state, file)
        names = {"prefix": self.family.network, "adapter_name": ADAPTER}
        self.network.load_lora_adapter(state, **names, metadata=metadata, low_cpu_mem_usage=False)
        if set(lora_layers(self.network)) != modules:
            raise ValueError(f"{file}: its metadata and its weights name different layers; export it again")
        self.network.set_adapters(ADAPTER, scale)
        cast_training_params(self.network, torch.float32)

    def set_lora_scale(self, scale: float) -> None:
        """Change the strength of the LoRA: the same as loading it with this `scale`."""
        self._check_attached()
        if not math.isfinite(scale):
            raise ValueError(f"expected a finite scale of the LoRA, got {scale}")
        self.network.set_adapters(ADAPTER, scale)

    def unload_lora(self) -> None:
        """Remove the LoRA: the base as it was loaded, bit for bit; another can be attached or loaded."""
        self._check_attached()
        self.network.unload_lora()

    def _linear(self) -> dict[str, torch.nn.Linear]:
        modules = self.network.named_modules()
        return {name: module for name, module in modules if isinstance(module, torch.nn.Linear)}

    def _check_attached(self) -> None:
        if not lora_layers(self.network):
            raise ValueError("this model has no LoRA: load one first")

    def _check_free(self) -> None:
        if lora_layers(self.network):
            raise ValueError("this model has a LoRA already: unload it, or start from a freshly loaded model")

    def _check_keys(self, state: dict[str, Tensor], file: Path) -> set[str]:
        """Return the names of the modules a LoRA file changes; every key must fit a linear layer."""
        linear, network = self._linear(), self.family.network
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            match = _KEY.fullmatch(key)
            if match is None or match["network"] != network or match["module"] not in linear:
                raise ValueError(
                    f"{file}: no place for key {key!r} here, expected {network}.<layer>.lora_A.weight; "
                    f"export the LoRA with {self.family.pipeline.__name__}.save_lora_weights"
                )
            parts.setdefault(match["module"], {})[match["part"]] = value
        for name, part in parts.items():
            expected = (linear[name].out_features, linear[name].in_features)
            if set(part) != {"A", "B"}:
                raise ValueError(f"{file}: {name} lacks lora_A or lora_B: export it again")
            if (part["B"].shape[0], part["A"].shape[1]) != expected:
                raise ValueError(
                    f"{file}: {name} is {part['B'].shape[0]} x {part['A'].shape[1]}, this base model has "
                    f"{expected[0]} x {expected[1]}: load it with the base model it was trained on"
                )
        return set(parts)
