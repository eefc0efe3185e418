"""Inputs of both sides of the parity check: models, random weights, images and prompts.

A case lives in a folder: case.json, inputs.npz, weights.json (names and shapes), weights.pt, and what the
two sides make of them, originals.npz and ours.npz.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from am_diffusers.rewards.parts.preprocess import CLIP_MEAN, CLIP_STD, PixelFormat, bicubic

REWARDS, SIZES = ("hpsv2", "image_reward"), ("small", "full")
CASE_FILE, INPUT_FILE, SHAPE_FILE, WEIGHT_FILE = "case.json", "inputs.npz", "weights.json", "weights.pt"
# One that both tokenizers must clean, one in other letters, one that both cut (at 35 and at 77 tokens).
PROMPTS = (
    "A Red  apple &amp; a FOX's den, 3d style",
    "un café à Zürich, 東京 — neon “lights”, 8k!!",
    " ".join(["a wide landscape with old stone houses, tiny trees and unbelievably detailed clouds"] * 8),
)
SMALL_SIZE = 32
SMALL_HPSV2 = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": SMALL_SIZE,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
# `vision`: arguments of the package's VisionTransformer, `text`: entries of its med_config.json.
SMALL_IMAGE_REWARD = {
    "vision": {"img_size": SMALL_SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "text": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
SMALL: dict[str, dict[str, Any]] = {"hpsv2": SMALL_HPSV2, "image_reward": SMALL_IMAGE_REWARD}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        reward: name in `REWARDS`.
        size: name in `SIZES`; "full" is the released architecture.
        seed: seed of weights and images.
        threads: threads that both sides compute with, because the order of sums depends on their number.
        prompts: texts; image n is scored for prompt n modulo their number.
    """

    reward: str
    size: str
    seed: int
    threads: int
    prompts: tuple[str, ...] = field(default=PROMPTS)

    @property
    def config(self) -> dict[str, Any] | None:
        """Sizes of the small model; None: the released ones."""
        return SMALL[self.reward] if self.size == "small" else None

    @property
    def pixel_format(self) -> PixelFormat:
        """Return the format of the images that the vision tower reads."""
        return PixelFormat(SMALL_SIZE if self.size == "small" else 224, CLIP_MEAN, CLIP_STD)

    def write(self, folder: Path) -> None:
        """Write case.json and inputs.npz."""
        (folder / CASE_FILE).write_text(json.dumps(asdict(self) | {"config": self.config}), "utf-8")
        form = self.pixel_format
        # Shrunk, enlarged, as is, and with a margin of 3 of which the packages crop 2 first.
        shapes = [(512, 512), (384, 512), (600, 400), (77, 45), (form.size,) * 2, (form.size + 3, form.size)]
        images = [picture(self.seed + row, *shape) for row, shape in enumerate(shapes)]
        square = [picture(self.seed + 100 + row, form.size, form.size) for row in range(len(shapes))]
        arrays: dict[str, Any] = {f"picture_{row}": to_bytes(image) for row, image in enumerate(images)}
        np.savez(folder / INPUT_FILE, pixels=form.normalise(torch.stack(square)).numpy(), **arrays)


def picture(seed: int, height: int, width: int) -> Tensor:
    """Make an image (3, height, width) in [0, 1]: soft blobs, a hard edge and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    image = bicubic(torch.rand(1, 3, 7, 7, generator=generator), height, width)[0]
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    top, left = (torch.rand(2, generator=generator) * torch.tensor([height, width]) / 2).long().tolist()
    image[:, top : top + height // 3, left : left + width // 3] = torch.rand(3, 1, 1, generator=generator)
    return image.clamp(0, 1)


def to_bytes(image: Tensor) -> np.ndarray:
    """Convert (3, H, W) in [0, 1] to (H, W, 3) 8-bit levels."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def write_weights(folder: Path, seed: int) -> int:
    """Write random weights under the names and shapes in weights.json; return how many numbers they are.

    Layer norms are near 1, matrices keep the size of what goes through them, counting buffers count.
    """
    shapes: dict[str, tuple[list[int], bool]] = json.loads((folder / SHAPE_FILE).read_text())
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (shape, counts) in sorted(shapes.items()):
        if counts:
            weights[name] = torch.arange(shape[-1]).expand(shape).clone()
        else:
            weights[name] = _random(name, shape, generator)
    torch.save({"state_dict": weights} if "logit_scale" in weights else weights, folder / WEIGHT_FILE)
    return sum(value.numel() for value in weights.values() if value.is_floating_point())


def _random(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if not shape:
        return torch.tensor(math.log(100.0))
    if len(shape) > 1:
        return noise.mul_(math.prod(shape[1:]) ** -0.5)
    return 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
