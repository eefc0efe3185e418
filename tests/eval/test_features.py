"""Features of pictures against the published paths, with small random models of the real classes."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from am_diffusers.rewards import ImageFeatures, ImageNetClass
from am_diffusers.rewards.parts.packaged import EFFICIENTNET_LITE0
from evaluating.measuring.features import CLIP, FEATURES, LPIPS, DINOv2, DreamSim, EfficientNet
from reward_models import edit_json, edit_weights, randomize, save_clip
from reward_pictures import as_pil, pictures

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# facebook/dinov2-base's preprocessor_config.json.
PUBLISHED = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": list(IMAGENET[0]),
    "image_std": list(IMAGENET[1]),
}


def save_dinov2(folder: Path) -> Dinov2Model:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    # Trained at another size than the crop, as the released ones: positions are interpolated.
    model = Dinov2Model(Dinov2Config(image_size=70, patch_size=14, **sizes))
    randomize(model, 7)
    model.save_pretrained(folder)
    BitImageProcessorPil(**PUBLISHED).save_pretrained(folder)
    return model.eval()


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    save_dinov2(tmp_path / "dinov2")
    return tmp_path / "dinov2"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    save_clip(tmp_path / "clip", 32, 2, "quick_gelu", seed=2)
    return tmp_path / "clip"


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNet:
    if find_spec(EFFICIENTNET_LITE0.module) is None:
        pytest.skip(f"{EFFICIENTNET_LITE0.package} isn't installed: {EFFICIENTNET_LITE0.remedy}")
    return EfficientNet.from_pretrained()


# Even margins: transformers and torchvision crop odd ones one pixel apart.
@pytest.mark.parametrize("shape", [(64, 64), (48, 77), (320, 280)])
def test_dinov2_is_that_of_transformers_and_of_the_published_transform(dinov2: Path, shape: tuple) -> None:
    images = pictures(3, *shape)
    ours = DINOv2.from_pretrained(dinov2).image_features(images)
    pils = [as_pil(image) for image in images]
    model = AutoModel.from_pretrained(dinov2).eval()
    processor = AutoImageProcessor.from_pretrained(dinov2, backend="pil")
    with torch.no_grad():
        expected = model(**processor(images=pils, return_tensors="pt")).last_hidden_state[:, 0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    transform = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    )
    pixels = torch.stack([transform(pil) for pil in pils])
    with torch.no_grad():
        published = model(pixels).pooler_output
    torch.testing.assert_close(ours, published, atol=1e-5, rtol=1e-5)
    assert ours.shape == (3, 32)
    assert torch.cosine_similarity(ours[0], ours[1], dim=0) < 0.99


def test_clip_is_that_of_transformers(clip: Path) -> None:
    images = pictures(3, 48, 77)
    ours = CLIP.from_pretrained(clip).image_features(images)
    model, processor = (
        CLIPModel.from_pretrained(clip).eval(),
        CLIPProcessor.from_pretrained(clip, backend="pil"),
    )
    with torch.no_grad():
        inputs = processor(images=[as_pil(image) for image in images], return_tensors="pt")
        expected = model.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (ours.norm(dim=1) - 1).abs().min() > 0.01, "not brought to length 1"


def test_efficientnet_is_the_rewards_before_normalisation(efficientnet: EfficientNet) -> None:
    images = pictures(2, 48, 77)
    ours = efficientnet.image_features(images)
    reward = ImageNetClass.from_pretrained()
    reward.options = type(reward.options)("official")
    unit = torch.nn.functional.normalize(ours, dim=1)
    torch.testing.assert_close(unit, reward.image_features(images), atol=1e-6, rtol=1e-5)
    logits = efficientnet._model.get_classifier()(ours)
    pixels = reward._pixels(images)
    with torch.no_grad():
        torch.testing.assert_close(logits, efficientnet._model(pixels), atol=1e-4, rtol=1e-4)
    assert ours.shape == (2, 1280)
    assert ours.min() >= 0


class Embedding(nn.Module):
    """Stands for the package's model, whose weights need a network: prepared pictures to embeddings."""

    def embed(self, pixels):
        return pixels.mean((2, 3)) - pixels.mean((1, 2, 3))[:, None]


def prepare(image):
    return transforms.ToTensor()(image.resize((8, 8))).unsqueeze(0)


def all_features(dinov2: Path, clip: Path, efficientnet: EfficientNet, batch_size: int | None) -> list:
    return [
        DINOv2.from_pretrained(dinov2, batch_size=batch_size),
        CLIP.from_pretrained(clip, batch_size=batch_size),
        EfficientNet(efficientnet._model, batch_size=batch_size),
        DreamSim(Embedding(), prepare=prepare, batch_size=batch_size),
    ]


def test_features_do_not_depend_on_the_batch(dinov2: Path, clip: Path, efficientnet: EfficientNet) -> None:
    images = pictures(5, 40, 40)
    whole = all_features(dinov2, clip, efficientnet, None)
    assert [features.name for features in whole] == list(FEATURES)
    for one, parts in zip(whole, all_features(dinov2, clip, efficientnet, 2), strict=True):
        assert isinstance(one, ImageFeatures)
        expected = one.image_features(images.requires_grad_())
        assert not expected.requires_grad
        assert expected.dtype == torch.float32
        torch.testing.assert_close(parts.image_features(images), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.image_features(images[3:4]), expected[3:4], atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            one.image_features(2 * images)
    with pytest.raises(ValueError, match="batch_size of at least 1 or none, got 0"):
        CLIP.from_pretrained(clip, batch_size=0)


@pytest.mark.parametrize("kind", [DINOv2, CLIP])
def test_missing_and_wrong_files_are_named_with_the_command(kind: type, tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        save_dinov2(folder) if kind is DINOv2 else save_clip(folder, 32, 2, "quick_gelu", seed=2)

    command = f"run `hf download {kind.released}`"
    with pytest.raises(ValueError, match=rf"{kind.name}'s config.json not found.*{command}"):
        kind.from_pretrained()
    for name in ("preprocessor_config.json", "model.safetensors"):
        save(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(ValueError, match=f"{kind.name}'s {name} not found.*{command}"):
            kind.from_pretrained(tmp_path / name)
    key = "layernorm.weight" if kind is DINOv2 else "visual_projection.weight"
    save(tmp_path / "keys")
    edit_weights(tmp_path / "keys" / "model.safetensors", drop=key)
    with pytest.raises(ValueError, match=f"1 missing, e.g. {key}"):
        kind.from_pretrained(tmp_path / "keys")
    save(tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", model_type="vit")
    with pytest.raises(ValueError, match=f"model for {kind.name}, got model_type 'vit'.*{command}"):
        kind.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize(
    ("load", "module", "remedy"),
    [
        (DreamSim.from_pretrained, "dreamsim", "pip install dreamsim"),
        (LPIPS.from_pretrained, "lpips", r'pip install "am_diffusers\[perceptual\]"'),
    ],
)
def test_a_missing_package_is_named(
    load: type, module: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{module} can't be imported.*run `{remedy}`"):
        load()


def test_lpips_is_the_packages() -> None:
    package = pytest.importorskip("lpips")
    torch.manual_seed(0)
    model = package.LPIPS(net="alex", verbose=False, pnet_rand=True)
    first, second = pictures(3, 64, 64), pictures(3, 64, 64, seed=1)
    ours = LPIPS(model)(first.clone().requires_grad_(), second)
    assert not ours.requires_grad
    expected = model(2 * first - 1, 2 * second - 1)[:, 0, 0, 0]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert not LPIPS(model)(first, first).any()
    assert np.ptp(ours.numpy()) > 0
    with pytest.raises(ValueError, match="expected pairs of images, got"):
        LPIPS(model)(first, second[:2])
