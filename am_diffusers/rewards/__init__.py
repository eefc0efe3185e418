"""Rewards: scores of images for prompts. One file a reward, one line in `REWARDS`; see `base.Reward`."""

from am_diffusers.rewards.aesthetic import Aesthetic
from am_diffusers.rewards.base import (
    OFFICIAL,
    Column,
    FixedReward,
    ImageFeatures,
    Reward,
    RewardOptions,
    RewardScale,
    WeightedRewards,
)
from am_diffusers.rewards.clip import ClipReward
from am_diffusers.rewards.clip_score import CLIPScore
from am_diffusers.rewards.hpsv2 import HPSv2
from am_diffusers.rewards.image_reward import ImageReward
from am_diffusers.rewards.imagenet_class import ImageNetClass
from am_diffusers.rewards.learned import LearnedReward
from am_diffusers.rewards.ocr import OCR
from am_diffusers.rewards.pickscore import PickScore
from am_diffusers.rewards.pixels import Brightness, Colourfulness, JpegSize, Symmetry
from am_diffusers.rewards.world import WorldClean, WorldRight

# By name, in the order of the columns in papers. A `LearnedReward` is built by `from_pretrained(path, ...)`,
# any other without arguments.
REWARDS: dict[str, type[LearnedReward] | type[FixedReward]] = {
    "pickscore": PickScore,
    "clip_score": CLIPScore,
    "hpsv2": HPSv2,
    "aesthetic": Aesthetic,
    "image_reward": ImageReward,
    "ocr": OCR,
    "imagenet_class": ImageNetClass,
    "brightness": Brightness,
    "colourfulness": Colourfulness,
    "symmetry": Symmetry,
    "jpeg_size": JpegSize,
    "world_clean": WorldClean,
    "world_right": WorldRight,
}

__all__ = [
    "OCR",
    "OFFICIAL",
    "REWARDS",
    "Aesthetic",
    "Brightness",
    "CLIPScore",
    "ClipReward",
    "Colourfulness",
    "Column",
    "FixedReward",
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
    "WorldClean",
    "WorldRight",
]
