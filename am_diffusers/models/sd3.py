"""Stable Diffusion 3 as two velocity fields: `policy` (LoRA on) and `base` (LoRA off).

One transformer in memory predicts `velocity = noise - clean` at timestep `1000 * sigma`
(Stable Diffusion 3, arXiv 2403.03206; MATH section 0). Everything that is not the LoRA is frozen.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor

from am_diffusers.models import lora
from am_diffusers.models.field import SD3Field
from am_diffusers.models.lora_check import verify_lora
from am_diffusers.models.pretrained import Pretrained, check_resolution, vae_scale
from am_diffusers.models.schedulers import even_sigmas, make_solver, own_sigmas
from am_diffusers.models.text import PromptEncoder
from am_diffusers.rollout import Solver
from am_diffusers.velocity import Conditioning


class SD3:
    """The components of a `StableDiffusion3Pipeline`, with a LoRA on the transformer as the control.

    Attributes:
        transformer: the bare transformer, base weights frozen.
        vae: the autoencoder, float32.
        weight_dtype: of the transformer and the text encoders; the LoRA is float32.
        policy: velocity field with the LoRA; before `attach_lora` or `load_lora` it equals `base`.
        base: velocity field without the LoRA.
        before_pass: called before every pass of transformer or VAE, and may raise: to stop a run.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, *, source: Pretrained | None = None) -> None:
        """Take over a pipeline; `source` is where it was loaded from (`verify_lora` loads it again)."""
        self._pipe = pipe
        self._source = source
        self._text = PromptEncoder(pipe)
        self.transformer: SD3Transformer2DModel = pipe.transformer
        self.vae: AutoencoderKL = pipe.vae
        self.weight_dtype: torch.dtype = pipe.transformer.dtype
        self.policy = SD3Field(self, adapter=True)
        self.base = SD3Field(self, adapter=False)
        self.before_pass: Callable[[], None] = lambda: None
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        weight_dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        t5: bool = True,
        device: torch.device | str = "cpu",
    ) -> "SD3":
        """Load a model folder or hub id.

        Args:
            path: a folder in the Diffusers layout, or a hub id.
            weight_dtype: of the transformer and the text encoders; float32, bfloat16 or float16.
            revision: of a hub id.
            variant: weight file variant such as `fp16`.
            t5: False leaves out the T5 text encoder: its tokens become zeros.
            device: where to put everything.

        Raises:
            ValueError: with the page to accept and the command to run, if the model cannot be loaded.
        """
        source = Pretrained(path, revision, variant)
        return cls(source.load(weight_dtype, t5=t5).to(device), source=source)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    def pipeline(self) -> StableDiffusion3Pipeline:
        """The pipeline of these very components: it samples the policy, without text encoders once freed."""
        return self._pipe

    def velocity(self, module: torch.nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity of `module`, this model's transformer or one like it, in the dtype of `x`."""
        if cond.embeddings is None or cond.pooled is None:
            raise ValueError("SD3 needs prompt embeddings: make the conditioning with `encode_prompts`")
        self.before_pass()
        dtype, device = self.weight_dtype, self.device
        # Under autocast the float32 LoRA computes in the half precision of the weights too.
        with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            output = module(
                hidden_states=x.to(device, dtype),
                timestep=1000 * sigma.to(device),
                encoder_hidden_states=cond.embeddings.to(device, dtype),
                pooled_projections=cond.pooled.to(device, dtype),
                return_dict=False,
            )[0]
        return output.to(x)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        max_sequence_length: int = 256,
        negative_prompt: str | None = None,
        batch_size: int = 16,
    ) -> Conditioning:
        """Embeddings of `prompts` by the pipeline's own `encode_prompt`, each text encoded once and kept.

        Args:
            prompts: B texts.
            max_sequence_length: T5 tokens, 1 to 512; part of the model's input even without T5 (zeros).
            negative_prompt: for classifier-free guidance (the pipeline's own is ""); None without.
            batch_size: texts encoded at a time.

        Raises:
            ValueError: if a text was not encoded before `free_text_encoders`.
        """
        return self._text.encode(prompts, max_sequence_length, negative_prompt, batch_size)

    def free_text_encoders(self) -> None:
        """Drop the text encoders and their memory; texts already encoded stay available."""
        self._text.free()

    def attach_lora(
        self,
        *,
        rank: int = 32,
        lora_alpha: int = 64,
        layers: Sequence[str] = lora.DEFAULT_LORA_LAYERS,
        seed: int = 0,
    ) -> None:
        """Make the policy trainable, see `lora.attach_lora`."""
        lora.attach_lora(self.transformer, rank=rank, lora_alpha=lora_alpha, layers=layers, seed=seed)

    def lora_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA weights by name, float32, in a fixed order."""
        return {name: p for name, p in self.transformer.named_parameters() if ".lora_" in name}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of transformer and VAE in backward passes instead of keeping them."""
        self.transformer.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of final latents; float32, differentiable in the latents."""
        self.before_pass()
        config = self.vae.config
        with torch.autocast(self.device.type, enabled=False):
            scaled = latents.to(self.device, self.vae.dtype) / config["scaling_factor"]
            pictures = self.vae.decode(scaled + config["shift_factor"], return_dict=False)[0]
        return (pictures / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of a picture of `height` x `width` pixels.

        Raises:
            ValueError: if the model cannot make pictures of that size.
        """
        check_resolution(height, width, self.transformer.config, self.vae.config)
        scale = vae_scale(self.vae.config)
        return self.transformer.config["in_channels"], height // scale, width // scale

    def ode_sigmas(self, num_steps: int) -> Tensor:
        """The pipeline's own noise levels (num_steps + 1,), 1 to 0: for ODE sampling only."""
        return own_sigmas(self._pipe.scheduler, num_steps)

    def sde_sigmas(self, num_steps: int) -> Tensor:
        """The scheduler's shift of an even grid (num_steps + 1,), 1 to 0: for stochastic tables."""
        return even_sigmas(self._pipe.scheduler, num_steps)

    def solver(self, name: str, num_steps: int) -> Solver:
        """A table of `TRANSITIONS` or a scheduler of Diffusers by its name, see `schedulers.make_solver`."""
        return make_solver(self._pipe.scheduler, name, num_steps)

    def save_lora(self, folder: str | Path) -> Path:
        """Write the LoRA for Diffusers, see `lora.save_lora`."""
        return lora.save_lora(self.transformer, folder)

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Load a LoRA file, see `lora.load_lora`."""
        lora.load_lora(self.transformer, path, scale=scale)

    def set_lora_scale(self, scale: float) -> None:
        """Change the `scale` of `load_lora`, see `lora.set_lora_scale`."""
        lora.set_lora_scale(self.transformer, scale)

    def unload_lora(self) -> None:
        """Remove the LoRA: the base as it was loaded, and another LoRA can be attached or loaded."""
        lora.unload_lora(self.transformer)

    @torch.no_grad()
    def lora_effect(self, cond: Conditioning, height: int, width: int) -> float:
        """Largest change of the velocity by the LoRA, relative to the largest velocity; 0 without a LoRA.

        At the same point as `verify_lora`: one `height` x `width` picture (pixels), first prompt of `cond`.
        """
        point = self._point(cond, height, width)
        base = self.base(*point)
        return ((self.policy(*point) - base).abs().max() / base.abs().max()).item()

    @torch.no_grad()
    def verify_lora(self, file: Path, cond: Conditioning, height: int, width: int) -> dict[str, float]:
        """Reload what `save_lora` wrote into a fresh pipeline and compare, see `lora_check.verify_lora`.

        Compares the velocity of one `height` x `width` picture (pixels) for the first prompt of `cond`.
        """
        if self._source is None:
            raise ValueError("verify_lora loads the base model again: make this SD3 with `from_pretrained`")
        fresh = self._source.load(self.weight_dtype, text_and_vae=False).to(self.device)
        point = self._point(cond, height, width)
        return verify_lora(self.transformer, file, fresh, lambda module: self.velocity(module, *point))

    def _point(self, cond: Conditioning, height: int, width: int) -> tuple[Tensor, Tensor, Conditioning]:
        """A fixed argument of a field: one latent halfway between noise and data, first row of `cond`."""
        x = torch.randn(1, *self.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
        return x, torch.tensor([0.5]), cond.index([0])
