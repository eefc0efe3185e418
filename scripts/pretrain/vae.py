"""Stages `vae` and `decoder`: AutoencoderKL, 64 x 64 x 3 -> 16 x 16 x 8, on the captioned pictures."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .data import PictureSet
from .loop import train


def new_vae() -> AutoencoderKL:
    """An untrained VAE of the shipped size."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def edges(pictures: Tensor) -> Tensor:
    """Differences of neighbouring pixels in both directions, flattened (B, n)."""
    return torch.cat([pictures.diff(dim=-1).flatten(1), pictures.diff(dim=-2).flatten(1)], dim=1)


def reconstruction_loss(reconstruction: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute error of pixels and of pixel differences, pictures in [-1, 1]."""
    return F.l1_loss(reconstruction, pictures) + 0.5 * F.l1_loss(edges(reconstruction), edges(pictures))


def train_vae(data: PictureSet, folder: Path, steps: int, batch: int = 16) -> AutoencoderKL:
    """Train, set the latent scale and shift, and save to `folder / vae`."""
    torch.manual_seed(0)
    vae = new_vae()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        pictures = 2 * data.pictures(data.draw(batch, generator), generator) - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.sample(generator)
            reconstruction = vae.decode(latents).sample.float()
        loss = reconstruction_loss(reconstruction, pictures)
        kl = posterior.kl().mean() / pictures[0].numel()
        return loss + 1e-3 * kl, {"reconstruction": loss.item(), "kl": kl.item()}

    ema = train(vae, loss_of_step, steps=steps, peak_rate=2e-3, state_file=folder / "vae.pt")
    vae.load_state_dict(ema.values)
    set_latent_scale(vae, data)
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, data: PictureSet) -> None:
    """Choose scaling and shift so that latents have mean 0 and standard deviation 1 over the pictures."""
    generator = torch.Generator().manual_seed(1)
    pictures = data.pictures(data.draw(512, generator), generator)
    latents = vae.encode(2 * pictures - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def train_decoder(data: PictureSet, folder: Path, steps: int, batch: int = 16) -> None:
    """Make the decoder tolerant of what a sampler leaves: latents with noise of up to .2 standard deviations.

    The encoder, and with it every cached latent, stays as it is.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.encoder.requires_grad_(False)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(10_000_000 + step)
        pictures = 2 * data.pictures(data.draw(batch, generator), generator) - 1
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mode().float()
            strength = 0.2 * torch.rand(batch, 1, 1, 1, generator=generator) / vae.config.scaling_factor
            noisy = latents + strength * torch.randn(latents.shape, generator=generator)
            reconstruction = vae.decode(noisy).sample.float()
        return reconstruction_loss(reconstruction, pictures), {}

    decoder = vae.decoder
    ema = train(decoder, loss_of_step, steps=steps, peak_rate=1e-3, state_file=folder / "decoder.pt")
    decoder.load_state_dict(ema.values)
    vae.save_pretrained(folder / "vae")
