"""Our side of the parity check: the same weights through the loaders that users call."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from am_diffusers.rewards import OFFICIAL, HPSv2, ImageReward
from am_diffusers.rewards.base import DIFFERENTIABLE
from am_diffusers.rewards.parts.blip import RELEASED, rename_released

from .cases import INPUT_FILE, SMALL_HPSV2, SMALL_IMAGE_REWARD, WEIGHT_FILE, Case


def load_hpsv2(case: Case, folder: Path) -> HPSv2:
    """Load by the released checkpoint's loader at full size, by the folder's for the small model."""
    if case.size == "full":
        return HPSv2.from_pretrained(folder / WEIGHT_FILE)
    weights = torch.load(folder / WEIGHT_FILE, weights_only=True)["state_dict"]
    form = case.pixel_format
    preprocessing = {"interpolation": "bicubic", "resize_mode": "longest", "fill_color": 0}
    preprocessing |= {"mean": form.mean, "std": form.std}
    document = {"model_cfg": SMALL_HPSV2, "preprocess_cfg": preprocessing}
    return HPSv2.from_pretrained(
        _write_folder(
            folder / "ours", weights, document, "open_clip_config.json", "open_clip_model.safetensors"
        )
    )


def load_image_reward(case: Case, folder: Path) -> ImageReward:
    """Load by the released checkpoint's loader at full size, by the folder's after its key map otherwise."""
    vocabulary = folder / "vocab.txt"
    if case.size == "full":
        return ImageReward.from_pretrained(folder / WEIGHT_FILE, vocabulary=vocabulary)
    weights = rename_released(torch.load(folder / WEIGHT_FILE, weights_only=True), WEIGHT_FILE)
    vision = SMALL_IMAGE_REWARD["vision"]
    sizes = {"image_size": vision["img_size"], "patch_size": vision["patch_size"]}
    sizes |= {"hidden_size": vision["embed_dim"], "intermediate_size": 4 * vision["embed_dim"]}
    sizes |= {"num_hidden_layers": vision["depth"], "num_attention_heads": vision["num_heads"]}
    document = {
        "vision_config": dict(RELEASED.vision_config) | sizes,
        "text_config": dict(RELEASED.text_config) | SMALL_IMAGE_REWARD["text"],
        "mlp_widths": RELEASED.mlp_widths,
        "context_length": RELEASED.context_length,
        "mean": RELEASED.mean,
        "std": RELEASED.std,
    }
    place = _write_folder(folder / "ours", weights, document, "config.json", "model.safetensors")
    return ImageReward.from_pretrained(place, vocabulary=vocabulary)


def _write_folder(
    folder: Path, weights: dict[str, Tensor], document: dict[str, Any], config: str, file: str
) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / file)
    (folder / config).write_text(json.dumps(document), "utf-8")
    return folder


def token_ids(reward: HPSv2 | ImageReward, prompts: Sequence[str]) -> Tensor:
    """Return the token ids (B, context length), filled up with 0 as both packages do."""
    if isinstance(reward, HPSv2):
        return reward._tokenizer(list(prompts))
    ids = reward._token_batch(prompts)[0]
    return torch.nn.functional.pad(ids, (0, reward.context_length - ids.shape[1]))


def score(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Return everything that is compared, as arrays by name."""
    load = load_hpsv2 if case.reward == "hpsv2" else load_image_reward
    reward: Any = load(case, folder)
    with np.load(folder / INPUT_FILE) as inputs:
        arrays = dict(inputs)
    pixels = torch.from_numpy(arrays["pixels"])
    names = sorted(name for name in arrays if name.startswith("picture_"))
    images = [torch.from_numpy(arrays[name]).permute(2, 0, 1)[None] / 255 for name in names]
    own = [case.prompts[row % len(case.prompts)] for row in range(len(images))]
    found = {"token_ids": token_ids(reward, case.prompts)}
    # One image at a time, as the packages do: the sums of a matrix product depend on its shape.
    pairs = [
        _with_gradient(reward._score, row[None], prompt) for row, prompt in zip(pixels, own, strict=True)
    ]
    found["score"] = torch.cat([value for value, _ in pairs])
    found["gradient"] = torch.cat([gradient for _, gradient in pairs])
    if case.reward == "hpsv2":
        reward.options = DIFFERENTIABLE
        found["picture_gradient"] = _with_gradient(reward, images[2], own[2])[1][0]
    reward.options = OFFICIAL
    found["official_pixels"] = torch.cat([reward._pixels(image) for image in images])
    found["official_score"] = torch.cat([reward(p, [prompt]) for p, prompt in zip(images, own, strict=True)])
    return {name: value.detach().numpy() for name, value in found.items()}


def _with_gradient(function: Any, images: Tensor, prompt: str) -> tuple[Tensor, Tensor]:
    """Return scores of images and their gradient."""
    images = images.clone().requires_grad_()
    scores = function(images, [prompt])
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]
