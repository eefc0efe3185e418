"""Rewards: what a picture is worth for its prompt. One file a reward; see `base.Reward`."""

from am_diffusers.rewards.aesthetic import Aesthetic
from am_diffusers.rewards.base import ImageFeatures, Reward, RewardScale, WeightedRewards
from am_diffusers.rewards.brightness import Brightness
from am_diffusers.rewards.clip import ClipReward
from am_diffusers.rewards.clip_score import CLIPScore
from am_diffusers.rewards.colourfulness import Colourfulness
from am_diffusers.rewards.hpsv2 import HPSv2
from am_diffusers.rewards.image_reward import ImageReward
from am_diffusers.rewards.imagenet_class import ImageNetClass
from am_diffusers.rewards.jpeg_size import JpegSize
from am_diffusers.rewards.learned import OFFICIAL, LearnedReward, RewardOptions
from am_diffusers.rewards.ocr import OCR
from am_diffusers.rewards.pickscore import PickScore
from am_diffusers.rewards.symmetry import Symmetry

# Those with weights are built by `from_pretrained(path, ...)`, the others without arguments.
_LEARNED = (PickScore, HPSv2, ImageReward, CLIPScore, Aesthetic, OCR, ImageNetClass)
_PIXELS = (Brightness, Colourfulness, Symmetry, JpegSize)
REWARDS = {reward.name: reward for reward in (*_LEARNED, *_PIXELS)}

__all__ = [
    "OCR",
    "OFFICIAL",
    "REWARDS",
    "Aesthetic",
    "Brightness",
    "CLIPScore",
    "ClipReward",
    "Colourfulness",
    "HPSv2",
    "ImageFeatures",
    "ImageNetClass",
    "ImageReward",
    "JpegSize",
    "LearnedReward",
    "PickScore",
    "Reward",
    "RewardOptions",
    "RewardScale",
    "Symmetry",
    "WeightedRewards",
]
