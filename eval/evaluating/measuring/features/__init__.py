"""Features of images, for diversity and Frechet distances, and the distance LPIPS. One file each."""

from evaluating.measuring.features.base import Features
from evaluating.measuring.features.clip import CLIP
from evaluating.measuring.features.dinov2 import DINOv2
from evaluating.measuring.features.dreamsim import DreamSim
from evaluating.measuring.features.efficientnet import EfficientNet
from evaluating.measuring.features.lpips import LPIPS

FEATURES: dict[str, type[Features]] = {
    features.name: features for features in (DINOv2, CLIP, EfficientNet, DreamSim)
}

__all__ = ["CLIP", "FEATURES", "LPIPS", "DINOv2", "DreamSim", "EfficientNet", "Features"]
