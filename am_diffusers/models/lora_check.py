"""A written LoRA file held against the transformer it came from."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor

from am_diffusers.models.lora import lora_layers, scaled_weights


def verify_lora(
    transformer: torch.nn.Module,
    file: Path,
    fresh: StableDiffusion3Pipeline,
    velocity: Callable[[torch.nn.Module], Tensor],
) -> dict[str, float]:
    """Load a written LoRA into a fresh pipeline and hold it against the transformer it came from.

    Args:
        transformer: the one that was trained, with its LoRA.
        file: what `save_lora` wrote.
        fresh: a pipeline just loaded from the base model; its transformer is changed.
        velocity: the velocity a given transformer has at one fixed input.

    Returns:
        `lora_delta` and `lora_error`: the largest change of the velocity by the LoRA, and the largest
        difference between the two transformers, both relative to the largest velocity.

    Raises:
        ValueError: if the file changes nothing, or not by what was trained.
    """
    base = velocity(fresh.transformer)
    fresh.load_lora_weights(str(file.parent), weight_name=file.name)
    trained, reloaded = velocity(transformer), velocity(fresh.transformer)
    size = base.abs().max().item()
    delta, error = (reloaded - base).abs().max().item() / size, (reloaded - trained).abs().max().item() / size
    exact = fresh.transformer.dtype == torch.float32
    if delta == 0:
        raise ValueError(f"{file} does not change the model: was it trained at all?")
    weights = _weight_error(transformer, fresh.transformer)
    if weights > (1e-5 if exact else 2e-2) or error > (1e-4 if exact else 5e-2):
        raise ValueError(
            f"{file}: reloaded, it differs from the trained model (weights by {weights:.1e}, velocity by "
            f"{error:.1e}, relative; the LoRA's effect is {delta:.1e}); please report this"
        )
    return {"lora_delta": delta, "lora_error": error}


def _weight_error(trained: torch.nn.Module, reloaded: torch.nn.Module) -> float:
    """Largest relative difference between the scaled A and B of two transformers with the same LoRA."""
    worst, others = 0.0, lora_layers(reloaded)
    for name, layer in lora_layers(trained).items():
        if name not in others:
            return float("inf")
        for ours, theirs in zip(scaled_weights(layer), scaled_weights(others[name]), strict=True):
            difference = (ours - theirs.to(ours)).norm() / ours.norm().clamp_min(1e-30)
            worst = max(worst, difference.item())
    return worst
