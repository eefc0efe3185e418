"""Which folders and files ImageReward reads, how it refuses the rest, and its released size."""

import json
import re
from pathlib import Path

import pytest
import torch

from am_diffusers.rewards import ImageReward, image_reward
from am_diffusers.rewards.parts.blip import RELEASED, BlipScorer, ScorerConfig, rename_released
from reward_models import (
    CAPTIONS,
    bert_vocabulary,
    edit_json,
    image_reward_config,
    released_image_reward,
    save_image_reward,
)

IMAGES = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def released_keys() -> set[str]:
    """Tensor names of ImageReward.pt without those that are dropped."""
    parts = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    modules = [f"blip.visual_encoder.blocks.{n}.{part}" for n in range(24) for part in parts]
    modules += ["blip.visual_encoder.patch_embed.proj", "blip.visual_encoder.norm"]
    attention = ["self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"]
    parts = [f"{kind}.{part}" for kind in ("attention", "crossattention") for part in attention]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    modules += [f"blip.text_encoder.encoder.layer.{n}.{part}" for n in range(12) for part in parts]
    modules += ["blip.text_encoder.embeddings.LayerNorm", *(f"mlp.layers.{n}" for n in (0, 2, 4, 6, 7))]
    tables = {f"blip.text_encoder.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}
    tables |= {"blip.visual_encoder.cls_token", "blip.visual_encoder.pos_embed"}
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")} | tables


def test_released_image_reward_has_the_published_size() -> None:
    with torch.device("meta"):
        state = BlipScorer(RELEASED).state_dict()
    assert sum(value.numel() for value in state.values()) == 446_206_689
    renamed = rename_released({key: torch.empty(0) for key in released_keys()}, "ImageReward.pt")
    assert set(renamed) == set(state)
    assert state["vision_model.embeddings.position_embedding"].shape == (1, 197, 1024)
    assert state["text_encoder.embeddings.word_embeddings.weight"].shape == (30524, 768)
    assert state["text_encoder.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)


def test_released_config_is_that_of_med_config_json() -> None:
    """Each of these silently changes scores."""
    with torch.device("meta"):
        model = BlipScorer(RELEASED)
    text, vision = model.text_encoder.config, model.vision_model.config
    assert (text.num_attention_heads, text.num_hidden_layers, text.hidden_size) == (12, 12, 768)
    assert (text.intermediate_size, text.vocab_size, text.max_position_embeddings) == (3072, 30524, 512)
    assert (text.encoder_hidden_size, text.layer_norm_eps, text.hidden_act) == (1024, 1e-12, "gelu")
    assert (text.is_decoder, text.pad_token_id) == (True, 0)
    assert (vision.image_size, vision.patch_size, vision.layer_norm_eps) == (224, 16, 1e-6)
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.hidden_size) == (16, 24, 1024)
    assert (vision.intermediate_size, vision.hidden_act) == (4096, "gelu")
    assert (RELEASED.mean, RELEASED.std) == (0.16717362830052426, 1.0333394966054072)
    assert RELEASED.context_length == 35
    assert text._attn_implementation == vision._attn_implementation == "eager"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder; a released file is expected to be of its size, with its vocabulary."""
    save_image_reward(tmp_path)
    monkeypatch.setattr(image_reward, "RELEASED", ScorerConfig(**image_reward_config()))
    monkeypatch.setattr(image_reward, "RELEASED_VOCABULARY", tmp_path / "vocab.txt")
    return tmp_path


def test_a_released_file_scores_like_the_folder(folder: Path) -> None:
    torch.save(released_image_reward(folder), folder / "ImageReward.pt")
    expected = ImageReward.from_pretrained(folder)(IMAGES, CAPTIONS[:2])
    scores = ImageReward.from_pretrained(folder / "ImageReward.pt")(IMAGES, CAPTIONS[:2])
    assert torch.equal(scores, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.cls_token": None}, "1 missing, e.g. vision_model.embeddings.class_embedding"),
        ({"blip.text_decoder.bias": torch.zeros(1)}, "1 unexpected, e.g. blip.text_decoder.bias"),
        ({"blip.visual_encoder.blocks.0.norm3.bias": torch.zeros(1)}, "1 unexpected.*norm3"),
        ({"mlp.layers.1.bias": torch.zeros(1)}, "1 unexpected, e.g. mlp.layers.1.bias"),
        ({"mlp.layers.0.bias": torch.zeros(3)}, r"shapes: mlp.layers.0.bias \(3,\)"),
        ({"epoch": 3}, "expected tensors by name"),
    ],
)
def test_other_released_files_are_refused(folder: Path, change: dict, message: str) -> None:
    weights = {
        key: value for key, value in (released_image_reward(folder) | change).items() if value is not None
    }
    torch.save(weights, folder / "ImageReward.pt")
    with pytest.raises(ValueError, match=message):
        ImageReward.from_pretrained(folder / "ImageReward.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"hidden_size": 24}}, "expected the keys .*num_attention_heads"),
        ({"vision_config__colour": 1}, "expected the keys .*got .*colour"),
        ({"context_length": 21}, r"context_length in 3\.\.20, got 21"),
        ({"std": 0}, "positive std"),
        ({"mlp_widths": [12, 10, 8]}, "4 widths"),
        ({"model_type": "blip"}, "isn't an ImageReward config.*model_type"),
        ({"text_config__hidden_size": "24"}, "don't make a BLIP network"),
        ({"text_config__vocab_size": 200}, "shapes: text_encoder.embeddings.word_embeddings"),
    ],
)
def test_folders_with_other_configs_are_refused(folder: Path, change: dict, message: str) -> None:
    edit_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        ImageReward.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (bert_vocabulary()[:-3], "expected a vocabulary of"),
        ([*bert_vocabulary(), "x1", "x2", "x3"], "expected a vocabulary of"),
        ([*bert_vocabulary()[:-1], "[PAD]"], "isn't a BERT vocabulary"),
        (["dog" if token == "[CLS]" else token for token in bert_vocabulary()], "isn't a BERT vocabulary"),
    ],
)
def test_other_vocabularies_are_refused(folder: Path, tokens: list[str], message: str) -> None:
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    with pytest.raises(ValueError, match=message):
        ImageReward.from_pretrained(folder)


def test_missing_parts_are_named(folder: Path) -> None:
    (folder / "vocab.txt").rename(folder / "words.txt")
    with pytest.raises(ValueError, match=r"hf download google-bert/bert-base-uncased vocab.txt"):
        ImageReward.from_pretrained(folder)
    ImageReward.from_pretrained(folder, vocabulary=folder / "words.txt")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json not found.*hf download THUDM/ImageReward"):
        ImageReward.from_pretrained(folder, vocabulary=folder / "words.txt")


def test_another_sha256_is_refused(folder: Path) -> None:
    file = folder / "ImageReward.pt"
    torch.save(released_image_reward(folder), file)
    with pytest.raises(ValueError, match=r"sha256 of .*ImageReward.pt is .*expected 00") as error:
        ImageReward.from_pretrained(file, sha256="00" * 32)
    found = re.search(r"is ([0-9a-f]{64})", str(error.value))
    assert found is not None
    assert ImageReward.from_pretrained(file, sha256=found[1]).name == "image_reward"


def test_released_configs_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(image_reward_config()))
    config = image_reward.read_config(tmp_path / "config.json")
    assert config == ScorerConfig(**image_reward_config())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", [ImageReward.released, "THUDM/ImageReward", "/no/such/ImageReward.pt"])
def test_a_missing_vocabulary_names_the_download(path: str) -> None:
    with pytest.raises(ValueError, match=r"hf download google-bert/bert-base-uncased vocab.txt"):
        ImageReward.from_pretrained(path)
