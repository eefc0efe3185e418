"""CLIP-type rewards against their published scorers, written out here line by line, and full-size facts."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as tvf
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torchvision.transforms import InterpolationMode
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPModel

from am_diffusers.rewards import (
    OFFICIAL,
    CLIPScore,
    HPSv2,
    PickScore,
)
from am_diffusers.rewards.parts.preprocess import longest_edge_pad, shortest_edge_crop
from reward_models import (
    CAPTIONS,
    CLIP_MEAN,
    CLIP_STD,
    CONTEXT,
    SIZE,
    save_hpsv2,
)
from reward_pictures import SHAPES, as_pil, pictures


def pil_resize_crop(image: Image.Image, size: int) -> np.ndarray:
    """Shortest edge to `size`, bicubic, centre crop, as CLIP's own preprocessing; (size, size, 3) bytes."""
    short = min(image.size)
    width, height = (int(size * edge / short) for edge in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return resized[top : top + size, left : left + size]


@cache
def published_model(folder: Path) -> tuple[Any, Any]:
    """The model and tokenizer of the model card."""
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def published_clip(folder: Path, image: Image.Image, prompt: str) -> tuple[float, float]:
    """The code of the PickScore_v1 model card for one picture, with the image processor spelled out.

    Returns:
        The cosine, which is CLIPScore, and PickScore.
    """
    model, tokenizer = published_model(folder)
    pixels = (pil_resize_crop(image, SIZE) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    pixel_values = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
    text = tokenizer(prompt, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        image_embs = model.get_image_features(pixel_values=pixel_values).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**text).pooler_output
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        cosine = (text_embs @ image_embs.T)[0]
        return cosine.item(), (model.logit_scale.exp() * cosine).item()


def resize_max_size(image: torch.Tensor, max_size: int) -> torch.Tensor:
    """`ResizeMaxSize` of the hpsv2 package on a (3, H, W) tensor."""
    height, width = image.shape[1:]
    scale = max_size / float(max(height, width))
    if scale != 1.0:
        new = tuple(round(edge * scale) for edge in (height, width))
        image = tvf.resize(image, list(new), InterpolationMode.BICUBIC)
        pad_h, pad_w = max_size - new[0], max_size - new[1]
        image = tvf.pad(image, [pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2], fill=0)
    return image


def published_hpsv2(model: CLIP, vocabulary: Path, image: Image.Image, prompt: str) -> float:
    """`hpsv2.score` for one picture: its transform, its tokenizer, the diagonal of the cosines."""
    pixels = tvf.normalize(resize_max_size(tvf.to_tensor(image), SIZE), CLIP_MEAN, CLIP_STD)
    text = SimpleTokenizer(bpe_path=str(vocabulary))([prompt], context_length=CONTEXT)
    with torch.no_grad():
        image_features, text_features, _ = model(pixels[None], text)
        return torch.diagonal(image_features @ text_features.T).item()


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("reward", [CLIPScore, PickScore])
def test_clip_rewards_are_the_published_scorer(small_rewards: Path, reward, height: int, width: int) -> None:
    folder = small_rewards / reward.name
    images = pictures(2, height, width)
    prompts = [CAPTIONS[0], CAPTIONS[3] + " and " + CAPTIONS[1] + ", 'tis BIG"]  # the second is cut
    scores = reward.from_pretrained(folder, options=OFFICIAL)(images, prompts)
    published = [published_clip(folder, as_pil(i), p) for i, p in zip(images, prompts, strict=True)]
    expected = [pick if reward is PickScore else cosine for cosine, pick in published]
    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP]:
    """A small folder, and the model in it."""
    folder = tmp_path_factory.mktemp("hpsv2")
    return folder, save_hpsv2(folder)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_hpsv2_is_the_published_scorer(hpsv2: tuple[Path, CLIP], height: int, width: int) -> None:
    folder, model = hpsv2
    images = pictures(2, height, width)
    prompts = [
        "A Red  apple &amp; a fox",
        CAPTIONS[3] + " and " + CAPTIONS[1] + ", 'tis BIG",
    ]  # the second is cut
    scores = HPSv2.from_pretrained(folder, options=OFFICIAL)(images, prompts)
    vocabulary = folder / "bpe_simple_vocab.txt.gz"
    expected = [
        published_hpsv2(model, vocabulary, as_pil(i), p) for i, p in zip(images, prompts, strict=True)
    ]
    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tensor_crop_is_pil_within_its_roundings(height: int, width: int) -> None:
    """PIL rounds the input and after both passes: three half levels, stretched a little by the kernel."""
    images = pictures(4, height, width)
    expected = np.stack([pil_resize_crop(as_pil(image), SIZE) for image in images]).transpose(0, 3, 1, 2)
    plain = 255 * shortest_edge_crop(images, SIZE).numpy() - expected
    rounded = 255 * shortest_edge_crop(images, SIZE, rounded=True).numpy() - expected
    assert abs(plain).max() < 2
    assert (abs(rounded) > 0.1).mean() < 0.01


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tensor_pad_is_torchvision(height: int, width: int) -> None:
    images = pictures(2, height, width)
    expected = torch.stack([resize_max_size(image, SIZE) for image in images])
    assert torch.allclose(longest_edge_pad(images, SIZE), expected, atol=1e-6)


def test_released_hpsv2_has_the_published_size() -> None:
    """HPS_v2(.1)_compressed.pt: 686 tensors, 986,109,441 numbers, 224 pixels, 77 tokens."""
    config = open_clip.get_model_config("ViT-H-14")
    assert config is not None
    with torch.device("meta"):
        state = CLIP(**config).state_dict()
    assert len(state) == 686
    assert sum(value.numel() for value in state.values()) == 986_109_441
    assert config["vision_cfg"]["image_size"] == 224
    assert open_clip.get_tokenizer("ViT-H-14").context_length == 77
    assert SimpleTokenizer().vocab_size == config["text_cfg"]["vocab_size"] == 49408


def vit_h_keys() -> set[str]:
    """Tensor names of PickScore_v1: 32 vision and 24 text layers of transformers' CLIPModel."""
    parts = [f"self_attn.{p}_proj" for p in "qkv"]
    parts += ["self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    layers = [f"vision_model.encoder.layers.{n}." for n in range(32)]
    layers += [f"text_model.encoder.layers.{n}." for n in range(24)]
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"]
    modules = [layer + part for layer in layers for part in parts] + norms
    vision = {f"vision_model.embeddings.{n}" for n in ("class_embedding", "patch_embedding.weight")}
    positions = {f"{tower}_model.embeddings.position_embedding.weight" for tower in ("vision", "text")}
    heads = {"text_model.embeddings.token_embedding.weight", "visual_projection.weight"}
    heads |= {"text_projection.weight", "logit_scale"}
    return {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")} | vision | positions | heads


def test_released_pickscore_has_the_published_size() -> None:
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "hidden_act": "gelu"}
    text |= {"num_attention_heads": 16, "hidden_act": "gelu"}
    with torch.device("meta"):
        state = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
        ).state_dict()
    assert set(state) == vit_h_keys()
    assert sum(value.numel() for value in state.values()) == 986_109_441
