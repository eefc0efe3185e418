"""The LoRA layers of a network: switched on and off, and their weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

ADAPTER = "default"


def switchable(network: torch.nn.Module) -> list[BaseTunerLayer]:
    """Return the layers of a network that have adapters, by a walk over all modules: a card would wait."""
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters(layers: Sequence[BaseTunerLayer], *, enabled: bool) -> Iterator[None]:
    """Run with the adapters of some layers on or off; the previous state comes back on exit.

    peft's own switch (`enable_adapters`) also flips `requires_grad` of the adapter weights, under the
    feet of the optimizer and of DistributedDataParallel; this one flips only what the forward pass reads.
    """
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


def weights_of(layer: LoraLayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return A (rank, in) and B (out, rank) of a layer's only LoRA, which can be written to."""
    (name,) = layer.active_adapters
    a, b = (part[name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
    return a, b


def scaled_weights(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) of a layer in float32 on the CPU, the scaling multiplied into B.

    On the CPU as they are written when a card is full, or no longer works.
    """
    (name,) = layer.active_adapters
    a, b = (weight.detach().cpu().float() for weight in weights_of(layer))
    return a, b * layer.scaling[name]
