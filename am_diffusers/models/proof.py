"""A written LoRA held against the model it came from, at a fixed point."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from am_diffusers.models.base import Model
from am_diffusers.velocity import Conditioning

Point = tuple[Tensor, Tensor, Conditioning]


@dataclass(frozen=True)
class Proof:
    """A LoRA that was written, loaded back and compared with the tuned model at a fixed point.

    Attributes:
        effect: largest change of the velocity by the LoRA, relative to the largest velocity.
        error: largest difference between the two, relative to the LoRA's largest change.
    """

    effect: float
    error: float


def prompt_point(model: Model, cond: Conditioning, height: int, width: int) -> Point:
    """Return a fixed argument of a field: one latent halfway between noise and data, first row of `cond`."""
    x = torch.randn(1, *model.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.5]), cond.index([0])


def random_point(model: Model) -> Point:
    """Return two small random latents and prompts: an argument that needs no text encoders."""
    side, draw = 4 * model.family.multiple(model.config_of), torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.latent_shape(side, side), generator=draw)
    shapes = model.family.prompt_shapes(model.config_of, 1)
    parts = {name: torch.randn(2, *shape, generator=draw) for name, shape in shapes.items()}
    return x, torch.tensor([0.3, 0.9]), Conditioning(("", ""), **parts)


@torch.no_grad()
def lora_effect(model: Model, point: Point) -> float:
    """Return the largest change of the velocity by the LoRA, relative to the largest velocity; 0 without."""
    return _effect(model.base(*point), model.policy(*point))


def compare(what: Path, before: Tensor, tuned: Tensor, found: Tensor) -> Proof:
    """Compare velocities at one point: of the base, of the tuned model, and of what was written, loaded back.

    Raises:
        ValueError: if the LoRA changes nothing; names its file, `what`.
    """
    change = (tuned - before).abs().max().item()
    if not change > 0:
        raise ValueError(f"{what} does not change the model's output: was it trained at all?")
    return Proof(_effect(before, tuned), (found - tuned).abs().max().item() / change)


@torch.no_grad()
def verify_lora(model: Model, file: Path, point: Point) -> Proof:
    """Load what a model's `save_lora` wrote into a fresh pipeline and hold it against the model.

    Raises:
        ValueError: if the file changes nothing, or not by what was trained.
    """
    if model.source is None:
        raise ValueError(
            "the base model is loaded again to verify a LoRA: make the model by `from_pretrained`"
        )
    fresh = Model.from_pretrained(
        model.source, weight_dtype=model.weight_dtype, text_and_vae=False, device=model.device
    )
    fresh.before_pass = model.before_pass
    before = fresh.base(*point)
    fresh.pipeline().load_lora_weights(str(file.parent), weight_name=file.name)
    proof = compare(file, before, model.policy(*point), fresh.policy(*point))
    exact = model.weight_dtype == torch.float32
    weights = _weight_error(model.lora_change(), fresh.lora_change())
    error = proof.error * proof.effect
    if not (weights <= (1e-5 if exact else 2e-2) and error <= (1e-4 if exact else 5e-2)):
        raise ValueError(
            f"{file}: reloaded, it differs from the trained model (weights by {weights:.1e}, velocity by "
            f"{error:.1e}, relative; the LoRA's effect is {proof.effect:.1e}); please report this"
        )
    return proof


def _effect(before: Tensor, after: Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


def _weight_error(
    trained: Mapping[str, tuple[Tensor, Tensor]], reloaded: Mapping[str, tuple[Tensor, Tensor]]
) -> float:
    """Return the largest relative difference between the scaled A and B of two LoRAs."""
    worst = 0.0
    for name, weights in trained.items():
        if name not in reloaded:
            return float("inf")
        for ours, theirs in zip(weights, reloaded[name], strict=True):
            difference = (ours - theirs.to(ours)).norm() / ours.norm().clamp_min(1e-30)
            worst = max(worst, difference.item())
    return worst
