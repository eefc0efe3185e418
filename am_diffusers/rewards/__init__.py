"""Rewards: what a picture is worth for its prompt. One file a reward; see `base.Reward`."""

from am_diffusers.rewards.base import Reward, WeightedRewards
from am_diffusers.rewards.brightness import Brightness
from am_diffusers.rewards.clip import ClipReward
from am_diffusers.rewards.hpsv2 import HPSv2
from am_diffusers.rewards.imagenet_class import ImageNetClass
from am_diffusers.rewards.jpeg_size import JpegSize
from am_diffusers.rewards.learned import OFFICIAL, LearnedReward, RewardOptions
from am_diffusers.rewards.ocr import OCR
from am_diffusers.rewards.pickscore import PickScore

# Those with weights are built by `from_pretrained(path, ...)`, the others without arguments.
REWARDS = {reward.name: reward for reward in (PickScore, HPSv2, OCR, ImageNetClass, Brightness, JpegSize)}

__all__ = [
    "OCR",
    "OFFICIAL",
    "REWARDS",
    "Brightness",
    "ClipReward",
    "HPSv2",
    "ImageNetClass",
    "JpegSize",
    "LearnedReward",
    "PickScore",
    "Reward",
    "RewardOptions",
    "WeightedRewards",
]
