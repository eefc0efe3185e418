"""PickScore: `exp(logit_scale) * cos(image, text)` of a CLIP model tuned on human choices.

Kirstain et al. 2023, Pick-a-Pic, arXiv 2305.01569, scored as its model card does: see `clip`. The released
model is a ViT-H/14.
"""

from transformers import CLIPModel

from am_diffusers.rewards.base import Column
from am_diffusers.rewards.clip import HfClipReward
from am_diffusers.rewards.parts.hf_files import clip_sizes


class PickScore(HfClipReward):
    """PickScore of images; about 20-24 for the released model. Build it with `from_pretrained`."""

    name = "pickscore"
    released = "yuvalkirstain/PickScore_v1"
    released_sizes = clip_sizes((1280, 32, 16), (1024, 24, 16), 1024)
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    column = Column("PickScore", 2)

    @classmethod
    def _scale(cls, model: CLIPModel) -> float:
        return model.logit_scale.exp().item()
