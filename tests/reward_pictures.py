"""Pictures to score: like photographs, in shapes that resize and crop differently."""

import torch
from PIL import Image

from reward_models import SIZE

# As is, landscape, odd portrait, down, up, and a margin of 3, of which torchvision crops 2 first and not 1.
SHAPES = [(SIZE, SIZE), (48, 64), (77, 45), (128, 128), (20, 26), (SIZE + 3, SIZE)]


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Pictures with the 1/f spectrum of photographs and hard edges, (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, height, width, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) / (frequency + 1 / max(height, width))).real
    smooth = smooth / smooth.std(dim=(-2, -1), keepdim=True)
    edges = torch.where(smooth.mean(1, keepdim=True).roll(height // 3, -2) > 0.3, 0.4, 0.0)
    return (0.4 + 0.2 * smooth + edges).clamp(0, 1)


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def random_images(count: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise in [.3, .7]: the resized pictures stay inside [0, 1], where clamping has a derivative."""
    generator = torch.Generator().manual_seed(5)
    return 0.3 + 0.4 * torch.rand(count, 3, height, width, generator=generator, dtype=dtype)
