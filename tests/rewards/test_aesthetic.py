"""The aesthetic predictor against its published scorer, and which files it reads."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPModel

from am_diffusers.rewards import OFFICIAL, Aesthetic, aesthetic
from am_diffusers.rewards.parts.heads import collapse
from reward_models import (
    CAPTIONS,
    CLIP_MEAN,
    CLIP_STD,
    SIZE,
    PublishedHead,
    edit_json,
    edit_weights,
    save_aesthetic,
)
from reward_pictures import SHAPES, as_pil, pictures

IMAGES = pictures(2, 40, 48)


def published(clip: CLIPModel, head: PublishedHead, image: Image.Image) -> float:
    """simple_inference.py for one picture: the CLIP package's transform, numpy's norm, five layers."""
    resize = Resize(SIZE, InterpolationMode.BICUBIC)
    transform = Compose([resize, CenterCrop(SIZE), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])
    with torch.no_grad():
        features = clip.get_image_features(transform(image)[None]).pooler_output.numpy()
        l2 = np.atleast_1d(np.linalg.norm(features, 2, -1))
        return head(torch.from_numpy(features / l2[:, None])).item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel, PublishedHead]:
    """A small folder, and the model and head in it."""
    folder = tmp_path_factory.mktemp("aesthetic")
    return folder, *save_aesthetic(folder)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_aesthetic_is_the_published_scorer(saved, height: int, width: int) -> None:
    folder, clip, head = saved
    images = pictures(3, height, width)
    scores = Aesthetic.from_pretrained(folder, options=OFFICIAL)(images, CAPTIONS[:3])
    assert scores.tolist() == pytest.approx([published(clip, head, as_pil(i)) for i in images], abs=1e-5)
    assert scores.std() > 1e-3


def test_the_head_is_one_affine_map() -> None:
    """Exact oracle: the layers in float64, with the published widths."""
    torch.manual_seed(0)
    sizes = zip((768, 1024, 128, 64, 16), (1024, 128, 64, 16, 1), strict=True)
    layers = [torch.nn.Linear(*size).double() for size in sizes]
    weights = {
        f"layers.{row}.weight": layer.weight for row, layer in zip((0, 2, 4, 6, 7), layers, strict=True)
    }
    weights |= {f"layers.{row}.bias": layer.bias for row, layer in zip((0, 2, 4, 6, 7), layers, strict=True)}
    with torch.no_grad():
        features = torch.randn(8, 768, dtype=torch.float64)
        expected = torch.nn.Sequential(*layers)(features)[:, 0]
        assert torch.allclose(collapse(weights, "test", 768)(features), expected, rtol=1e-12, atol=1e-12)


def test_head_and_vision_may_be_apart(tmp_path: Path) -> None:
    save_aesthetic(tmp_path / "whole")
    expected = Aesthetic.from_pretrained(tmp_path / "whole")(IMAGES, CAPTIONS[:2])
    head = (tmp_path / "whole/aesthetic_head.safetensors").rename(tmp_path / "head.safetensors")
    reward = Aesthetic.from_pretrained(head, vision=tmp_path / "whole")
    assert torch.equal(reward(IMAGES, CAPTIONS[:2]), expected)


def test_a_pickle_is_pinned(tmp_path: Path) -> None:
    """Only the released file is read without its own sha256."""
    save_aesthetic(tmp_path)
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(load_file(tmp_path / "aesthetic_head.safetensors"), file)
    with pytest.raises(ValueError, match="expected 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511"):
        Aesthetic.from_pretrained(file, vision=tmp_path)
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    reward = Aesthetic.from_pretrained(file, vision=tmp_path, sha256=own)
    expected = Aesthetic.from_pretrained(tmp_path)(IMAGES, CAPTIONS[:2])
    assert torch.equal(reward(IMAGES, CAPTIONS[:2]), expected)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"resize": "layers.4.weight"}, r"layers.4 is \(8, 9\) with bias \(8,\), expected \(8, 10\)"),
        ({"resize": "layers.7.weight"}, r"layers.7 is \(1, 5\)"),
    ],
)
def test_other_heads_are_refused(tmp_path: Path, edit: dict, message: str) -> None:
    save_aesthetic(tmp_path)
    edit_weights(tmp_path / "aesthetic_head.safetensors", **edit)
    with pytest.raises(ValueError, match=message):
        Aesthetic.from_pretrained(tmp_path)


def test_a_head_with_several_outputs_is_refused(tmp_path: Path) -> None:
    save_aesthetic(tmp_path)
    file = tmp_path / "aesthetic_head.safetensors"
    save_file(load_file(file) | {"layers.7.weight": torch.ones(2, 6), "layers.7.bias": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"layers.7 is \(2, 6\) with bias \(2,\), expected \(1, 6\)"):
        Aesthetic.from_pretrained(tmp_path)


def test_another_vision_model_is_refused(tmp_path: Path) -> None:
    save_aesthetic(tmp_path)
    edit_json(tmp_path / "config.json", model_type="siglip")
    with pytest.raises(ValueError, match=r"expected a CLIP model for Aesthetic.*siglip"):
        Aesthetic.from_pretrained(tmp_path)


def test_missing_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aesthetic, "RELEASED_VISION", str(tmp_path / "none"))
    save_aesthetic(tmp_path / "whole")
    head = (tmp_path / "whole/aesthetic_head.safetensors").rename(tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"config.json not found at .*hf download"):
        Aesthetic.from_pretrained(head)
    with pytest.raises(ValueError, match=r"weights not found.*improved-aesthetic-predictor"):
        Aesthetic.from_pretrained(tmp_path / "whole")
