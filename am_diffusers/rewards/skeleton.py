"""Rewards without weights and vocabularies: their towers at full size, for estimates of memory and time.

Sizes come from the configuration beside the weights, if it is there, and from here for the released models.
The text tower of a CLIP-type reward runs once a prompt, without gradient, and is left out of a pass.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from am_diffusers.rewards.aesthetic import RELEASED_VISION, Aesthetic
from am_diffusers.rewards.clip_score import CLIPScore
from am_diffusers.rewards.hpsv2 import CONFIG_FILE, RELEASED_ARCHITECTURE, HPSv2
from am_diffusers.rewards.image_reward import ImageReward
from am_diffusers.rewards.learned import LearnedReward, RewardOptions, unit_length
from am_diffusers.rewards.parts.blip import RELEASED, BlipScorer, read_config
from am_diffusers.rewards.parts.hf_files import download_remedy
from am_diffusers.rewards.parts.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    PixelFormat,
    longest_edge_pad,
    shortest_edge_crop,
)
from am_diffusers.rewards.pickscore import PickScore


def _clip_sizes(vision: tuple[int, int, int], text: tuple[int, int, int], projection: int) -> dict[str, Any]:
    """A CLIP config of patches of 14 pixels, from (width, layers, heads) of its towers."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    towers = [dict(zip(names, t, strict=True)) | {"intermediate_size": 4 * t[0]} for t in (vision, text)]
    vision_config = towers[0] | {"patch_size": 14}
    return {"vision_config": vision_config, "text_config": towers[1], "projection_dim": projection}


VIT_H_14 = _clip_sizes((1280, 32, 16), (1024, 24, 16), 1024)
VIT_L_14 = _clip_sizes((1024, 24, 16), (768, 12, 12), 768)
RELEASED_SIZES = {PickScore.released: VIT_H_14, CLIPScore.released: VIT_L_14, RELEASED_VISION: VIT_L_14}


class Skeleton(LearnedReward):
    """A learned reward on the meta device. Build it with `skeleton`; `materialise` moves it.

    Args:
        name: of the reward it stands for.
        model: its network, on the meta device.
        pixels: pictures in [0, 1] to what the network reads.
        score: that to scores (B,).
        options: how it runs.
    """

    released = ""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        pixels: Callable[[Tensor], Tensor],
        score: Callable[[Tensor], Tensor],
        options: RewardOptions,
    ) -> None:
        super().__init__(model, options=replace(options, device="meta"))
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._prepare, self._judge = pixels, score

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        options: RewardOptions | None = None,
    ) -> "Skeleton":
        """A skeleton has no weights to load.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"a skeleton has no weights, {path} can't be loaded: use `skeleton`")

    def network(self) -> nn.Module:
        """Its network."""
        return self._model

    def materialise(self, device: torch.device | str) -> None:
        """Say that the network, whose weights were replaced, is on another device than meta."""
        self.options = replace(self.options, device=device)

    def _pixels(self, images: Tensor) -> Tensor:
        return self._prepare(images)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._judge(pixels)


def skeleton(
    kind: type[LearnedReward], path: str, *, revision: str | None = None, options: RewardOptions
) -> Skeleton:
    """A reward of a kind without its weights.

    Args:
        kind: of the reward; those that a package ships are read, which takes a moment.
        path: folder, file or hub id of its weights.
        revision: commit of a hub id.
        options: how it runs.

    Raises:
        ValueError: if its sizes are not known here, or its package isn't installed.
    """
    with torch.device("meta"):
        if issubclass(kind, HPSv2):
            return _hpsv2(path, options)
        if issubclass(kind, ImageReward):
            return _image_reward(path, options)
        if issubclass(kind, (PickScore, CLIPScore, Aesthetic)):
            return _clip(kind, path, revision, options)
    return _packaged(kind, path, options)


def _packaged(kind: type[LearnedReward], path: str, options: RewardOptions) -> Skeleton:
    """A network of a few megabytes, read and dropped; its scores are replaced by a mean."""
    loaded = kind.from_pretrained(path, options=replace(options, device="cpu"))
    network = loaded._model
    return Skeleton(
        kind.name, network, loaded._pixels, lambda x: network(x).float().flatten(1).mean(1), options
    )


def _clip(kind: type[LearnedReward], path: str, revision: str | None, options: RewardOptions) -> Skeleton:
    if kind is Aesthetic and not (Path(path) / "config.json").is_file():
        path, revision = RELEASED_VISION, None
    config = _clip_config(path, revision)
    clip: Any = CLIPModel(config)
    pixel_format = PixelFormat(clip.config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
    kept = nn.ModuleList([clip.vision_model, clip.visual_projection]) if kind is Aesthetic else clip

    def score(pixels: Tensor) -> Tensor:
        return _against_text(clip.visual_projection(clip.vision_model(pixels).pooler_output))

    return Skeleton(
        kind.name,
        kept,
        lambda x: pixel_format.normalise(shortest_edge_crop(x, pixel_format.size)),
        score,
        options,
    )


def _clip_config(path: str, revision: str | None) -> CLIPConfig:
    try:
        return CLIPConfig.from_dict(CLIPConfig.get_config_dict(path, revision=revision)[0])
    except OSError as error:
        if path in RELEASED_SIZES:
            return CLIPConfig(**RELEASED_SIZES[path])
        raise ValueError(f"config.json of {path!r} isn't here: {download_remedy(path)}") from error


def _hpsv2(path: str, options: RewardOptions) -> Skeleton:
    file = Path(path) / CONFIG_FILE
    released: Any = open_clip.get_model_config(RELEASED_ARCHITECTURE)
    config = json.loads(file.read_text())["model_cfg"] if file.is_file() else released
    model = CLIP(**config)
    size = config["vision_cfg"]["image_size"]
    pixel_format = PixelFormat(size, CLIP_MEAN, CLIP_STD)
    return Skeleton(
        HPSv2.name,
        model,
        lambda x: pixel_format.normalise(longest_edge_pad(x, size)),
        lambda pixels: _against_text(model.encode_image(pixels)),
        options,
    )


def _image_reward(path: str, options: RewardOptions) -> Skeleton:
    file = Path(path) / "config.json"
    config = read_config(file) if file.is_file() else RELEASED
    model = BlipScorer(config)
    pixel_format = PixelFormat(config.vision_config["image_size"], CLIP_MEAN, CLIP_STD)

    def score(pixels: Tensor) -> Tensor:
        tokens = torch.ones(len(pixels), config.context_length, dtype=torch.long)
        pair = model.encode_pair(model.encode_image(pixels), tokens, tokens)
        return pair.float().mean(-1)  # its head is one affine function

    return Skeleton(
        ImageReward.name,
        model,
        lambda x: pixel_format.normalise(shortest_edge_crop(x, pixel_format.size)),
        score,
        options,
    )


def _against_text(features: Tensor) -> Tensor:
    return (unit_length(features) * torch.zeros_like(features)).sum(-1)
