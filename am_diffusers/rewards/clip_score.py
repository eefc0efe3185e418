"""CLIPScore: `cos(image, text)` of CLIP itself, which says how well an image shows its prompt.

Hessel et al. 2021, CLIPScore, arXiv 2104.08718, scored as in `clip` with the ViT-L/14 of Radford et al.
2021, arXiv 2103.00020, as is usual for text-to-image models. The value is the cosine itself: torchmetrics
reports `100 max(cos, 0)`, the paper `2.5 max(cos, 0)` of a ViT-B/32; a maximum has no gradient below zero.
"""

from transformers import CLIPModel

from am_diffusers.rewards.base import Column
from am_diffusers.rewards.clip import HfClipReward
from am_diffusers.rewards.parts.hf_files import VIT_L_14


class CLIPScore(HfClipReward):
    """Cosine of image and prompt; about 0.28 for the released model. Build it with `from_pretrained`."""

    name = "clip_score"
    released = "openai/clip-vit-large-patch14"
    released_sizes = VIT_L_14
    default_processor = None
    column = Column("CLIP", 3)

    @classmethod
    def _scale(cls, model: CLIPModel) -> float:
        return 1.0
