"""The velocity of a transformer with its LoRA on or off, and its vector-Jacobian product."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from am_diffusers.models import lora
from am_diffusers.system.half_precision import scaled_vjp
from am_diffusers.velocity import Conditioning, Pull

if TYPE_CHECKING:
    from am_diffusers.models.sd3 import SD3


@dataclass(frozen=True)
class SD3Field:
    """The velocity of an SD3 transformer with its LoRA on (`policy`) or off (`base`).

    States and velocities keep the dtype of `x` (float32 in training) whatever the weights are.
    """

    model: "SD3"
    adapter: bool

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity at `x` (B, C, H, W), `sigma` (B,); of the policy differentiable in the LoRA weights.

        The base never records a graph: a backward pass that gradient checkpointing recomputes after the
        LoRA is back on would be wrong. Its derivative is `vjp`.
        """
        trained = self.adapter and torch.is_grad_enabled()
        transformer = self.model.transformer
        with torch.set_grad_enabled(trained), lora.adapters(transformer, enabled=self.adapter):
            return self.model.velocity(transformer, x, sigma, cond)

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        """Return velocity and pull-back, see `VelocityField.vjp`; no LoRA weight gets a gradient."""
        transformer = self.model.transformer
        with lora.adapters(transformer, enabled=self.adapter), torch.enable_grad():
            x = x.detach().requires_grad_(True)
            velocity = self.model.velocity(transformer, x, sigma, cond)

        def pull(cotangent: Tensor) -> Tensor:
            # Gradient checkpointing runs the forward again: with the LoRA as it was.
            with lora.adapters(transformer, enabled=self.adapter):
                return scaled_vjp(velocity, x, cotangent)

        return velocity.detach(), pull
