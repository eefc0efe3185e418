"""DINOv2: the class token of a self-supervised vision transformer (Oquab et al. 2023, arXiv 2304.07193).

Frechet distances of it agree with people better than Inception features do (Stein et al. 2023,
arXiv 2306.04675), who take the ViT-L/14; the default here is the smaller ViT-B/14.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Model

from am_diffusers.rewards.parts.hf_files import check_model_type, download_remedy, load_pretrained
from am_diffusers.rewards.parts.preprocess import to_pil
from evaluating.measuring.features.base import Features


class DINOv2(Features):
    """Class token after the last norm, (B, 768) for the released model. Build it with `from_pretrained`.

    Args:
        model: the vision transformer.
        image_processor: the preprocessing published with it: bicubic to 256, crop 224, ImageNet's statistics.
        device: where the model runs.
        batch_size: images per pass; None = all at once.
    """

    name = "dinov2"
    released = "facebook/dinov2-base"

    def __init__(
        self,
        model: Dinov2Model,
        *,
        image_processor: BitImageProcessorPil,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size)
        self._model = model
        self._image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = released,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> "DINOv2":
        """Load a folder or hub id of a `Dinov2Model` with its preprocessor_config.json, see `Features`."""
        place, remedy = str(path), download_remedy(cls.released)
        check_model_type("DINOv2", place, revision, cls.name, remedy)
        try:
            processor = BitImageProcessorPil.from_pretrained(place, revision=revision or "main")
        except OSError as error:
            raise ValueError(
                f"{cls.name}'s preprocessor_config.json not found at {place!r}: {remedy}"
            ) from error
        model = load_pretrained(Dinov2Model, place, revision, cls.name, remedy)
        return cls(model, image_processor=processor, device=device, batch_size=batch_size)

    def _pixels(self, images: Tensor) -> Tensor:
        return self._image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]

    def _encode(self, pixels: Tensor) -> Tensor:
        output: Any = self._model(pixels)
        return output.pooler_output
