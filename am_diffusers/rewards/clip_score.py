"""CLIPScore: `cos(image, text)` of CLIP itself, how well a picture shows what its prompt says.

Hessel et al. 2021, CLIPScore, arXiv 2104.08718, scored as in `hf_clip` with the ViT-L/14 of Radford et al.
2021, arXiv 2103.00020, as is usual for text-to-image models. The value is the cosine itself: torchmetrics
reports `100 max(cos, 0)`, the paper `2.5 max(cos, 0)` of a ViT-B/32; a maximum has no gradient below zero.
"""

from transformers import CLIPModel

from am_diffusers.rewards.hf_clip import HfClipReward


class CLIPScore(HfClipReward):
    """Cosine of picture and prompt; about 0.28 for the released model. Build it with `from_pretrained`."""

    name = "clip_score"
    released = "openai/clip-vit-large-patch14"
    default_processor = None

    @classmethod
    def _scale(cls, model: CLIPModel) -> float:
        return 1.0
