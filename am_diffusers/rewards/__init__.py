"""Rewards: what a picture is worth for its prompt. One file a reward; see `base.Reward`."""

from am_diffusers.rewards.aesthetic import Aesthetic
from am_diffusers.rewards.base import ImageFeatures, Reward, WeightedRewards
from am_diffusers.rewards.brightness import Brightness
from am_diffusers.rewards.clip import ClipReward
from am_diffusers.rewards.clip_score import CLIPScore
from am_diffusers.rewards.hpsv2 import HPSv2
from am_diffusers.rewards.image_reward import ImageReward
from am_diffusers.rewards.jpeg_size import JpegSize
from am_diffusers.rewards.learned import OFFICIAL, LearnedReward, RewardOptions
from am_diffusers.rewards.pickscore import PickScore

# Those with weights are built by `from_pretrained(path, ...)`, the others without arguments.
_LEARNED = (PickScore, HPSv2, ImageReward, CLIPScore, Aesthetic)
REWARDS = {reward.name: reward for reward in (*_LEARNED, Brightness, JpegSize)}

__all__ = [
    "OFFICIAL",
    "REWARDS",
    "Aesthetic",
    "Brightness",
    "CLIPScore",
    "ClipReward",
    "HPSv2",
    "ImageFeatures",
    "ImageReward",
    "JpegSize",
    "LearnedReward",
    "PickScore",
    "Reward",
    "RewardOptions",
    "WeightedRewards",
]
