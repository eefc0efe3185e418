"""A model of any family as two velocity fields: `policy` (LoRA on) and `base` (LoRA off).

One network in memory predicts `velocity = noise - clean`. Everything that is not the LoRA is frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from am_diffusers.models.adapters import adapters
from am_diffusers.models.family import Family, Shape
from am_diffusers.models.lora import TunedNetwork
from am_diffusers.models.pretrained import Pretrained
from am_diffusers.models.schedulers import NoiseLevels
from am_diffusers.models.text_encoders import PromptEncoder
from am_diffusers.rollout import Solver
from am_diffusers.system.half_precision import scaled_vjp, scaled_vjps
from am_diffusers.velocity import Conditioning, InputGradients, Pull, pull_back_inputs


class Model(TunedNetwork):
    """The components of a Diffusers pipeline, with a LoRA on its network as the control.

    Attributes:
        vae: the autoencoder, float32.
        source: where it was loaded from; None for a pipeline made in memory.
        weight_dtype: dtype of the network and the text encoders; the LoRA is float32.
        policy: velocity field with the LoRA; before `attach_lora` or `load_lora` it equals `base`.
        base: velocity field without the LoRA.
        before_pass: called before every pass of network or VAE, and may raise: to stop a run.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        *,
        source: Pretrained | None = None,
        prompts: PromptEncoder | None = None,
    ) -> None:
        """Take over a pipeline; `prompts` makes conditioning, None = by the pipeline's text encoders."""
        super().__init__(getattr(pipe, family.network), family)
        self._pipe = pipe
        self._prompts = PromptEncoder(pipe, family) if prompts is None else prompts
        self.vae: Any = pipe.vae
        self.source = source
        self.weight_dtype: torch.dtype = self.network.dtype
        self.policy = AdapterField(self, adapter=True)
        self.base = AdapterField(self, adapter=False)
        self.before_pass: Callable[[], None] = lambda: None
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        source: Pretrained,
        *,
        weight_dtype: torch.dtype = torch.float32,
        text_and_vae: bool = True,
        device: torch.device | str = "cpu",
    ) -> "Model":
        """Load a model onto a device, see `Pretrained.load`."""
        pipe = source.load(weight_dtype, text_and_vae=text_and_vae).to(device)
        return cls(pipe, source.family, source=source)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        # Not Diffusers' `device`, which walks all modules: milliseconds before every pass.
        return next(self.network.parameters()).device

    def pipeline(self) -> Any:
        """Return the pipeline of these components, which samples the policy, without freed text encoders."""
        return self._pipe

    def config_of(self, component: str) -> Mapping[str, Any]:
        """Return the configuration of a component, loaded or not."""
        if getattr(self._pipe, component) is None and self.source is not None:
            return self.source.config_of(component)
        config: Any = getattr(self._pipe, component).config
        return config if isinstance(config, Mapping) else config.to_dict()

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity of the network as its adapters are now, in the dtype of `x`."""
        self.before_pass()
        dtype, device = self.weight_dtype, self.device
        # Under autocast the float32 LoRA computes in the half precision of the weights too.
        with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            output = self.family.velocity(self.network, x.to(device, dtype), sigma.to(device), cond)
        return output.to(x)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] of final latents; float32, differentiable in the latents."""
        self.before_pass()
        with torch.autocast(self.device.type, enabled=False):
            decoded = self.family.decode(self.vae, latents.to(self.device, self.vae.dtype))
        return (decoded / 2 + 0.5).clamp(0, 1)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        max_sequence_length: int = 256,
        negative_prompt: str | None = None,
        batch_size: int = 16,
    ) -> Conditioning:
        """Return the conditioning of prompts, each text encoded once and kept; see `PromptEncoder.encode`."""
        return self._prompts.encode(prompts, max_sequence_length, negative_prompt, batch_size)

    def free_text_encoders(self) -> None:
        """Drop the text encoders and their memory; texts already encoded stay available."""
        self._prompts.free()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of network and VAE in backward passes instead of keeping them."""
        self.network.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def latent_shape(self, height: int, width: int) -> Shape:
        """Return the shape of an image's latents; a ValueError if the model cannot make that size."""
        return self.family.latent_shape(self.config_of, height, width)

    def ode_sigmas(self, num_steps: int, shape: Shape) -> Tensor:
        """Return the pipeline's own noise levels (num_steps + 1,), 1 to 0, of ODEs for latents of a shape."""
        return self._levels.sigmas(num_steps, shape, stochastic=False)

    def sde_sigmas(self, num_steps: int, shape: Shape) -> Tensor:
        """Return noise levels (num_steps + 1,), 1 to 0, of stochastic tables for latents of a shape."""
        return self._levels.sigmas(num_steps, shape, stochastic=True)

    def solver(self, name: str, num_steps: int, shape: Shape) -> Solver:
        """Return a solver for latents of a shape, see `NoiseLevels.solver`."""
        return self._levels.solver(name, num_steps, shape)

    @property
    def _levels(self) -> NoiseLevels:
        return NoiseLevels(self.family, self._pipe.scheduler, self.config_of)

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the frozen weights over a one-dimensional mesh (FSDP2); each block is gathered when used.

        The LoRA stays whole on each process, with gradients, files and checkpoints as without sharding. From
        here on all processes must make the same calls of the network, in the same order.
        """
        blocks = [m for m in self.network.modules() if type(m).__name__ in self.network._no_split_modules]
        for module in [*blocks, self.network]:
            trained = {p for p in module.parameters() if p.requires_grad}
            fully_shard(module, mesh=mesh, ignored_params=trained)


def without_weights(source: Pretrained) -> TunedNetwork:
    """Return the network of a model on the meta device: to try LoRA files on before weights are read."""
    pipe, family = source.skeleton(torch.float32), source.family
    return TunedNetwork(getattr(pipe, family.network), family)


@dataclass(frozen=True)
class AdapterField:
    """The velocity of a model's network with its LoRA on (`policy`) or off (`base`).

    States and velocities keep the dtype of `x` (float32 in training) whatever the weights are.
    """

    model: Model
    adapter: bool

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity at `x` (B, ...), `sigma` (B,); of the policy differentiable in the LoRA.

        The base never records a graph: a backward pass that gradient checkpointing recomputes after the
        LoRA is back on would be wrong. Its derivative is `vjp`.
        """
        trained = self.adapter and torch.is_grad_enabled()
        with torch.set_grad_enabled(trained), adapters(self.model.switches, enabled=self.adapter):
            return self.model.velocity(x, sigma, cond)

    def vjp(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Pull]:
        """Return velocity and pull-back, see `VelocityField.vjp`; no LoRA weight gets a gradient."""
        with adapters(self.model.switches, enabled=self.adapter), torch.enable_grad():
            x = x.detach().requires_grad_(True)
            velocity = self.model.velocity(x, sigma, cond)

        def pull(cotangent: Tensor) -> Tensor:
            # Gradient checkpointing runs the forward again: with the LoRA as it was.
            with adapters(self.model.switches, enabled=self.adapter):
                return scaled_vjp(velocity, x, cotangent)

        return velocity.detach(), pull

    def input_vjp(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        cotangent: Tensor,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, InputGradients]:
        """Return velocity and gradients, see `DifferentiableField.input_vjp`."""

        def pull(velocity: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
            return scaled_vjps(velocity, leaves, cotangent, parameters)

        with adapters(self.model.switches, enabled=self.adapter):
            return pull_back_inputs(lambda x, cond: self.model.velocity(x, sigma, cond), x, cond, pull)
