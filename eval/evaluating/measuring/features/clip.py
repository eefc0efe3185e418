"""CLIP: image embeddings (Radford et al. 2021, arXiv 2103.00020) before they are brought to length 1."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel

from am_diffusers.rewards.parts.hf_files import check_model_type, download_remedy, load_pretrained
from am_diffusers.rewards.parts.preprocess import to_pil
from evaluating.measuring.features.base import Features


class CLIP(Features):
    """Projected image embedding, (B, 768) for the released ViT-L/14. Build it with `from_pretrained`.

    Args:
        model: the CLIP model, whose text tower is not kept.
        image_processor: the preprocessing published with it.
        device: where the model runs.
        batch_size: images per pass; None = all at once.
    """

    name = "clip"
    released = "openai/clip-vit-large-patch14"

    def __init__(
        self,
        model: CLIPModel,
        *,
        image_processor: CLIPImageProcessorPil,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> None:
        self._vision, self._projection = model.vision_model, model.visual_projection
        super().__init__(
            nn.ModuleList([self._vision, self._projection]), device=device, batch_size=batch_size
        )
        self._image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = released,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> "CLIP":
        """Load a folder or hub id of a `CLIPModel` with its preprocessor_config.json, see `Features`."""
        place, remedy = str(path), download_remedy(cls.released)
        check_model_type("CLIP", place, revision, cls.name, remedy)
        try:
            processor = CLIPImageProcessorPil.from_pretrained(place, revision=revision or "main")
        except OSError as error:
            raise ValueError(
                f"{cls.name}'s preprocessor_config.json not found at {place!r}: {remedy}"
            ) from error
        model = load_pretrained(CLIPModel, place, revision, cls.name, remedy)
        return cls(model, image_processor=processor, device=device, batch_size=batch_size)

    def _pixels(self, images: Tensor) -> Tensor:
        return self._image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._projection(self._vision(pixels).pooler_output)
