"""Size of the JPEG file: a reward without gradients, which gradient methods must refuse."""

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from am_diffusers.rewards.base import check_images, check_prompts
from am_diffusers.rewards.parts.preprocess import to_pil


class JpegSize:
    """Bytes of the picture as a JPEG of quality 95 (Black et al. 2023, DDPO, arXiv 2305.13301)."""

    name = "jpeg_size"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """File sizes in bytes (B,); the prompts don't matter."""
        check_images(images)
        check_prompts(prompts, len(images))
        return images.new_tensor([_jpeg_bytes(image) for image in to_pil(images)])


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
