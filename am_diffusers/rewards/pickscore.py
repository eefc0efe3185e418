"""PickScore: `exp(logit_scale) * cos(image, text)` of a CLIP model tuned on human choices.

Kirstain et al. 2023, Pick-a-Pic, arXiv 2305.01569, scored as its model card does: see `hf_clip`. The released
model is a ViT-H/14.
"""

from transformers import CLIPModel

from am_diffusers.rewards.hf_clip import HfClipReward


class PickScore(HfClipReward):
    """PickScore of pictures; about 20-24 for the released model. Build it with `from_pretrained`."""

    name = "pickscore"
    released = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    @classmethod
    def _scale(cls, model: CLIPModel) -> float:
        return model.logit_scale.exp().item()
