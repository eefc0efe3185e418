"""The control of the policy: a LoRA on linear layers of a network.

The effective weight is `W + scaling * B A` with `scaling = lora_alpha / rank` (LoRA, arXiv 2106.09685).
Files are written in the format of a pipeline's `load_lora_weights` and read in any form of `lora_files`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import pad

from am_diffusers.models.adapters import ADAPTER, lora_layers, scaled_weights, switchable, weights_of
from am_diffusers.models.family import Family
from am_diffusers.models.lora_files import LORA_FILE, LoraWeights, read_lora
from am_diffusers.models.origin import to_bytes
from am_diffusers.system.files import write_whole


class TunedNetwork:
    """A network that isn't trained, with at most one LoRA, which is.

    Attributes:
        network: the bare network, base weights frozen.
        family: the model family it belongs to.
    """

    def __init__(self, network: Any, family: Family) -> None:
        """Take over a network without a LoRA."""
        self.network, self.family = network, family
        self._fused: dict[str, tuple[Tensor, Tensor]] = {}
        self._switches: tuple[list[object], list[BaseTunerLayer]] = [], []

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
        self._add(config, seed)

    @property
    def switches(self) -> list[BaseTunerLayer]:
        """Layers with adapters, found once for each LoRA, whoever loads it."""
        now, (known, layers) = [*getattr(self.network, "peft_config", {}).values()], self._switches
        if len(now) != len(known) or any(a is not b for a, b in zip(now, known, strict=True)):
            layers = switchable(self.network)
            self._switches = now, layers
        return layers

    def lora_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the LoRA weights by name, float32, in a fixed order."""
        return {name: p for name, p in self.network.named_parameters() if ".lora_" in name}

    def lora_change(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A (rank, in) and B (out, rank) of each changed layer, float32 on the CPU, the strength in B.

        A fused LoRA is part of them. All have one rank: loaders of old take alpha and rank of one layer for
        all where a file has no metadata.
        """
        # Not `network.state_dict()`: on one process alone it would put sharded weights out of step.
        change = dict(self._fused)
        for name, layer in lora_layers(self.network).items():
            a, b = scaled_weights(layer)
            if name in change:
                fused_a, fused_b = change[name]
                a, b = torch.cat([fused_a, a]), torch.cat([fused_b, b], dim=1)
            change[name] = a, b
        rank = max(len(a) for a, _ in change.values())
        return {
            name: (pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - len(a))))
            for name, (a, b) in change.items()
        }

    def save_lora(self, folder: str | Path, about: Mapping[str, str] | None = None) -> Path:
        """Write `folder/pytorch_lora_weights.safetensors` for the pipeline's `load_lora_weights`.

        Loaders of Diffusers take lora_alpha = rank when a file has no metadata, so the scaling is multiplied
        into B and the metadata says lora_alpha = rank: the same strength with and without metadata. A fused
        LoRA is in the file.

        Args:
            folder: made if needed.
            about: further metadata of the file, such as the run it comes from.

        Returns:
            The file's path.
        """
        prefix, change = self.family.network, self.lora_change()
        written = {
            f"{prefix}.{name}.lora_{part}.weight": value.contiguous()
            for name, weights in change.items()
            for part, value in zip("AB", weights, strict=True)
        }
        rank = next(len(a) for a, _ in change.values())
        metadata = LoraConfig(r=rank, lora_alpha=rank).to_dict() | {"target_modules": sorted(change)}
        adapter = {f"{prefix}.{key}": value for key, value in metadata.items()}
        text = json.dumps(adapter, indent=2, sort_keys=True)
        content = to_bytes(written, {"format": "pt", LORA_ADAPTER_METADATA_KEY: text} | dict(about or {}))
        file = Path(folder) / LORA_FILE
        write_whole(file, lambda part: part.write_bytes(content))
        return file

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Load a LoRA file of any form into a network without one, see `read_lora`; weights become float32.

        Args:
            path: the file, or a folder that holds one.
            scale: multiplies the change the LoRA makes; 0 gives the base.

        Raises:
            ValueError: if the file is missing, holds a key this model has no use for, belongs to another
                base model, or a LoRA is attached already.
        """
        self._check_free()
        read = self._read(path)
        ranks = {name: len(each.a) for name, each in read.items()}
        alphas = {name: each.scaling * len(each.a) for name, each in read.items()}
        rank, alpha = mode(ranks.values()), mode(alphas.values())
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # numbers of other files aren't whole
            # Regular expressions: names alone would match endings of other layers' names.
            target_modules="|".join(map(re.escape, read)),
            rank_pattern={_exactly(name): each for name, each in ranks.items() if each != rank},
            alpha_pattern={_exactly(name): each for name, each in alphas.items() if each != alpha},
        )
        self._add(config, seed=0)
        for name, layer in lora_layers(self.network).items():
            a, b = weights_of(layer)
            a.data.copy_(read[name].a)
            b.data.copy_(read[name].b)
        self.network.set_adapters(ADAPTER, scale)

    def start_lora(self, path: str | Path) -> None:
        """Let the attached LoRA start as that of a file; its further ranks and layers start as the identity.

        The file's change is kept whatever its alpha; the attached LoRA's alpha stays.

        Raises:
            ValueError: as `load_lora`, or if the file's ranks or layers are more than what is attached.
        """
        self._check_attached()
        read, layers = self._read(path), lora_layers(self.network)
        if not set(read) <= set(layers):
            endings = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in (*layers, *read)})
            raise ValueError(
                f"{path}: its LoRA is on layers that this one isn't on, such as "
                f"{min(set(read) - set(layers))}: set --lora_layers '{json.dumps(endings)}'"
            )
        largest = max(len(each.a) for each in read.values())
        for name, each in read.items():
            a, b = weights_of(layers[name])
            if largest > len(a):
                raise ValueError(
                    f"{path}: its LoRA has rank {largest}, this one {len(a)}: set --rank {largest} or more"
                )
            a.data[: len(each.a)] = each.a.to(a)
            b.data[:, : len(each.a)] = (each.scaling / layers[name].scaling[ADAPTER] * each.b).to(b)

    @torch.no_grad()
    def fuse_lora(self, path: str | Path) -> None:
        """Add the change of a LoRA file to the frozen weights: base and policy have it, and `save_lora` too.

        Weights in half precision round the change to their 8 (bfloat16) or 11 (float16) bits.

        Raises:
            ValueError: as `load_lora`.
        """
        self._check_free()
        linear = self._linear()
        for name, each in self._read(path).items():
            weight = linear[name].weight
            a, b = each.a, each.scaling * each.b
            weight.copy_(weight.float() + b.to(weight.device) @ a.to(weight.device))
            self._fused[name] = a, b

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

    def _add(self, config: LoraConfig, seed: int) -> None:
        """Add a float32 LoRA drawn from `seed`."""
        devices = [self.network.device] if self.network.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self.network.add_adapter(config, ADAPTER)
        cast_training_params(self.network, torch.float32)

    def _read(self, path: str | Path) -> dict[str, LoraWeights]:
        return read_lora(path, self.family, self._linear())

    def _linear(self) -> dict[str, torch.nn.Linear]:
        """Return the linear layers by name, without those of a LoRA."""
        return {
            name.removesuffix(".base_layer"): module
            for name, module in self.network.named_modules()
            if isinstance(module, torch.nn.Linear) and ".lora_" not in name
        }

    def _check_attached(self) -> None:
        if not lora_layers(self.network):
            raise ValueError("this model has no LoRA: load one first")

    def _check_free(self) -> None:
        if lora_layers(self.network):
            raise ValueError("this model has a LoRA already: unload it, or start from a freshly loaded model")


def _exactly(name: str) -> str:
    """Return a pattern of peft that matches this name alone."""
    return f"^{re.escape(name)}"
