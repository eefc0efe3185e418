"""Pictures of words, drawn with the font that Pillow ships."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def picture_of(text: str, *, height: int = 48, width: int = 200, scale: float = 0.65) -> Tensor:
    """`text` in dark blue, centred on white, (1, 3, height, width) in [0, 1]; letters `scale` high."""
    image = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(round(scale * height))
    ImageDraw.Draw(image).text((width / 2, height / 2), text, fill=(20, 20, 80), font=font, anchor="mm")
    return as_tensor(image)


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as (1, 3, H, W) in [0, 1]."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255
