"""Stage `vae`: AutoencoderKL, 64 x 64 x 3 -> 16 x 16 x 8, on clean and spoilt images."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .loop import Loop, fast
from .world import World, draw_conditions

COMMITTED = Path(__file__).parents[3] / "am_diffusers" / "assets" / "tiny_sd3" / "vae"
SPOILT = 0.6  # more than in the world: defects are harder to reproduce
KL_WEIGHT = 4e-3
LATENT_NOISE = 0.25  # at most, in standard deviations: what a sampler leaves
LATENT_SIZE, LATENT_CHANNELS = 16, 8


def new_vae() -> AutoencoderKL:
    """Take the committed VAE, or make an untrained one, which needs three times as many steps."""
    if COMMITTED.exists():
        return AutoencoderKL.from_pretrained(COMMITTED)
    widths = (32, 32, 64)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def edges(images: Tensor) -> Tensor:
    """Flatten the differences of neighbouring pixels in both directions to (B, n)."""
    return torch.cat([images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)], dim=1)


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Add up the mean absolute errors of pixels and of pixel differences, images in [-1, 1]."""
    return F.l1_loss(reconstruction, images) + F.l1_loss(edges(reconstruction), edges(images))


def draw_images(world: World, number: int, generator: torch.Generator) -> Tensor:
    """Draw clean and spoilt images in [-1, 1]."""
    labels = world.draw(number, generator)
    labels = labels.replace(condition=draw_conditions(number, generator, SPOILT))
    return 2 * world.images(labels, generator) - 1


def train_vae(world: World, loop: Loop) -> None:
    """Train, set the latent scale and shift, and save to `loop.folder / vae`."""
    torch.manual_seed(0)
    vae = new_vae().to(loop.device)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        images = draw_images(world, loop.batch, generator).to(loop.device)
        with fast(loop.device):
            posterior = vae.encode(images).latent_dist
            strength = LATENT_NOISE * torch.rand(loop.batch, 1, 1, 1, generator=generator).to(loop.device)
            spread = (posterior.std.square() + (strength * posterior.mean.std().detach()).square()).sqrt()
            latents = posterior.mean + spread * torch.randn_like(spread)
            reconstruction = vae.decode(latents).sample.float()
        loss = reconstruction_loss(reconstruction, images)
        kl = posterior.kl().mean() / images[0].numel()
        return loss + KL_WEIGHT * kl, {"reconstruction": loss.item(), "kl": kl.item()}

    ema = loop.train(vae, loss_of_step, peak_rate=1e-3, name="vae")
    vae.load_state_dict(ema.values)
    set_latent_scale(vae, world)
    vae.save_pretrained(loop.folder / "vae")


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, world: World) -> None:
    """Choose scaling and shift so that latents have mean 0 and standard deviation 1 over the images."""
    images = draw_images(world, 512, torch.Generator().manual_seed(1)).to(vae.device)
    latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
