"""Features of pictures, for diversity and Frechet distances, and the distance LPIPS. One file each."""

from am_diffusers.features.base import Features
from am_diffusers.features.clip import CLIP
from am_diffusers.features.dinov2 import DINOv2
from am_diffusers.features.dreamsim import DreamSim
from am_diffusers.features.efficientnet import EfficientNet
from am_diffusers.features.lpips import LPIPS

FEATURES: dict[str, type[Features]] = {
    features.name: features for features in (DINOv2, CLIP, EfficientNet, DreamSim)
}

__all__ = ["CLIP", "FEATURES", "LPIPS", "DINOv2", "DreamSim", "EfficientNet", "Features"]
